// Packed weights back to rows; include decode_weights.cuh first.
#ifndef QM_DECODE_UNPACK_CUH
#define QM_DECODE_UNPACK_CUH

// Small blocks: they run beside those of a prompt's scan, in the registers that these leave.
constexpr int UNPACK_THREADS = 128;

// Four codes, one in the low nibble of each byte, times m <= 15, as int8. A code is (nibble ^ 8) - 8; nibble ^ 8 times
// m stays within its byte, and so does 8 m, which is taken off byte by byte.
__device__ __forceinline__ unsigned int scaled_codes(unsigned int nibbles, unsigned int m) {
  constexpr unsigned int HIGH = 0x80808080u;
  const unsigned int product = (nibbles ^ 0x08080808u) * m;
  return ((product | HIGH) - 0x08080808u * m) ^ (~product & HIGH);
}

// Grid: x: the 128 blocks of the packed matrix, y: enough for a thread a piece. Row r < `first_rows` of block j is row
// j * row_stride + r * row_step, a later one that of r - first_rows behind `behind` rows.
template <int BITS>
__global__ void __launch_bounds__(UNPACK_THREADS)
    decode_unpack(const uint4* weight,               // (128, tiles of up to tile_rows rows, units, rows, 64 bytes)
                  const unsigned char* multipliers,  // (128, tiles of 16, units, 1 or 4, 16); W4 only
                  signed char* matrix,               // (all_rows, columns) out
                  int rows, int tile_rows, int units, int fine, int all_rows, int columns, int row_stride,
                  int row_step, int first_rows, int behind) {
  const int pieces = rows * units * 4, piece = blockIdx.y * UNPACK_THREADS + threadIdx.x;
  if (piece >= pieces) return;
  const int tile = piece / (tile_rows * units * 4), here = min(tile_rows, rows - tile * tile_rows);
  const int rest = piece - tile * tile_rows * units * 4, unit = rest / (here * 4), row_in_unit = rest / 4 - unit * here;
  const int row = tile * tile_rows + row_in_unit, quarter = piece % 4;
  const uint4 words = weight[static_cast<long long>(blockIdx.x) * pieces + piece];
  const int target = row < first_rows ? blockIdx.x * row_stride + row * row_step
                                      : behind + blockIdx.x * row_stride + (row - first_rows) * row_step;
  if (target >= all_rows) return;
  constexpr int STEPS = BITS == 8 ? 2 : 4;
  const unsigned int word[4] = {words.x, words.y, words.z, words.w};
  signed char* to = matrix + static_cast<long long>(target) * columns;
  const int steps_of_unit = fine ? 4 : 1, tiles = (rows + 15) / 16;
  const int group = ((blockIdx.x * tiles + row / 16) * units + unit) * steps_of_unit;
  const unsigned char* m = multipliers + group * 16 + row % 16;
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int column = unit * STEPS * 32 + step * 32 + quarter * 8;
    if (column < columns) {
      uint2 eight;
      if constexpr (BITS == 8) {
        eight = make_uint2(word[2 * step], word[2 * step + 1]);
      } else {
        const unsigned int factor = m[fine ? step * 16 : 0];
        eight = make_uint2(scaled_codes(word[step] & 0x0f0f0f0fu, factor),
                           scaled_codes(word[step] >> 4 & 0x0f0f0f0fu, factor));
      }
      *reinterpret_cast<uint2*>(to + column) = eight;
    }
  }
}

#endif
