// Root-mean-square normalization of rows, then the int8 grid where Out is signed char.
//
//   y[row, i] = x[row, i] / sqrt(mean(x[row]^2) + eps) * weight[i]
//   out       = saturate(round_half_even(y * inv_scale))                          (Out = signed char)
//
// Shapes   x (rows, d) float, weight (d,) float or null, out (rows, d) Out; row-major. V = 4 needs d % 4 == 0 and
//          16-byte alignment, V = 1 takes any d.
// Mapping  one block a row. Thread t owns the vectors t, t + T, t + 2T, ... of V neighbours; the first KEPT of them
//          stay in registers between the sum and the product, later ones are read again.
// Numerics fp32. Each thread sums its squares in order (fused), lanes of a warp are summed by a butterfly, warps in
//          order: the result depends on d, T and V only. Division and square root are IEEE. Compiled with
//          -fmad=false.
// Limits   T a multiple of 32, at most 256; d < 2^31.
// Source   Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
#include "numerics.cuh"

constexpr int MAX_THREADS = 256;
constexpr int WARP = 32;
constexpr int KEPT = 4;

template <int V>
struct alignas(V * sizeof(float)) Floats {
  float value[V];
};
template <int V, typename Out>
struct alignas(V * sizeof(Out)) Outputs {
  Out value[V];
};

__device__ __forceinline__ void narrow(float y, float, float& out) { out = y; }
__device__ __forceinline__ void narrow(float y, float inv_scale, signed char& out) { out = qm_quantize(y, inv_scale); }

// Sum over the block, the same bits in every thread.
__device__ __forceinline__ float block_sum(float sum) {
  __shared__ float warp_sums[MAX_THREADS / WARP];
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  float total = warp_sums[0];
  for (int warp = 1; warp < blockDim.x / WARP; warp++) total += warp_sums[warp];
  return total;
}

template <int V>
__device__ __forceinline__ float add_squares(float sum, const Floats<V>& x) {
#pragma unroll
  for (int i = 0; i < V; i++) sum = fmaf(x.value[i], x.value[i], sum);
  return sum;
}

template <int V, typename Out>
__device__ __forceinline__ void store(Outputs<V, Out>* out, const Floats<V>* weight, int at, const Floats<V>& x,
                                      float factor, float inv_scale) {
  Floats<V> gain;
  if (weight != nullptr) gain = weight[at];
  Outputs<V, Out> result;
#pragma unroll
  for (int i = 0; i < V; i++) {
    float y = x.value[i] * factor;
    if (weight != nullptr) y *= gain.value[i];
    narrow(y, inv_scale, result.value[i]);
  }
  out[at] = result;
}

// Grid: one block a row.
template <int V, typename Out>
__global__ void __launch_bounds__(MAX_THREADS)
    rms_norm(const float* __restrict__ x,       // (rows, d)
             const float* __restrict__ weight,  // (d,) or null
             Out* __restrict__ out,             // (rows, d)
             int d, float eps,
             float inv_scale) {                 // steps a real unit; unused for float output
  const long long start = static_cast<long long>(blockIdx.x) * d;
  const Floats<V>* row = reinterpret_cast<const Floats<V>*>(x + start);
  const Floats<V>* gains = reinterpret_cast<const Floats<V>*>(weight);
  Outputs<V, Out>* target = reinterpret_cast<Outputs<V, Out>*>(out + start);
  const int vectors = d / V;
  const int t = threadIdx.x, threads = blockDim.x;
  Floats<V> kept[KEPT];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    if (t + i * threads < vectors) kept[i] = row[t + i * threads];
  }
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    if (t + i * threads < vectors) sum = add_squares<V>(sum, kept[i]);
  }
  // Counted in 64 bits: the last step may pass 2^31.
  for (long long at = t + KEPT * threads; at < vectors; at += threads) sum = add_squares<V>(sum, row[at]);
  const float factor = 1.0f / sqrtf(block_sum(sum) / static_cast<float>(d) + eps);
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int at = t + i * threads;
    if (at < vectors) store<V, Out>(target, gains, at, kept[i], factor, inv_scale);
  }
  for (long long at = t + KEPT * threads; at < vectors; at += threads) {
    store<V, Out>(target, gains, static_cast<int>(at), row[at], factor, inv_scale);
  }
}
