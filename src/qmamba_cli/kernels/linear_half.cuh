// Products of one 16-bit token with 16-bit weight rows: a decode step of a float model.
//
//   y[m] = sum_k x[k] * weight[m, k] + bias[m]     summed in float32, rounded to 16 bits once
//   out  = y, or residual[m] + y                   float32 where there is a residual
//
// A row belongs to one warp, or to SPLIT warps of a block where rows are few. A lane owns every 32nd piece of 8 columns
// of its warp, adds even and odd columns apart from left to right, then both; lanes are added by a butterfly, warps in
// order. The first rows are on their way before the kernel waits for the token, and each next part of them while one is
// summed.
#ifndef QM_LINEAR_HALF_CUH
#define QM_LINEAR_HALF_CUH

constexpr int HALF_MOST_THREADS = 768;

// A part of ROWS rows as a lane holds it.
template <int ROWS, int PIECES>
struct RowPart {
  uint4 words[ROWS][PIECES];

  // Pieces first, first + stride, ... below `pieces`, of rows below `rows`; zeros elsewhere.
  __device__ __forceinline__ void load(const uint4* weight, int row, int rows, int first, int stride, int pieces) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const int piece = first + p * stride;
        words[r][p] = row + r < rows && piece < pieces
                          ? __ldg(weight + static_cast<long long>(row + r) * pieces + piece)
                          : make_uint4(0u, 0u, 0u, 0u);
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ float2 pair_of(unsigned int word) {
  const unsigned int words[4] = {word, 0u, 0u, 0u};
  return make_float2(weight_at(words, 0, T()), weight_at(words, 1, T()));
}

template <typename T>
__device__ __forceinline__ void add_products(float2& sum, const uint4& weight, const uint4& token) {
  const unsigned int w[4] = {weight.x, weight.y, weight.z, weight.w};
  const unsigned int t[4] = {token.x, token.y, token.z, token.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 a = pair_of<T>(w[i]), b = pair_of<T>(t[i]);
    sum.x = fmaf(a.x, b.x, sum.x);
    sum.y = fmaf(a.y, b.y, sum.y);
  }
}

__device__ __forceinline__ void narrow_to(float y, Half& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(y));
}
__device__ __forceinline__ void narrow_to(float y, Brain& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(y));
}

// Grid: blocks of whole warps, a multiple of SPLIT; rows are dealt out in turn. k is a multiple of 8, all 16-byte aligned.
template <typename T, int ROWS, int PIECES, int SPLIT>
__global__ void __launch_bounds__(HALF_MOST_THREADS, 1)
    linear_halves(const uint4* x,                       // (k,) of T
                  const uint4* __restrict__ weight,     // (rows, k) of T
                  const float* __restrict__ bias,       // (rows,) or null
                  const float* residual,                // (rows,) or null
                  T* half, float* real,                 // (rows,): real where there is a residual, else half
                  int rows, int k) {
  constexpr int WARP = 32;
  extern __shared__ uint4 token[];  // (k / 8,), then a float a warp
  const int pieces = k / 8, warps = blockDim.x / WARP, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int owner = blockIdx.x * (warps / SPLIT) + warp / SPLIT, owners = gridDim.x * (warps / SPLIT);
  const int stride = WARP * SPLIT, start = warp % SPLIT * WARP + lane, part_pieces = PIECES * stride;
  int row = owner * ROWS, first = start;
  RowPart<ROWS, PIECES> next;
  next.load(weight, row, rows, first, stride, pieces);
  release_dependents();
  wait_for_producers();
  for (int piece = threadIdx.x; piece < pieces; piece += blockDim.x) token[piece] = x[piece];
  __syncthreads();

  float* warp_sums = reinterpret_cast<float*>(token + pieces);
  float2 sums[ROWS] = {};
  // All warps of a block take as many turns, since they meet in each where they share rows.
  const int last = SPLIT > 1 ? (blockIdx.x * (warps / SPLIT)) * ROWS : row;
  for (int lead = last; lead < rows;) {
    const RowPart<ROWS, PIECES> now = next;
    const int at = first, row_now = row;
    first += part_pieces;
    const bool ends = first - start >= pieces;
    if (ends) first = start, row += owners * ROWS, lead += owners * ROWS;
    next.load(weight, row, rows, first, stride, pieces);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int piece = at + p * stride;
      if (piece < pieces) {
        const uint4 columns = token[piece];
#pragma unroll
        for (int r = 0; r < ROWS; r++) add_products<T>(sums[r], now.words[r][p], columns);
      }
    }
    if (!ends) continue;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float sum = sums[r].x + sums[r].y;
      sums[r] = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if constexpr (SPLIT > 1) {
        if (lane == 0) warp_sums[warp] = sum;
        __syncthreads();
        sum = warp_sums[warp / SPLIT * SPLIT];
#pragma unroll
        for (int i = 1; i < SPLIT; i++) sum += warp_sums[warp / SPLIT * SPLIT + i];
        __syncthreads();
      }
      const int m = row_now + r;
      if (lane != 0 || warp % SPLIT != 0 || m >= rows) continue;
      if (bias != nullptr) sum += bias[m];
      T y;
      narrow_to(sum, y);
      if (residual == nullptr) {
        half[m] = y;
      } else {
        const unsigned int words[4] = {y.bits, 0u, 0u, 0u};
        real[m] = residual[m] + weight_at(words, 0, T());
      }
    }
  }
}

#endif
