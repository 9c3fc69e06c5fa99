// Linear layers: exact int32 sums of int8 operands with a fused epilogue, and float tokens on int8 or 16-bit rows.
//
//   acc[t, m] = sum_k x[t, k] * weight[m, k]                   int32, exact
//   y[t, m]   = acc * (x_scale * weight_scale[m]) + bias[m]    float32, one rounding an operation
//   out       = y, residual[t, m] + y, or qm_quantize(y, inv_out_scale)
//
// All operands are row-major. Outputs below `split` are float32 in `real` (tokens, split), the others int8 in
// `codes` (tokens, rows - split).
//
//   linear_skinny    few tokens, int8 or packed 4-bit weights, tensor cores     linear_mma.cuh
//   linear_rows      few float32 tokens                                         linear_float.cuh
//   linear_halves    one 16-bit token, 16-bit weights                           linear_half.cuh
//   linear_bytes     few tokens, any k and any alignment: one warp a row, dp4a
//   linear_epilogue  sums from elsewhere, in one or more parts, one thread an output
//   expand_int4      a packed weight to int8, 32 columns a thread; expand_int4_bytes the same for any k and group
//
// Limits: k < 2^17, so that no int32 sum overflows. Source: ours.
#include "numerics.cuh"
#include "overlap.cuh"
#include "linear_mma.cuh"
#include "linear_float.cuh"
#include "linear_half.cuh"

// grid.x: rows / warps a block; grid.y: tokens / 8
__global__ void linear_bytes(const signed char* __restrict__ x,       // (tokens, k), rows x_stride apart
                             const signed char* __restrict__ weight,  // (rows, k)
                             const float* __restrict__ weight_scale, const float* __restrict__ bias,
                             const float* __restrict__ residual, float* __restrict__ real,
                             signed char* __restrict__ codes, float x_scale, float inv_out_scale, long long x_stride,
                             int tokens, int rows, int split, int k) {
  const int lane = threadIdx.x % kLanes;
  const int row = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const int first = blockIdx.y * kTileTokens;
  if (row >= rows) return;
  const signed char* weight_row = weight + static_cast<long long>(row) * k;
  int acc[kTileTokens] = {};
  for (int column = lane; column < k; column += kLanes) {
    const int w = weight_row[column];
#pragma unroll
    for (int t = 0; t < kTileTokens; ++t) {
      if (first + t < tokens) acc[t] += x[(first + t) * x_stride + column] * w;
    }
  }
#pragma unroll
  for (int t = 0; t < kTileTokens; ++t) acc[t] = __reduce_add_sync(0xffffffffu, acc[t]);
  const Target to = {real, codes, residual, weight_scale, bias, x_scale, inv_out_scale, rows, split};
#pragma unroll
  for (int t = 0; t < kTileTokens; ++t) {
    if (lane == t && first + t < tokens) store(to, first + t, row, acc[t]);
  }
}

// grid.x: tokens, in strides; grid.y: rows / threads
__global__ void linear_epilogue(const int* __restrict__ acc,  // (parts, tokens, pitch) exact sums
                                const float* __restrict__ weight_scale, const float* __restrict__ bias,
                                const float* __restrict__ residual, float* __restrict__ real,
                                signed char* __restrict__ codes, float x_scale, float inv_out_scale, long long tokens,
                                int rows, int split, int pitch, int parts) {
  const int row = blockIdx.y * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const Target to = {real, codes, residual, weight_scale, bias, x_scale, inv_out_scale, rows, split};
  for (long long token = blockIdx.x; token < tokens; token += gridDim.x) {
    int sum = 0;
    for (int part = 0; part < parts; ++part) sum += acc[(part * tokens + token) * pitch + row];
    store(to, token, row, sum);
  }
}

// (code + 8) * m of four codes at once fits unsigned bytes, 225 at most; then 8 * m is taken off each byte alone.
__device__ __forceinline__ unsigned int times(unsigned int biased, unsigned int m) {
  const unsigned int product = biased * m, offset = m * 0x08080808u;
  constexpr unsigned int kTop = 0x80808080u;
  return ((product | kTop) - (offset & ~kTop)) ^ ((product ^ ~offset) & kTop);
}

// One thread: 16 bytes of codes, which lie in one group.
__global__ void expand_int4(const uint4* __restrict__ codes,               // (rows, k / 2)
                            const unsigned char* __restrict__ multiplier,  // (rows, groups)
                            uint4* __restrict__ out,                       // (rows, k)
                            long long pieces, int pieces_a_row, int groups, int pieces_a_group) {
  const long long piece = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const long long row = piece / pieces_a_row;
  const unsigned int m = multiplier[row * groups + (piece - row * pieces_a_row) / pieces_a_group];
  const uint4 read = codes[piece];
  const unsigned int words[4] = {read.x, read.y, read.z, read.w};
  unsigned int wide[8];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned int biased = words[j] ^ 0x88888888u;
    const unsigned int even = times(biased & 0x0f0f0f0fu, m), odd = times((biased >> 4) & 0x0f0f0f0fu, m);
    wide[2 * j] = __byte_perm(even, odd, 0x5140);
    wide[2 * j + 1] = __byte_perm(even, odd, 0x7362);
  }
  out[2 * piece] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  out[2 * piece + 1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

__global__ void expand_int4_bytes(const unsigned char* __restrict__ codes,       // (rows, ceil(k / 2))
                                  const unsigned char* __restrict__ multiplier,  // (rows, groups)
                                  signed char* __restrict__ out,                 // (rows, k)
                                  long long elements, int k, int groups, int group_size) {
  const long long element = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= elements) return;
  const long long row = element / k;
  const int column = static_cast<int>(element - row * k);
  const int pair = codes[row * ((k + 1) / 2) + column / 2];
  const int code = ((column % 2 == 0 ? pair & 15 : pair >> 4) ^ 8) - 8;
  out[element] = static_cast<signed char>(code * multiplier[row * groups + column / group_size]);
}
