// int8 products of many tokens with few rows and many columns, as x_proj is, on Hopper's tensor cores: linear.cu's
// sums, and its outputs where all are int8.
//
// A cluster of PARTS blocks takes 64 tokens and all rows. Each block
//   1. multiplies its share of the columns: one warpgroup, and a warp one thread of which asks for the operands, 128
//      columns a stage, as many stages ahead as fit into shared memory;
//   2. sends its sums to the blocks that own them, and rounds its own: LANE_SUMS / PARTS sums of each lane.
//
//   stage     64 rows of x, then 64 BLOCKS of the weight in the order of linear_sixteens.cuh, 128 bytes each, swizzled;
//             zeros behind the last column, token and row
//   sums      (PARTS, sums of a lane in fours, 128 threads) of 16 bytes
//
// Limits: rows a multiple of 16, at most 64 BLOCKS; rows of x and of the weight begin on 16-byte boundaries. Source:
// ours.
#include "numerics.cuh"
#include "barriers.cuh"
#include "linear_wgmma.cuh"
#include "linear_sixteens.cuh"
#include "overlap.cuh"

constexpr int WARPS = 4, THREADS = GROUP_THREADS + 32;
constexpr int X_BYTES = GROUP_TOKENS * TILE_COLUMNS;

// narrow.py counts the same.
template <int BLOCKS, int PARTS>
struct Cut {
  static constexpr int LANE_SUMS = BLOCKS * BLOCK_SUMS, FOURS = LANE_SUMS / 4, OWN = FOURS / PARTS;
  static constexpr int STAGE_BYTES = X_BYTES + BLOCKS * BLOCK_BYTES, FOUR_BYTES = GROUP_THREADS * 16;
  static constexpr int STAGES = BLOCKS == 3 ? (PARTS == 1 ? 6 : 5) : 7;
};

struct Places {
  unsigned int stages, sums, full, empty;
};

// The columns of a block, in stages.
struct Share {
  int first, count;
};

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of the cluster arrives before any is past the wait; what it wrote before is then visible.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// One thread.
template <class C>
__device__ __forceinline__ void copy_operands(const Places& at, const TensorMap& x, const TensorMap& weight, int token,
                                              Share share) {
  constexpr int BLOCKS = (C::STAGE_BYTES - X_BYTES) / BLOCK_BYTES;
  int stage = 0;
  unsigned int parity = 1;  // the first wait for an empty stage passes
#pragma unroll 1
  for (int i = 0; i < share.count; i++) {
    wait_for(at.empty + 8 * stage, parity);
    const unsigned int to = at.stages + stage * C::STAGE_BYTES, barrier = at.full + 8 * stage;
    const int column = (share.first + i) * TILE_COLUMNS;
    arrive_expecting(barrier, C::STAGE_BYTES);
    copy_tile(to, x, column, token, barrier);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      copy_rows(to + X_BYTES + block * BLOCK_BYTES, weight, column, block * BLOCK_ROWS, barrier);
    }
    if (++stage == C::STAGES) stage = 0, parity ^= 1u;
  }
}

template <class C>
__device__ __forceinline__ void multiply_share(int (&acc)[C::LANE_SUMS], const Places& at, Share share) {
  const int lane = threadIdx.x % 32;
  int stage = 0, behind = 0;  // the stage whose products may still run
  unsigned int parity = 0;
#pragma unroll
  for (int i = 0; i < C::LANE_SUMS; i++) acc[i] = 0;
#pragma unroll 1
  for (int i = 0; i < share.count; i++) {
    wait_for(at.full + 8 * stage, parity);
    const unsigned int from = at.stages + stage * C::STAGE_BYTES;
    const unsigned long long a = matrix_descriptor(from), b = matrix_descriptor(from + X_BYTES);
    begin_products();
    // 32 columns are 32 bytes, two units of a descriptor.
#pragma unroll
    for (int k = 0; k < TILE_COLUMNS / 32; k++) multiply(acc, a + 2 * k, b + 2 * k, 1);
    commit_products();
    wait_for_products<1>();
    if (i > 0 && lane == 0) arrive(at.empty + 8 * behind);
    behind = stage;
    if (++stage == C::STAGES) stage = 0, parity ^= 1u;
  }
  wait_for_products<0>();
}

// Hands every block of the cluster the sums that it owns.
template <class C, int PARTS>
__device__ __forceinline__ void send_sums(const int (&acc)[C::LANE_SUMS], const Places& at, int rank) {
#pragma unroll
  for (int owner = 0; owner < PARTS; owner++) {
    unsigned int to;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(to)
                 : "r"(at.sums + rank * C::OWN * C::FOUR_BYTES + threadIdx.x * 16), "r"(owner));
#pragma unroll
    for (int i = 0; i < C::OWN; i++) {
      const int first = 4 * (owner * C::OWN + i);
      asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * C::FOUR_BYTES), "r"(acc[first]),
                   "r"(acc[first + 1]), "r"(acc[first + 2]), "r"(acc[first + 3])
                   : "memory");
    }
  }
}

// Sixteen of the own sums of a lane, from four number `four` on.
template <class C, int PARTS>
__device__ __forceinline__ void add_parts(int (&sum)[16], const Places& at, int four) {
#pragma unroll
  for (int i = 0; i < 16; i++) sum[i] = 0;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const unsigned int from = at.sums + (part * C::OWN + four + i) * C::FOUR_BYTES + threadIdx.x * 16;
      int v[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(from));
#pragma unroll
      for (int e = 0; e < 4; e++) sum[4 * i + e] += v[e];
    }
  }
}

// Scales of 4 WORDS rows.
template <int WORDS>
__device__ __forceinline__ void load_scales(float4 (&own)[WORDS], const float* scale, int row) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) own[i] = *reinterpret_cast<const float4*>(scale + row + 4 * i);
}

// grid.x: PARTS blocks for each 64 tokens; `steps` of 128 columns.
template <int BLOCKS, int PARTS>
__global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS, 1)
    linear_narrow(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                  const float* __restrict__ weight_scale, signed char* __restrict__ codes, float x_scale,
                  float inv_out_scale, int tokens, int rows, int steps) {
  using C = Cut<BLOCKS, PARTS>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) unsigned long long barriers[2 * C::STAGES];
  Places at;
  at.full = shared_address(barriers), at.empty = at.full + 8 * C::STAGES;
  at.stages = (shared_address(shared) + 1023u) & ~1023u, at.sums = at.stages + C::STAGES * C::STAGE_BYTES;
  if (threadIdx.x == 0) make_ring<C::STAGES>(at.full, at.empty, WARPS);
  __syncthreads();
  const int rank = PARTS == 1 ? 0 : cluster_rank(), first_token = blockIdx.x / PARTS * GROUP_TOKENS;
  Share share;
  share.first = steps * rank / PARTS, share.count = steps * (rank + 1) / PARTS - share.first;
  // Sums may be sent to a block that has begun, which the first meeting tells; the second one that all were sent.
  if constexpr (PARTS > 1) arrive_at_cluster();
  if (threadIdx.x >= GROUP_THREADS) {
    release_dependents();
    if (threadIdx.x == GROUP_THREADS) copy_operands<C>(at, x, weight, first_token, share);
    if constexpr (PARTS > 1) {
      __syncwarp();
      wait_for_cluster();
      arrive_at_cluster();
      wait_for_cluster();
    }
    return;
  }
  int acc[C::LANE_SUMS];
  multiply_share<C>(acc, at, share);
  release_dependents();
  const int lane = threadIdx.x % 32, lane_row = lane % 4 * LANE_ROWS;
  const int token = first_token + threadIdx.x / 32 * 16 + lane / 4;
  const Codes to = {codes, x_scale, inv_out_scale, tokens, rows};
  if constexpr (PARTS == 1) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      const int row = block * BLOCK_ROWS + lane_row;
      if (row >= rows) continue;
      float4 scales[4];
      load_scales(scales, weight_scale, row);
      round_and_store(to, acc, block * BLOCK_SUMS, scales, token, row);
    }
  } else {
    wait_for_cluster();
    send_sums<C, PARTS>(acc, at, rank);
    arrive_at_cluster();
    wait_for_cluster();
#pragma unroll
    for (int four = 0; four < C::OWN; four += 4) {
      // Eight rows a lane.
      const int eight = (rank * C::OWN + four) / 4, row = eight / 2 * BLOCK_ROWS + lane_row + eight % 2 * 8;
      if (row >= rows) continue;
      int sum[16];
      add_parts<C, PARTS>(sum, at, four);
      float4 scales[2];
      load_scales(scales, weight_scale, row);
      round_and_store(to, sum, 0, scales, token, row);
    }
  }
}
