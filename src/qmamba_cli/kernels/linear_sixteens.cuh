// Products on warp-group tensor cores whose lanes end with 16 int8 outputs that lie together; include numerics.cuh,
// barriers.cuh and linear_wgmma.cuh first. All of it needs sm_90a.
//
// Of 64 rows of the weight, row 16 q + 2 j + e is row 8 j + 2 q + e of a tile. A product leaves columns 8 j + 2 q + e to
// the lanes with that q: to each the 16 rows from 16 q on.
#ifndef QM_LINEAR_SIXTEENS_CUH
#define QM_LINEAR_SIXTEENS_CUH

constexpr int LANE_ROWS = 16, BLOCK_ROWS = 64, TILE_COLUMNS = 128, BLOCK_BYTES = BLOCK_ROWS * TILE_COLUMNS;
constexpr int GROUP_THREADS = 128, GROUP_TOKENS = 64;
// Sums of a lane: of 64 rows and 64 tokens a warpgroup.
constexpr int BLOCK_SUMS = BLOCK_ROWS * GROUP_TOKENS / GROUP_THREADS;

// Copies 128 columns of 64 rows of the weight from this row on; what lies outside becomes zero. operands.py makes the
// map.
__device__ __forceinline__ void copy_rows(unsigned int to, const TensorMap& map, int column, int row,
                                          unsigned int barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %3}], [%5];" ::
          "r"(to),
      "l"(&map), "r"(column), "r"(0), "r"(row / LANE_ROWS), "r"(barrier)
      : "memory");
}

// Where outputs go: int8, (tokens, rows).
struct Codes {
  signed char* codes;
  float x_scale, inv_out_scale;
  int tokens, rows;
};

// Rounds and stores outputs of a lane, whose sums begin at acc[first]: 4 WORDS rows from `row` on, of tokens `token` and
// token + 8.
template <int WORDS, int SUMS>
__device__ __forceinline__ void round_and_store(const Codes& to, const int (&acc)[SUMS], int first,
                                                const float4 (&scales)[WORDS], int token, int row) {
  unsigned int words[2][WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    const float scale[4] = {scales[i].x * to.x_scale, scales[i].y * to.x_scale, scales[i].z * to.x_scale,
                            scales[i].w * to.x_scale};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float steps[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        steps[k] = __int2float_rn(acc[first + 8 * i + k / 2 * 4 + 2 * h + k % 2]) * scale[k] * to.inv_out_scale;
      }
      words[h][i] = qm_four_bytes(steps[0], steps[1], steps[2], steps[3]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    signed char* place = to.codes + static_cast<long long>(token + 8 * h) * to.rows + row;
    if (token + 8 * h >= to.tokens) continue;
    if constexpr (WORDS == 4) {
      *reinterpret_cast<uint4*>(place) = make_uint4(words[h][0], words[h][1], words[h][2], words[h][3]);
    } else {
      static_assert(WORDS == 2);
      *reinterpret_cast<uint2*>(place) = make_uint2(words[h][0], words[h][1]);
    }
  }
}

#endif
