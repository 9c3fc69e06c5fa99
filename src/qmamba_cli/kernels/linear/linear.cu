// Linear layers with int8 operands, exact int32 sums and a fused epilogue.
//
//   acc[t, m] = sum_k x[t, k] * weight[m, k]                   int32, exact
//   y[t, m]   = acc * (x_scale * weight_scale[m]) + bias[m]    float32, one rounding an operation
//   out       = y, or qm_quantize(y, inv_out_scale)
//
// x (tokens, k) int8 and weight (rows, k) int8 are row-major; out (tokens, rows) is float32 or int8.
//
// linear_i8: few tokens, or shapes that the tensor-core library refuses. One warp owns one weight row and TOKENS
// tokens: every lane reads 16 bytes of the row at a time, meets them with the same 16 bytes of each token by dp4a,
// and the lanes' sums are joined by shuffles. The weight is read once for TOKENS tokens.
//
//   grid.x: weight rows / warps a block      grid.y: tokens / TOKENS
//
// linear_epilogue: sums from elsewhere, one thread an element of out.
//
// Limits: k < 2^17, so that no int32 sum overflows. Source: ours.
#include "numerics.cuh"

namespace {

constexpr int kWarp = 32;

// 16 bytes of a row from byte `offset`; VECTOR promises 16-byte alignment, otherwise bytes past k read as zero.
template <bool VECTOR>
__device__ __forceinline__ int4 load16(const signed char* __restrict__ row, int offset, int k) {
  if constexpr (VECTOR) {
    return *reinterpret_cast<const int4*>(row + offset);
  } else {
    unsigned int words[4] = {0u, 0u, 0u, 0u};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (offset + i < k) {
        words[i / 4] |= static_cast<unsigned int>(static_cast<unsigned char>(row[offset + i])) << (8 * (i % 4));
      }
    }
    return make_int4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ int dot16(int4 a, int4 b, int acc) {
  acc = __dp4a(a.x, b.x, acc);
  acc = __dp4a(a.y, b.y, acc);
  acc = __dp4a(a.z, b.z, acc);
  return __dp4a(a.w, b.w, acc);
}

template <bool OUT_I8>
__device__ __forceinline__ void store(void* __restrict__ out, long long index, int acc, float scale,
                                      const float* __restrict__ bias, int row, float inv_out_scale) {
  float y = __int2float_rn(acc) * scale;
  if (bias != nullptr) y = y + bias[row];
  if constexpr (OUT_I8) {
    static_cast<signed char*>(out)[index] = qm_quantize(y, inv_out_scale);
  } else {
    static_cast<float*>(out)[index] = y;
  }
}

}  // namespace

template <int TOKENS, bool VECTOR, bool OUT_I8>
__global__ void linear_i8(const signed char* __restrict__ x,        // (tokens, k)
                          const signed char* __restrict__ weight,   // (rows, k)
                          const float* __restrict__ weight_scale,   // (rows,) real units a step
                          const float* __restrict__ bias,           // (rows,) real units, or null
                          void* __restrict__ out,                   // (tokens, rows)
                          float x_scale, float inv_out_scale, int tokens, int rows, int k) {
  const int lane = threadIdx.x % kWarp;
  const int row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int first = blockIdx.y * TOKENS;
  if (row >= rows) return;
  const signed char* weight_row = weight + static_cast<long long>(row) * k;

  int acc[TOKENS] = {};
  for (int offset = lane * 16; offset < k; offset += kWarp * 16) {
    const int4 w = load16<VECTOR>(weight_row, offset, k);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (first + t < tokens) {
        const signed char* x_row = x + static_cast<long long>(first + t) * k;
        acc[t] = dot16(load16<VECTOR>(x_row, offset, k), w, acc[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) acc[t] = __reduce_add_sync(0xffffffffu, acc[t]);

  const float scale = weight_scale[row] * x_scale;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (lane == t && first + t < tokens) {
      store<OUT_I8>(out, static_cast<long long>(first + t) * rows + row, acc[t], scale, bias, row, inv_out_scale);
    }
  }
}

template <bool OUT_I8>
__global__ void linear_epilogue(const int* __restrict__ acc,             // (tokens, pitch) exact sums
                                const float* __restrict__ weight_scale,  // (rows,) real units a step
                                const float* __restrict__ bias,          // (rows,) real units, or null
                                void* __restrict__ out,                  // (tokens, rows)
                                float x_scale, float inv_out_scale, long long tokens, int rows, int pitch) {
  const int row = blockIdx.y * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const float scale = weight_scale[row] * x_scale;
  for (long long token = blockIdx.x; token < tokens; token += gridDim.x) {
    store<OUT_I8>(out, token * rows + row, acc[token * pitch + row], scale, bias, row, inv_out_scale);
  }
}
