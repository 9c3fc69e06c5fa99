// Root-mean-square normalization of rows, after an addition where there is a delta; then the int8 grid where Out is
// signed char.
//
//   x[row, i] = residual[row, i] + delta[row, i]                                  (kept as `sum`, where delta is given)
//   y[row, i] = x[row, i] / sqrt(mean(x[row]^2) + eps) * weight[i]
//   out       = saturate(round_half_even(y * inv_scale))                          (Out = signed char)
//
// Shapes   residual (rows, d) float, delta (rows, d) Delta or null, weight (d,) float or null, sum (rows, d) float, out
//          (rows, d) Out; row-major. Delta: float, F16, BF16, Nothing; Out: floats or signed char. V = 4 needs
//          d % 4 == 0 and 16-byte alignment (halves and bytes: of four elements), V = 1 takes any d.
// Mapping  one block a row. Thread t owns the vectors t, t + T, t + 2T, ... of V neighbours; the first KEPT of them
//          stay in registers between the sum and the product, later ones are read and added again.
// Numerics fp32. Each thread sums its squares in order (fused), lanes of a warp are summed by a butterfly, warps in
//          order: the result depends on d, T and V only. Division and square root are IEEE. Compiled with
//          -fmad=false.
// Limits   T a multiple of 32, at most 256; d < 2^31.
// Source   Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
#include "numerics.cuh"
#include "half.cuh"
#include "overlap.cuh"

constexpr int MAX_THREADS = 256;
constexpr int WARP = 32;
constexpr int KEPT = 4;

// V neighbours.
template <int V, typename T>
struct alignas(V * sizeof(T)) Vector {
  T value[V];
};

// What stands for the type of a delta where there is none.
struct Nothing {
  char none;
};
template <typename Delta> constexpr bool ADDS = true;
template <> constexpr bool ADDS<Nothing> = false;

// V values onto the output's grid.
template <int V>
__device__ __forceinline__ void finish(const Vector<V, float>& y, float inv_scale, Vector<V, signed char>& out) {
  if constexpr (V == 4) {
    const float* v = y.value;
    *reinterpret_cast<unsigned int*>(out.value) =
        qm_four_bytes(v[0] * inv_scale, v[1] * inv_scale, v[2] * inv_scale, v[3] * inv_scale);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) out.value[i] = qm_quantize(y.value[i], inv_scale);
  }
}
template <int V, typename Out>
__device__ __forceinline__ void finish(const Vector<V, float>& y, float, Vector<V, Out>& out) {
#pragma unroll
  for (int i = 0; i < V; i++) narrow(y.value[i], out.value[i]);
}

// Sum over the block, the same bits in every thread.
__device__ __forceinline__ float block_sum(float sum) {
  __shared__ float warp_sums[MAX_THREADS / WARP];
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  // Unrolled, so that all are on the way at once; a zero changes no sum.
  float total = warp_sums[0];
#pragma unroll
  for (int warp = 1; warp < MAX_THREADS / WARP; warp++) total += warp < blockDim.x / WARP ? warp_sums[warp] : 0.0f;
  return total;
}

template <int V>
__device__ __forceinline__ float add_squares(float sum, const Vector<V, float>& x) {
#pragma unroll
  for (int i = 0; i < V; i++) sum = fmaf(x.value[i], x.value[i], sum);
  return sum;
}

template <int V, typename Delta>
__device__ __forceinline__ Vector<V, float> load(const Vector<V, float>* row, const Vector<V, Delta>* delta, int at) {
  Vector<V, float> x = row[at];
  if constexpr (ADDS<Delta>) {
    const Vector<V, Delta> more = delta[at];
#pragma unroll
    for (int i = 0; i < V; i++) x.value[i] += widen(more.value[i]);
  }
  return x;
}

template <int V, typename Out>
__device__ __forceinline__ void store(Vector<V, Out>* out, const Vector<V, float>* weight, int at,
                                      const Vector<V, float>& x, float factor, float inv_scale) {
  Vector<V, float> gain;
  if (weight != nullptr) gain = weight[at];
  Vector<V, float> y;
#pragma unroll
  for (int i = 0; i < V; i++) {
    y.value[i] = x.value[i] * factor;
    if (weight != nullptr) y.value[i] *= gain.value[i];
  }
  Vector<V, Out> result;
  finish<V>(y, inv_scale, result);
  out[at] = result;
}

// Grid: one block a row.
template <int V, typename Delta, typename Out>
__global__ void __launch_bounds__(MAX_THREADS)
    rms_norm(const float* __restrict__ residual,  // (rows, d)
             const Delta* __restrict__ delta,     // (rows, d); null if Delta is Nothing
             const float* __restrict__ weight,    // (d,) or null
             float* __restrict__ added,           // (rows, d): residual + delta; null without delta
             Out* __restrict__ out,               // (rows, d)
             int d, float eps,
             float inv_scale) {                   // steps a real unit; unused for float outputs
  release_dependents();
  wait_for_producers();
  const long long start = static_cast<long long>(blockIdx.x) * d;
  const auto* row = reinterpret_cast<const Vector<V, float>*>(residual + start);
  const auto* more = reinterpret_cast<const Vector<V, Delta>*>(delta + start);
  const auto* gains = reinterpret_cast<const Vector<V, float>*>(weight);
  auto* sums = reinterpret_cast<Vector<V, float>*>(added + start);
  auto* target = reinterpret_cast<Vector<V, Out>*>(out + start);
  const int vectors = d / V;
  const int t = threadIdx.x, threads = blockDim.x;
  Vector<V, float> kept[KEPT];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    if (t + i * threads < vectors) kept[i] = load<V, Delta>(row, more, t + i * threads);
  }
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int at = t + i * threads;
    if (at >= vectors) continue;
    if (ADDS<Delta>) sums[at] = kept[i];
    sum = add_squares<V>(sum, kept[i]);
  }
  // Counted in 64 bits: the last step may pass 2^31.
  for (long long at = t + KEPT * threads; at < vectors; at += threads) {
    const Vector<V, float> x = load<V, Delta>(row, more, static_cast<int>(at));
    if (ADDS<Delta>) sums[at] = x;
    sum = add_squares<V>(sum, x);
  }
  const float factor = 1.0f / sqrtf(block_sum(sum) / static_cast<float>(d) + eps);
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int at = t + i * threads;
    if (at < vectors) store<V, Out>(target, gains, at, kept[i], factor, inv_scale);
  }
  for (long long at = t + KEPT * threads; at < vectors; at += threads) {
    const int i = static_cast<int>(at);
    store<V, Out>(target, gains, i, load<V, Delta>(row, more, i), factor, inv_scale);
  }
}
