// int8 products of few tokens on tensor cores: the weight is read once, straight from memory into the fragments.
//
// A weight row is the left operand of mma.m16n8k32: a tile has 16 rows and 8 tokens. A sum does not depend on
// the order of its terms, so the lanes' columns are permuted until every load is 16 bytes: lane (g, t) =
// (lane / 4, lane % 4) owns 16 consecutive bytes of its rows g and g + 8 and the same columns of token g.
//
//   int8    chunk of 128 columns: two loads a row; the words of one load are parts 0, 1 of step 0 and of step 1
//   packed  chunk of 128 columns: one load a row, 32 codes; word j gives step j: its low nibbles, columns
//           8j, 8j+2, 8j+4, 8j+6 of the lane, are part 0 and its high nibbles part 1. A nibble in the high half of a
//           byte is 16 * code as int8, so that no sign is extended: the sum of a chunk is divided by 16, exactly,
//           and multiplied by the group's multiplier.
//
// The warps of a block (threadIdx.x / 32) share the chunks, 128 bytes of every row at a time, and add their sums in
// shared memory; threadIdx.y and blockIdx.x choose the rows, blockIdx.y the tokens. int32 sums are exact, whoever
// adds them. Rows and tokens past the end repeat the last one and are not stored.
#ifndef QM_LINEAR_MMA_CUH
#define QM_LINEAR_MMA_CUH

constexpr int kLanes = 32;
constexpr int kTileRows = 16;
constexpr int kTileTokens = 8;
constexpr int kChunk = 128;

// Where a product goes: outputs below `split` as float32, with the residual if there is one, the others as int8.
struct Target {
  float* real;                // (tokens, split)
  signed char* codes;         // (tokens, rows - split)
  const float* residual;      // (tokens, split) or null
  const float* weight_scale;  // (rows,) real units a step
  const float* bias;          // (rows,) real units, or null
  float x_scale;
  float inv_out_scale;
  int rows;
  int split;
};

__device__ __forceinline__ void store(const Target& to, long long token, int row, int acc) {
  float y = __int2float_rn(acc) * (to.weight_scale[row] * to.x_scale);
  if (to.bias != nullptr) y = y + to.bias[row];
  if (row < to.split) {
    const long long index = token * to.split + row;
    to.real[index] = to.residual == nullptr ? y : to.residual[index] + y;
  } else {
    to.codes[token * (to.rows - to.split) + (row - to.split)] = qm_quantize(y, to.inv_out_scale);
  }
}

#ifndef QM_EMULATED
__device__ __forceinline__ void mma_s8(int (&d)[4], unsigned int a0, unsigned int a1, unsigned int a2, unsigned int a3,
                                       unsigned int b0, unsigned int b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// 16 bytes of a row, or zeros past its end.
__device__ __forceinline__ uint4 load16(const void* row, int byte, bool inside) {
  if (!inside) return make_uint4(0u, 0u, 0u, 0u);
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(row) + byte));
}

// The 128 bytes of one row that a warp reads in one round: two loads a lane.
struct Words {
  uint4 first, second;
};

template <bool PACKED>
__device__ __forceinline__ Words load_words(const unsigned char* row, int round, int lane_in_row, int bytes) {
  const int byte = round * 128 + lane_in_row * 16;
  return {load16(row, byte, byte < bytes), load16(row, byte + 64, byte + 64 < bytes)};
}

// One chunk of a packed weight tile against one token tile, multiplied by the rows' multipliers.
__device__ __forceinline__ void packed_chunk(int (&acc)[4], const uint4& low_rows, const uint4& high_rows, int m_low,
                                             int m_high, const unsigned int (&even)[4], const unsigned int (&odd)[4]) {
  constexpr unsigned int kHigh = 0xf0f0f0f0u;
  const unsigned int low[4] = {low_rows.x, low_rows.y, low_rows.z, low_rows.w};
  const unsigned int high[4] = {high_rows.x, high_rows.y, high_rows.z, high_rows.w};
  int sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    mma_s8(sum, (low[j] << 4) & kHigh, (high[j] << 4) & kHigh, low[j] & kHigh, high[j] & kHigh, even[j], odd[j]);
  }
  acc[0] += (sum[0] >> 4) * m_low;
  acc[1] += (sum[1] >> 4) * m_low;
  acc[2] += (sum[2] >> 4) * m_high;
  acc[3] += (sum[3] >> 4) * m_high;
}

template <int ROW_TILES, int TOKEN_TILES, bool PACKED>
__global__ void __launch_bounds__(TOKEN_TILES < 4 ? 320 : 256, 1)
    linear_skinny(const signed char* __restrict__ x,             // (tokens, k), rows x_stride bytes apart
                  const unsigned char* __restrict__ weight,      // (rows, k) int8, or (rows, k / 2) packed codes
                  const unsigned char* __restrict__ multiplier,  // (rows, groups), or null
                  const float* __restrict__ weight_scale, const float* __restrict__ bias,
                  const float* __restrict__ residual, float* __restrict__ real, signed char* __restrict__ codes,
                  float x_scale, float inv_out_scale, long long x_stride, int tokens, int rows, int split, int k,
                  int groups, int chunks_a_group) {
  constexpr int kSlots = ROW_TILES * TOKEN_TILES * 4;
  constexpr int kChunks = PACKED ? 2 : 1;  // in a round of 128 bytes
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int g = lane / 4, t = lane % 4;
  const int first_row = (blockIdx.x * blockDim.y + threadIdx.y) * kTileRows * ROW_TILES;
  const int first_token = blockIdx.y * kTileTokens * TOKEN_TILES;
  const int bytes = PACKED ? k / 2 : k;
  const int rounds = (bytes + 127) / 128;

  const unsigned char* weight_rows[2 * ROW_TILES];
  const unsigned char* group_rows[2 * ROW_TILES];
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) {
    const long long row = min(first_row + r * kTileTokens + g, rows - 1);
    weight_rows[r] = weight + row * bytes;
    group_rows[r] = PACKED ? multiplier + row * groups : nullptr;
  }
  const signed char* token_rows[TOKEN_TILES];
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) {
    token_rows[n] = x + min(first_token + n * kTileTokens + g, tokens - 1) * x_stride;
  }

  int acc[ROW_TILES][TOKEN_TILES][4] = {};
  Words next[2 * ROW_TILES];
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) next[r] = load_words<PACKED>(weight_rows[r], warp, t, bytes);
#pragma unroll 1
  for (int round = warp; round < rounds; round += warps) {
    Words now[2 * ROW_TILES];
#pragma unroll
    for (int r = 0; r < 2 * ROW_TILES; ++r) {
      now[r] = next[r];
      // Past the end every load is zero.
      next[r] = load_words<PACKED>(weight_rows[r], round + warps, t, bytes);
    }
    int factor[kChunks][2 * ROW_TILES];
    if constexpr (PACKED) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int group = min((round * kChunks + c) / chunks_a_group, groups - 1);
#pragma unroll
        for (int r = 0; r < 2 * ROW_TILES; ++r) factor[c][r] = __ldg(group_rows[r] + group);
      }
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        // The lane's columns of this chunk: 32 in one piece, or 16 in each half of the chunk.
        const int first = (round * kChunks + c) * kChunk + (PACKED ? t * 32 : t * 16);
        const int second = first + (PACKED ? 16 : 64);
        const uint4 xa = load16(token_rows[n], first, first < k);
        const uint4 xb = load16(token_rows[n], second, second < k);
        if constexpr (PACKED) {
          const unsigned int even[4] = {__byte_perm(xa.x, xa.y, 0x6420), __byte_perm(xa.z, xa.w, 0x6420),
                                        __byte_perm(xb.x, xb.y, 0x6420), __byte_perm(xb.z, xb.w, 0x6420)};
          const unsigned int odd[4] = {__byte_perm(xa.x, xa.y, 0x7531), __byte_perm(xa.z, xa.w, 0x7531),
                                       __byte_perm(xb.x, xb.y, 0x7531), __byte_perm(xb.z, xb.w, 0x7531)};
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) {
            packed_chunk(acc[r][n], c == 0 ? now[2 * r].first : now[2 * r].second,
                         c == 0 ? now[2 * r + 1].first : now[2 * r + 1].second, factor[c][2 * r],
                         factor[c][2 * r + 1], even, odd);
          }
        } else {
#pragma unroll
          for (int r = 0; r < ROW_TILES; ++r) {
            const Words low = now[2 * r], high = now[2 * r + 1];
            mma_s8(acc[r][n], low.first.x, high.first.x, low.first.y, high.first.y, xa.x, xa.y);
            mma_s8(acc[r][n], low.first.z, high.first.z, low.first.w, high.first.w, xa.z, xa.w);
            mma_s8(acc[r][n], low.second.x, high.second.x, low.second.y, high.second.y, xb.x, xb.y);
            mma_s8(acc[r][n], low.second.z, high.second.z, low.second.w, high.second.w, xb.z, xb.w);
          }
        }
      }
    }
  }

  extern __shared__ int partial[];  // (blockDim.y, warps, kSlots, 32)
  int* mine = partial + threadIdx.y * warps * kSlots * kLanes;
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mine[(warp * kSlots + (r * TOKEN_TILES + n) * 4 + i) * kLanes + lane] = acc[r][n][i];
      }
    }
  }
  __syncthreads();
  const Target to = {real, codes, residual, weight_scale, bias, x_scale, inv_out_scale, rows, split};
  constexpr int kRows = kTileRows * ROW_TILES;
  for (int e = threadIdx.x; e < kRows * kTileTokens * TOKEN_TILES; e += blockDim.x) {
    const int row = e % kRows, token = e / kRows;
    if (first_row + row >= rows || first_token + token >= tokens) continue;
    const int slot = ((row / 16) * TOKEN_TILES + token / 8) * 4 + (row % 16) / 8 * 2 + token % 2;
    const int owner = row % 8 * 4 + token % 8 / 2;
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += mine[(w * kSlots + slot) * kLanes + owner];
    store(to, first_token + token, first_row + row, sum);
  }
}

#endif
