// From the residual behind the last block to what the head reads; include numerics.cuh, hadamard.cuh and decode_ptx.cuh
// first.
#ifndef QM_DECODE_ENDS_WAY_CUH
#define QM_DECODE_ENDS_WAY_CUH

constexpr int WARP = 32;
constexpr unsigned int ALL_LANES = 0xffffffffu;

// A row between its last block and the head: the norm, then back to the basis of the tables. All but `row` lies in
// shared memory.
struct Way {
  const float* gain;     // (d,) or null
  const float* core;     // (K, K) rows of H_K^T; none where K is 1
  float* turned;         // (d,) scratch
  float* partial;        // (8,) scratch
  int d, bits;           // d = K << bits
  int threads;           // that take the norm, as rms_norm's
  float eps, unit;       // unit: 1 / sqrt(d)
};
constexpr int KEPT = 4;          // vectors of four a thread
constexpr int COLUMN_BITS = 7;   // levels of S that a warp makes without its neighbours

// H_K^T over the rows of 2^low columns of (K << HI, 2^low) floats, after the levels of S that lie across rows. Outputs
// are shared among the groups of 2^low threads.
template <int K, int HI, typename Store>
__device__ __forceinline__ void turn_columns(const Way& way, int low, const Store& store) {
  constexpr int H = 1 << HI, N = K * H;
  const int column = threadIdx.x & ((1 << low) - 1), group = threadIdx.x >> low, groups = blockDim.x >> low;
  float v[N];
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = way.turned[(j << low) + column];
  sylvester<N, 1, H>(v);
#pragma unroll
  for (int h = 0; h < H; h++) {
    if constexpr (K == 1) {
      if (h % groups == group) store((h << low) + column, v[h]);
    } else {
      // Few instructions, since all of them come from memory: the code runs once a token.
#pragma unroll 1
      for (int i = group; i < K; i += groups) {
        const float4* signs = reinterpret_cast<const float4*>(way.core + i * K);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < K; k += 4) {
          const float4 four = signs[k / 4];  // products with 1 and -1 are exact
          sum = fmaf(v[k * H + h], four.x, sum);
          sum = fmaf(v[(k + 1) * H + h], four.y, sum);
          sum = fmaf(v[(k + 2) * H + h], four.z, sum);
          sum = fmaf(v[(k + 3) * H + h], four.w, sum);
        }
        store(((i * H + h) << low) + column, sum);
      }
    }
  }
}

// `store` takes a column of the row and its value.
template <int K, typename Store>
__device__ __forceinline__ void normalize_and_turn(const float* row, const Way& way, const Store& store) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, vectors = way.d / 4;
  const int low = min(way.bits, COLUMN_BITS);
  float4* turned = reinterpret_cast<float4*>(way.turned);
  if (static_cast<int>(threadIdx.x) < way.threads) {  // whole warps
    float4 kept[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
      const int at = threadIdx.x + i * way.threads;
      if (at < vectors) kept[i] = load_fresh(reinterpret_cast<const float4*>(row) + at);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
      const int at = threadIdx.x + i * way.threads;
      if (at < vectors) {
        const float4& x = kept[i];
        sum = fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
        turned[at] = x;
      }
    }
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (lane == 0) way.partial[warp] = sum;
  }
  __syncthreads();
  float total = way.partial[0];
#pragma unroll 1
  for (int i = 1; i < way.threads / WARP; i++) total += way.partial[i];
  const float factor = 1.0f / sqrtf(total / static_cast<float>(way.d) + way.eps);
#pragma unroll 1
  for (int at = threadIdx.x; at < vectors; at += blockDim.x) {  // whole warps
    const float4 x = turned[at];
    float v[4] = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
    sylvester<4>(v);
#pragma unroll
    for (int level = 2; level < COLUMN_BITS; level++) {
      if (level >= low) break;
      const int distance = 1 << (level - 2);
      const float sign = (lane & distance) ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = fmaf(v[j], sign, __shfl_xor_sync(ALL_LANES, v[j], distance));
    }
    turned[at] = make_float4(v[0], v[1], v[2], v[3]);
  }
  __syncthreads();
  const auto finish = [&](int column, float sum) {
    const float y = sum * way.unit;
    store(column, way.gain == nullptr ? y : y * way.gain[column]);
  };
  if constexpr (K > 1) {
    if (K > 16 || way.bits <= COLUMN_BITS) return turn_columns<K, 0>(way, low, finish);
    return turn_columns<K, K <= 16 ? 1 : 0>(way, low, finish);
  } else {
    switch (way.bits - low) {
      case 0: return turn_columns<K, 0>(way, low, finish);
      case 1: return turn_columns<K, 1>(way, low, finish);
      case 2: return turn_columns<K, 2>(way, low, finish);
      case 3: return turn_columns<K, 3>(way, low, finish);
      case 4: return turn_columns<K, 4>(way, low, finish);
      default: return turn_columns<K, 5>(way, low, finish);
    }
  }
}

// Asks for what the way needs of constants, each array of whole 16 bytes, and lays out its scratch.
template <int K>
__device__ __forceinline__ Way begin_way(Carver& carver, const float* gain, const float* core, int d, int bits,
                                         int threads, float eps, float unit) {
  float* gains = carver.take<float>(gain == nullptr ? 0 : d);
  float* cores = carver.take<float>(K > 1 ? K * K : 0);
  Way way{gain == nullptr ? nullptr : gains, cores, carver.take<float>(d), carver.take<float>(8), d, bits, threads, eps,
          unit};
  if (gain != nullptr) {
    for (int at = 4 * threadIdx.x; at < d; at += 4 * blockDim.x) copy16(gains + at, gain + at);
  }
  if constexpr (K > 1) {
    for (int at = 4 * threadIdx.x; at < K * K; at += 4 * blockDim.x) copy16(cores + at, core + at);
  }
  commit_copies();
  return way;
}

#endif
