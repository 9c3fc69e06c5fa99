// Index of the largest value of each row.
//
//   out[r] = the smallest i with x[r, i] >= x[r, j] for all j; NaN counts as larger than any number
//
// Mapping  one block a row, threads along it, AHEAD vectors of V values on their way in each, compared by argmax_key.cuh.
//          V = 4 needs rows that start at multiples of 16 bytes and n % 4 == 0.
// Limits   a row of less than 2^31 values, 1024 threads. Source: ours.
#include "numerics.cuh"
#include "argmax_key.cuh"

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr int AHEAD = 7;

template <int V>
struct alignas(4 * V) Vector {
  float value[V];
};

template <int V>
__global__ void __launch_bounds__(MAX_THREADS)
    argmax(const float* x,  // (rows, n), rows `stride` apart
           long long* out,  // (rows,)
           long long stride, int n) {
  __shared__ unsigned long long of_warps[MAX_THREADS / WARP];
  const auto* row = reinterpret_cast<const Vector<V>*>(x + blockIdx.x * stride);
  const int vectors = n / V;
  unsigned long long best = 0ull;
  for (long long base = threadIdx.x; base < vectors; base += AHEAD * blockDim.x) {
    Vector<V> held[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const long long at = base + i * blockDim.x;
      if (at < vectors) held[i] = row[at];
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const long long at = base + i * blockDim.x;
#pragma unroll
      for (int j = 0; j < V; j++) {
        const unsigned long long key = at < vectors ? key_of(held[i].value[j], static_cast<int>(at) * V + j) : 0ull;
        best = key > best ? key : best;
      }
    }
  }
  best = largest_of_warp(best);
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = best;
  __syncthreads();
  if (threadIdx.x < WARP) {
    best = largest_of_warp(threadIdx.x < blockDim.x / WARP ? of_warps[threadIdx.x] : 0ull);
    if (threadIdx.x == 0) out[blockIdx.x] = index_of(best);
  }
}
