// int8 products of many tokens on Hopper's tensor cores, with the same sums and the same epilogue as linear.cu.
//
// A block of three warpgroups stays on its multiprocessor and takes tile after tile of 128 tokens and BN rows. One thread
// of the first warpgroup asks for the operands, 128 columns of both a stage, as many stages ahead as fit into shared
// memory. The two other warpgroups multiply, 64 tokens each; either runs its epilogue while the other goes on with the
// stages that are there.
//
//   tile      block, block + blocks, ...
//   order     GROUP tiles of tokens for each tile of rows, so that both stay in the second-level cache
//   stage     128 rows of x, then BN of the weight, 128 bytes each, swizzled as matrix_descriptor says; zeros behind
//             the last column, token and row. With LANES the weight's rows are in the order of linear_sixteens.cuh
//
// Limits: rows of x and of the weight begin on 16-byte boundaries. Source: ours.
#include "numerics.cuh"
#include "linear_mma.cuh"
#include "barriers.cuh"
#include "linear_wgmma.cuh"
#include "linear_sixteens.cuh"

constexpr int BM = 128, BK = 128, GROUP = 8;
constexpr int X_BYTES = BM * BK;
constexpr int THREADS = 3 * GROUP_THREADS, GROUP_ROWS = 64;

// wide.py counts the same.
template <int BN>
struct Tile {
  static constexpr int STAGE_BYTES = X_BYTES + BN * BK;
  static constexpr int STAGES = BN == 256 ? 4 : 6;
  static constexpr int SUMS = BN / 2;
};

struct Shape {
  int tokens, rows, steps, tiles, down, across;
};

template <int BN>
__device__ __forceinline__ void place(const Shape& s, int tile, int& token, int& row) {
  const int group = tile / (GROUP * s.across), first = group * GROUP;
  const int height = min(s.down - first, GROUP), inside = tile - group * GROUP * s.across;
  token = (first + inside % height) * BM;
  row = inside / height * BN;
}

// One thread.
template <int BN, bool LANES>
__device__ __forceinline__ void copy_operands(const Shape& s, const TensorMap& x, const TensorMap& weight,
                                              unsigned int stages, unsigned int full, unsigned int empty) {
  using T = Tile<BN>;
  int stage = 0;
  unsigned int parity = 1;  // the first wait for an empty stage passes
  for (int tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) {
    int token, row;
    place<BN>(s, tile, token, row);
    for (int step = 0; step < s.steps; step++) {
      wait_for(empty + 8 * stage, parity);
      const unsigned int to = stages + stage * T::STAGE_BYTES, barrier = full + 8 * stage;
      arrive_expecting(barrier, T::STAGE_BYTES);
      copy_tile(to, x, step * BK, token, barrier);
      if constexpr (LANES) {
#pragma unroll
        for (int block = 0; block < BN / BLOCK_ROWS; block++) {
          copy_rows(to + X_BYTES + block * BLOCK_BYTES, weight, step * BK, row + block * BLOCK_ROWS, barrier);
        }
      } else {
        copy_tile(to + X_BYTES, weight, step * BK, row, barrier);
      }
      if (++stage == T::STAGES) stage = 0, parity ^= 1u;
    }
  }
}

// 64 columns of one token: words[i] of a lane are columns 16 i + 2 q, + 1, + 8, + 9 of it, and become columns 16 q ... 16 q + 15.
__device__ __forceinline__ uint4 gather_columns(const unsigned int (&words)[4], int q) {
  constexpr unsigned int ALL = 0xffffffffu;
  const bool upper = q & 2, odd = q & 1;
  const unsigned int a = __shfl_xor_sync(ALL, upper ? words[0] : words[2], 2);
  const unsigned int b = __shfl_xor_sync(ALL, upper ? words[1] : words[3], 2);
  const unsigned int low0 = upper ? a : words[0], low1 = upper ? b : words[1];
  const unsigned int high0 = upper ? words[2] : a, high1 = upper ? words[3] : b;
  const unsigned int c = __shfl_xor_sync(ALL, odd ? low0 : low1, 1);
  const unsigned int d = __shfl_xor_sync(ALL, odd ? high0 : high1, 1);
  const unsigned int low = odd ? low1 : low0, high = odd ? high1 : high0;
  const unsigned int v0 = odd ? c : low, v1 = odd ? low : c, v2 = odd ? d : high, v3 = odd ? high : d;
  return make_uint4(__byte_perm(v0, v1, 0x5410), __byte_perm(v2, v3, 0x5410), __byte_perm(v0, v1, 0x7632),
                    __byte_perm(v2, v3, 0x7632));
}

// What `store` does, in the words of two neighbouring rows.
__device__ __forceinline__ float2 outputs(const Target& to, int row, int a, int b) {
  const float2 scale = *reinterpret_cast<const float2*>(to.weight_scale + row);
  float2 y = make_float2(__int2float_rn(a) * (scale.x * to.x_scale), __int2float_rn(b) * (scale.y * to.x_scale));
  if (to.bias != nullptr) {
    const float2 bias = *reinterpret_cast<const float2*>(to.bias + row);
    y = make_float2(y.x + bias.x, y.y + bias.y);
  }
  return y;
}

// The sums of a lane: tokens token and token + 8, rows row0 + 2 q + 8 j + {0, 1}.
template <int SUMS>
__device__ __forceinline__ void store_codes(const Target& to, const int (&acc)[SUMS], int token, int tokens, int row0,
                                            int q) {
  const int width = to.rows - to.split;
#pragma unroll
  for (int block = 0; block < SUMS / 32; block++) {
    unsigned int words[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int j = 8 * block + i, row = row0 + 8 * j + 2 * q;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float2 y = outputs(to, row, acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
        const unsigned int pair =
            __byte_perm(static_cast<unsigned char>(qm_quantize(y.x, to.inv_out_scale)),
                        static_cast<unsigned char>(qm_quantize(y.y, to.inv_out_scale)), 0x0040);
        words[h][i / 2] = i % 2 == 0 ? pair & 0xffffu : words[h][i / 2] | pair << 16;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint4 columns = gather_columns(words[h], q);
      if (token + 8 * h < tokens) {
        *reinterpret_cast<uint4*>(to.codes + static_cast<long long>(token + 8 * h) * width + (row0 - to.split) +
                                  64 * block + 16 * q) = columns;
      }
    }
  }
}

template <int SUMS>
__device__ __forceinline__ void store_real(const Target& to, const int (&acc)[SUMS], int token, int tokens, int row0,
                                           int q) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (token + 8 * h >= tokens) continue;
    const long long at = static_cast<long long>(token + 8 * h) * to.split + row0 + 2 * q;
    constexpr int AHEAD = SUMS % 32 == 0 ? 8 : 10;
#pragma unroll
    for (int part = 0; part < SUMS / 4 / AHEAD; part++) {
      float2 before[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        before[i] = to.residual == nullptr
                        ? make_float2(0.0f, 0.0f)
                        : *reinterpret_cast<const float2*>(to.residual + at + 8 * (AHEAD * part + i));
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int j = AHEAD * part + i;
        float2 y = outputs(to, row0 + 8 * j + 2 * q, acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
        if (to.residual != nullptr) y = make_float2(before[i].x + y.x, before[i].y + y.y);
        *reinterpret_cast<float2*>(to.real + at + 8 * j) = y;
      }
    }
  }
}

// A tile that ends inside, lies on both sides of the split or is not aligned.
template <int SUMS>
__device__ __forceinline__ void store_each(const Target& to, const int (&acc)[SUMS], int token, int tokens, int row0,
                                           int q) {
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    const int row = row0 + i / 4 * 8 + 2 * q + i % 2, own = token + i % 4 / 2 * 8;
    if (own < tokens && row < to.rows) store(to, own, row, acc[i]);
  }
}

// The sums of a lane as linear_sixteens.cuh orders them.
template <int SUMS>
__device__ __forceinline__ void store_sixteens(const Target& to, const int (&acc)[SUMS], int token, int tokens,
                                               int row0, int q) {
  const Codes codes = {to.codes, to.x_scale, to.inv_out_scale, tokens, to.rows};
#pragma unroll
  for (int block = 0; block < SUMS / BLOCK_SUMS; block++) {
    const int row = row0 + block * BLOCK_ROWS + q * LANE_ROWS;
    if (row >= to.rows) continue;
    float4 scales[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scales[i] = __ldg(reinterpret_cast<const float4*>(to.weight_scale + row + 4 * i));
    round_and_store(codes, acc, block * BLOCK_SUMS, scales, token, row);
  }
}

// A multiplying warpgroup.
template <int BN, bool LANES>
__device__ __forceinline__ void multiply_and_store(const Shape& s, const Target& to, unsigned int stages,
                                                   unsigned int full, unsigned int empty, bool even) {
  using T = Tile<BN>;
  const int group = threadIdx.x / GROUP_THREADS - 1, t = threadIdx.x % GROUP_THREADS;
  const int lane = t % 32, q = lane % 4;
  int stage = 0;
  unsigned int parity = 0;
  for (int tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) {
    int acc[T::SUMS];
    int behind = 0;  // the stage whose products may still run
#pragma unroll 1
    for (int step = 0; step < s.steps; step++) {
      wait_for(full + 8 * stage, parity);
      const unsigned int at = stages + stage * T::STAGE_BYTES;
      const unsigned long long a = matrix_descriptor(at + group * GROUP_ROWS * BK), b = matrix_descriptor(at + X_BYTES);
      begin_products();
      // 32 columns are 32 bytes, two units of a descriptor.
#pragma unroll
      for (int i = 0; i < BK / 32; i++) multiply(acc, a + 2 * i, b + 2 * i, step + i);
      commit_products();
      wait_for_products<1>();
      if (step > 0 && lane == 0) arrive(empty + 8 * behind);
      behind = stage;
      if (++stage == T::STAGES) stage = 0, parity ^= 1u;
    }
    wait_for_products<0>();
    if (lane == 0) arrive(empty + 8 * behind);

    int token, row0;
    place<BN>(s, tile, token, row0);
    token += group * GROUP_ROWS + t / 32 * 16 + lane / 4;
    if constexpr (LANES) {
      store_sixteens(to, acc, token, s.tokens, row0, q);
      continue;
    }
    if (even && row0 + BN <= min(s.rows, to.split)) {
      store_real(to, acc, token, s.tokens, row0, q);
      continue;
    }
    // Vectors of codes take 64 rows at a time.
    if constexpr (BN % 64 == 0) {
      if (even && row0 + BN <= s.rows && row0 >= to.split) {
        store_codes(to, acc, token, s.tokens, row0, q);
        continue;
      }
    }
    store_each(to, acc, token, s.tokens, row0, q);
  }
}

// grid.x: at most one block a multiprocessor. `even`: split and rows are multiples of 16 and all pointers aligned.
// LANES: so they are, all outputs are int8, without a bias, and the weight's map is that of linear_sixteens.cuh.
template <int BN, bool LANES>
__global__ void __launch_bounds__(THREADS, 1)
    linear_wide(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                const float* __restrict__ weight_scale, const float* __restrict__ bias,
                const float* residual,  // may be `real` itself
                float* real, signed char* __restrict__ codes, float x_scale, float inv_out_scale, int tokens, int rows,
                int split, int k, int even) {
  using T = Tile<BN>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) unsigned long long barriers[2 * T::STAGES];
  const unsigned int full = shared_address(barriers), empty = full + 8 * T::STAGES;
  const unsigned int stages = (shared_address(shared) + 1023u) & ~1023u;
  if (threadIdx.x == 0) make_ring<T::STAGES>(full, empty, 2 * GROUP_THREADS / 32);
  __syncthreads();
  Shape s;
  s.tokens = tokens, s.rows = rows, s.steps = (k + BK - 1) / BK;
  s.down = (tokens + BM - 1) / BM, s.across = (rows + BN - 1) / BN, s.tiles = s.down * s.across;
  if (threadIdx.x < GROUP_THREADS) {
    give_registers<40>();
    if (threadIdx.x == 0) copy_operands<BN, LANES>(s, x, weight, stages, full, empty);
  } else {
    take_registers<232>();
    const Target to = {real, codes, residual, weight_scale, bias, x_scale, inv_out_scale, rows, split};
    multiply_and_store<BN, LANES>(s, to, stages, full, empty, even != 0);
  }
}
