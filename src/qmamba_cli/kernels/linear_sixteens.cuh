// Products on warp-group tensor cores whose lanes end with 16 int8 outputs that lie together; include numerics.cuh,
// barriers.cuh and linear_wgmma.cuh first. All of it needs sm_90a.
//
// Of 64 rows of the weight, row 16 q + 2 j + e is row 8 j + 2 q + e of a tile. A product leaves columns 8 j + 2 q + e to
// the lanes with that q: to each the 16 rows from 16 q on.
#ifndef QM_LINEAR_SIXTEENS_CUH
#define QM_LINEAR_SIXTEENS_CUH

constexpr int LANE_ROWS = 16, BLOCK_ROWS = 64, TILE_COLUMNS = 128, BLOCK_BYTES = BLOCK_ROWS * TILE_COLUMNS;
constexpr int GROUP_THREADS = 128, GROUP_TOKENS = 64;

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

// Rounds the outputs of the 64 rows that are block `block` of the sums: of a lane those from `row` on, of tokens `token`
// and token + 8. `scales` are those of its 16 rows.
template <int SUMS>
__device__ __forceinline__ void round_and_store(const Codes& to, const int (&acc)[SUMS], int block,
                                                const float4 (&scales)[4], int token, int row) {
  unsigned int words[2][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float scale[4] = {scales[i].x * to.x_scale, scales[i].y * to.x_scale, scales[i].z * to.x_scale,
                            scales[i].w * to.x_scale};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float steps[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        steps[k] = __int2float_rn(acc[32 * block + 8 * i + k / 2 * 4 + 2 * h + k % 2]) * scale[k] * to.inv_out_scale;
      }
      words[h][i] = qm_four_bytes(steps[0], steps[1], steps[2], steps[3]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (token + 8 * h < to.tokens) {
      *reinterpret_cast<uint4*>(to.codes + static_cast<long long>(token + 8 * h) * to.rows + row) =
          make_uint4(words[h][0], words[h][1], words[h][2], words[h][3]);
    }
  }
}

#endif
