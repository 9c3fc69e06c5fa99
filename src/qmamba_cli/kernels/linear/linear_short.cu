// int8 products of many tokens with few columns, as dt_proj is, on Hopper's tensor cores: linear.cu's sums, and its outputs
// where all are int8. Outputs are most of the bytes.
//
// A block takes 64 GROUPS tokens and a share of the weight's rows. Four warpgroups keep 64 tokens each in their registers;
// those with the same tokens take turns with the stages. One thread of a fifth asks for BN rows a stage, as many stages
// ahead as fit into shared memory; with `overlap` the first while the kernel before still runs, so that what the weight
// and its scales hold must be older than that.
//
//   block     tokens blockIdx.x / parts, share blockIdx.x % parts of the rows
//   stage     BN rows in pieces of 128 columns, zeros behind the last, in the order of linear_sixteens.cuh; elsewhere
//             their scales
//
// Limits: rows a multiple of BN; columns a multiple of 16, at most 32 STEPS; rows of x and of the weight begin on 16-byte
// boundaries. Source: ours.
#include "numerics.cuh"
#include "barriers.cuh"
#include "linear_wgmma.cuh"
#include "linear_sixteens.cuh"
#include "overlap.cuh"

constexpr int WARPGROUPS = 4, WARPS = 4, THREADS = (WARPGROUPS + 1) * GROUP_THREADS, STEP = 32;

// short.py counts the same.
template <int STEPS, int BN>
struct Stage {
  static constexpr int PIECES = (STEPS * STEP + TILE_COLUMNS - 1) / TILE_COLUMNS, PIECE_BYTES = BN * TILE_COLUMNS;
  static constexpr int BYTES = PIECES * PIECE_BYTES, SCALE_BYTES = BN * 4;
  static constexpr int COUNT = 6;
};

struct Places {
  unsigned int stages, scales, full, empty;
};

// The rows of a block, in stages.
struct Share {
  int first, count;
};

// One thread.
template <int STEPS, int BN>
__device__ __forceinline__ void copy_operands(const Places& at, const TensorMap& weight, const float* scale, Share share) {
  using S = Stage<STEPS, BN>;
  int stage = 0;
  unsigned int parity = 1;  // the first wait for an empty stage passes
#pragma unroll 1
  for (int i = 0; i < share.count; i++) {
    wait_for(at.empty + 8 * stage, parity);
    const int row = (share.first + i) * BN;
    const unsigned int to = at.stages + stage * S::BYTES, barrier = at.full + 8 * stage;
    arrive_expecting(barrier, S::BYTES + S::SCALE_BYTES);
#pragma unroll
    for (int piece = 0; piece < S::PIECES; piece++) {
#pragma unroll
      for (int block = 0; block < BN / BLOCK_ROWS; block++) {
        copy_rows(to + piece * S::PIECE_BYTES + block * BLOCK_BYTES, weight, piece * TILE_COLUMNS,
                  row + block * BLOCK_ROWS, barrier);
      }
    }
    copy_bytes(at.scales + stage * S::SCALE_BYTES, scale + row, S::SCALE_BYTES, barrier);
    if (++stage == S::COUNT) stage = 0, parity ^= 1u;
  }
}

// A lane's words of tokens `token` and token + 8, as multiply_own has them.
template <int STEPS>
__device__ __forceinline__ void load_tokens(unsigned int (&a)[STEPS][4], const signed char* x, long long x_stride,
                                            int token, int tokens, int k, int q) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int own = token + i % 2 * 8, column = step * STEP + i / 2 * 16 + 4 * q;
      a[step][i] = own < tokens && column < k
                       ? *reinterpret_cast<const unsigned int*>(x + own * x_stride + column)
                       : 0u;
    }
  }
}

template <int BLOCKS, int SUMS>
__device__ __forceinline__ void store_codes(const Codes& to, const int (&acc)[SUMS], unsigned int scales, int token,
                                            int row) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    float4 own[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(own[i].x), "=f"(own[i].y), "=f"(own[i].z), "=f"(own[i].w)
                   : "r"(scales + block * BLOCK_ROWS * 4 + i * 16));
    }
    round_and_store(to, acc, block * BLOCK_SUMS, own, token, row + block * BLOCK_ROWS);
  }
}

// A multiplying warpgroup, PHASES of which have the same tokens.
template <int STEPS, int BN, int PHASES>
__device__ __forceinline__ void multiply_and_store(const Places& at, const unsigned int (&a)[STEPS][4], const Codes& to,
                                                   Share share, int phase, int token) {
  using S = Stage<STEPS, BN>;
  const int lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll 1
  for (int i = phase; i < share.count; i += PHASES) {
    const int stage = i % S::COUNT;
    wait_for(at.full + 8 * stage, i / S::COUNT & 1);
    const unsigned int rows = at.stages + stage * S::BYTES;
    int acc[BN / 2];
    begin_products();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      // 32 columns are 32 bytes, two units of a descriptor.
      const unsigned long long b = matrix_descriptor(rows + step / 4 * S::PIECE_BYTES) + step % 4 * 2;
      multiply_own(acc, a[step], b, step);
    }
    commit_products();
    wait_for_products<0>();
    store_codes<BN / BLOCK_ROWS>(to, acc, at.scales + stage * S::SCALE_BYTES + q * LANE_ROWS * 4, token,
                                 (share.first + i) * BN + q * LANE_ROWS);
    __syncwarp();
    if (lane == 0) arrive(at.empty + 8 * stage);
  }
}

// grid.x: `parts` blocks for each 64 GROUPS tokens.
template <int STEPS, int GROUPS, int BN>
__global__ void __launch_bounds__(THREADS, 1)
    linear_short(const __grid_constant__ TensorMap weight, const signed char* __restrict__ x,
                 const float* __restrict__ weight_scale, signed char* __restrict__ codes, float x_scale,
                 float inv_out_scale, long long x_stride, int tokens, int rows, int k, int parts) {
  using S = Stage<STEPS, BN>;
  constexpr int PHASES = WARPGROUPS / GROUPS;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) unsigned long long barriers[2 * S::COUNT];
  Places at;
  at.full = shared_address(barriers), at.empty = at.full + 8 * S::COUNT;
  at.stages = (shared_address(shared) + 1023u) & ~1023u, at.scales = at.stages + S::COUNT * S::BYTES;
  if (threadIdx.x == 0) make_ring<S::COUNT>(at.full, at.empty, GROUPS * WARPS);
  __syncthreads();
  const int part = blockIdx.x % parts, group = threadIdx.x / GROUP_THREADS, all = rows / BN;
  Share share;
  share.first = all * part / parts, share.count = all * (part + 1) / parts - share.first;
  if (group == WARPGROUPS) {
    give_registers<24>();
    if (threadIdx.x % GROUP_THREADS == 0) copy_operands<STEPS, BN>(at, weight, weight_scale, share);
  } else {
    take_registers<112>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP_THREADS / 32;
    const int token = (blockIdx.x / parts * GROUPS + group % GROUPS) * GROUP_TOKENS + warp * 16 + lane / 4;
    wait_for_producers();
    unsigned int a[STEPS][4];
    load_tokens<STEPS>(a, x, x_stride, token, tokens, k, lane % 4);
    const Codes to = {codes, x_scale, inv_out_scale, tokens, rows};
    multiply_and_store<STEPS, BN, PHASES>(at, a, to, share, group / GROUPS, token);
  }
}
