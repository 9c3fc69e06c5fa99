// Embedding rows, and the inverse Hadamard transform with a gain.
//
//   embedding   out[i, :] = float32(table[ids[i], :]) * scale[ids[i]]      no scale: 1
//   unrotate    out[r, :] = (H^T x[r, :]) / sqrt(n) * gain                 one block a Hadamard block of n elements
//
// embedding: one block a token, threads along the row. An id outside the table gives a row of NaN, which no later
// step can hide.
//
// unrotate: H = H_K ⊗ S, K slowest. The block's elements lie in shared memory; S, Sylvester's matrix of order n / K,
// is applied in place by butterflies, level after level, then H_K^T element by element:
//
//   y[i, s] = sum_j core[j, i] * v[j, s]       j from 0 to K - 1
//
// Sums are float32; the factor 1 / sqrt(n) and the gain are multiplied last. A row's bits do not depend on the others.
// Limits: n floats fit in shared memory. Source: ours.
#include "numerics.cuh"

struct Half {
  unsigned short bits;
};
struct Brain {
  unsigned short bits;
};

__device__ __forceinline__ float real(signed char q) {
  return qm_i8_to_f32(static_cast<unsigned char>(q));
}
__device__ __forceinline__ float real(float x) { return x; }
__device__ __forceinline__ float real(Brain x) { return qm_from_bits(static_cast<unsigned int>(x.bits) << 16); }
__device__ __forceinline__ float real(Half x) {
#ifdef QM_EMULATED
  return emulated_half(x.bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#endif
}

template <typename T>
__global__ void embedding(const long long* ids,             // (tokens,)
                          const T* __restrict__ table,      // (rows, width)
                          const float* __restrict__ scale,  // (rows,) real units a step, or null
                          float* out,                       // (tokens, width)
                          int rows, int width) {
  const long long token = blockIdx.x;
  const long long id = ids[token];
  const bool known = id >= 0 && id < rows;
  const float factor = !known ? qm_from_bits(0x7fffffffu) : scale == nullptr ? 1.0f : scale[id];
  const T* row = table + (known ? id : 0) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) out[token * width + i] = real(row[i]) * factor;
}

__global__ void unrotate(const float* x,                   // (blocks, core_order << bits)
                         const float* __restrict__ gain,   // (blocks_a_row * core_order << bits,) or null
                         const unsigned int* __restrict__ core,  // (core_order, words) bit j % 32 of word j / 32 of
                                                                 // row i: entry (j, i) is -1
                         float* out, int core_order, int bits, int blocks_a_row, float norm) {
  extern __shared__ float held[];  // the elements, then the core
  const int order = core_order << bits, words = (core_order + 31) / 32;
  unsigned int* signs = reinterpret_cast<unsigned int*>(held + order);
  for (int i = threadIdx.x; i < core_order * words; i += blockDim.x) signs[i] = core[i];
  const long long base = static_cast<long long>(blockIdx.x) * order;
  for (int i = threadIdx.x; i < order; i += blockDim.x) held[i] = x[base + i];
  for (int level = 0; level < bits; level++) {
    const int half = 1 << level;
    __syncthreads();
    for (int pair = threadIdx.x; pair < order / 2; pair += blockDim.x) {
      const int low = pair >> level << (level + 1) | (pair & (half - 1));
      const float a = held[low], b = held[low + half];
      held[low] = a + b;
      held[low + half] = a - b;
    }
  }
  __syncthreads();
  const long long column = static_cast<long long>(blockIdx.x % blocks_a_row) * order;
  for (int e = threadIdx.x; e < order; e += blockDim.x) {
    float sum = held[e];
    if (core_order > 1) {
      const unsigned int* row = signs + (e >> bits) * words;
      const float* v = held + (e & ((1 << bits) - 1));
      sum = 0.0f;
      for (int first = 0; first < core_order; first += 32) {
        unsigned int negative = row[first / 32];
#pragma unroll 4
        for (int j = first; j < min(first + 32, core_order); ++j, negative >>= 1) {
          const float entry = v[j << bits];
          sum += negative & 1u ? -entry : entry;
        }
      }
    }
    const float y = sum * norm;
    out[base + e] = gain == nullptr ? y : y * gain[column + e];
  }
}
