// Products of float32 tokens with int8 or 16-bit weight rows, for few tokens: the language model's head.
//
//   y[t, m] = (sum_k x[t, k] * weight[m, k]) * weight_scale[m] + bias[m]       float32; no scale: 1
//
// A warp owns ROWS rows at a time: every lane reads 16 bytes of each and meets them with the same columns of up to
// TOKENS tokens, which lie in shared memory in the order the lanes read them: four columns a piece, 32 pieces side by
// side. A lane adds its columns from left to right, the lanes are added by shuffles.
#ifndef QM_LINEAR_FLOAT_CUH
#define QM_LINEAR_FLOAT_CUH

struct Half {
  unsigned short bits;
};
struct Brain {
  unsigned short bits;
};

// Column i of the 16 bytes of a row; an int8 without the conversion unit.
__device__ __forceinline__ float weight_at(const unsigned int (&words)[4], int i, signed char) {
  return qm_i8_to_f32(words[i / 4] >> (8 * (i % 4)));
}
__device__ __forceinline__ float weight_at(const unsigned int (&words)[4], int i, Half) {
  const unsigned short half = static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)));
#ifdef QM_EMULATED
  return emulated_half(half);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#endif
}
__device__ __forceinline__ float weight_at(const unsigned int (&words)[4], int i, Brain) {
  const unsigned int word = words[i / 2];
  return qm_from_bits(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

template <typename T, int TOKENS>
__global__ void __launch_bounds__(512, 1)
    linear_rows(const float* __restrict__ x,             // (tokens, k), rows x_stride apart
                const unsigned char* __restrict__ weight,  // (rows, k) of T
                const float* __restrict__ weight_scale,  // (rows,) or null
                const float* __restrict__ bias,          // (rows,) or null
                float* __restrict__ out,                 // (tokens, rows)
                long long x_stride, int tokens, int rows, int k) {
  constexpr int kWarp = 32, kRows = 4;
  constexpr int kColumns = 16 / static_cast<int>(sizeof(T));  // of a lane
  constexpr int kSpan = kWarp * kColumns;
  extern __shared__ float4 held[];  // (TOKENS, spans, kColumns / 4, 32)
  const int spans = (k + kSpan - 1) / kSpan;
  const int lane = threadIdx.x % kWarp;
  const int first = blockIdx.y * TOKENS;
  float* flat = reinterpret_cast<float*>(held);
  for (int t = 0; t < TOKENS; ++t) {
    const float* row = x + min(first + t, tokens - 1) * x_stride;
    for (int c = threadIdx.x; c < spans * kSpan; c += blockDim.x) {
      const int owner = c % kSpan / kColumns, piece = c % kColumns / 4;
      flat[(((t * spans + c / kSpan) * (kColumns / 4) + piece) * kWarp + owner) * 4 + c % 4] = c < k ? row[c] : 0.0f;
    }
  }
  __syncthreads();

  const int warps = gridDim.x * (blockDim.x / kWarp);
  for (int row = (blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp) * kRows; row < rows; row += warps * kRows) {
    float acc[kRows][TOKENS] = {};
    for (int s = 0; s < spans; ++s) {
      const int column = s * kSpan + lane * kColumns;
      unsigned int words[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const long long offset = (static_cast<long long>(min(row + r, rows - 1)) * k + column) * sizeof(T);
        const uint4 read =
            column < k ? __ldg(reinterpret_cast<const uint4*>(weight + offset)) : make_uint4(0u, 0u, 0u, 0u);
        words[r][0] = read.x;
        words[r][1] = read.y;
        words[r][2] = read.z;
        words[r][3] = read.w;
      }
#pragma unroll
      for (int piece = 0; piece < kColumns / 4; ++piece) {
        float w[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) w[r][i] = weight_at(words[r], piece * 4 + i, T());
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          const float4 v = held[((t * spans + s) * (kColumns / 4) + piece) * kWarp + lane];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            acc[r][t] = fmaf(v.x, w[r][0], acc[r][t]);
            acc[r][t] = fmaf(v.y, w[r][1], acc[r][t]);
            acc[r][t] = fmaf(v.z, w[r][2], acc[r][t]);
            acc[r][t] = fmaf(v.w, w[r][3], acc[r][t]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float sum = acc[r][t];
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0 && row + r < rows && first + t < tokens) {
          if (weight_scale != nullptr) sum = sum * weight_scale[row + r];
          if (bias != nullptr) sum = sum + bias[row + r];
          out[static_cast<long long>(first + t) * rows + row + r] = sum;
        }
      }
    }
  }
}

#endif
