// out_proj of one token by columns: what its thread blocks leave for the next decode_in, and the kernel; include
// decode_turn.cuh and decode_parts.cuh first.
#ifndef QM_DECODE_COLUMNS_CUH
#define QM_DECODE_COLUMNS_CUH

// What the block before left to be added to the residual: whole sums of out_proj, and their scale and bias.
struct Pending {
  const int* sums;         // (d_model,), or null where nothing is left
  const float* constants;  // (128, 2, rows): row scale, row bias
  int rows;
};
// The constants of row r of a matrix whose thread blocks have `rows` rows: its scale, and `rows` behind it its bias.
__device__ __forceinline__ const float* row_constants(const Pending& pending, int row) {
  return pending.constants + row / pending.rows * pending.rows + row;
}
__device__ __forceinline__ float settled(float old, int sum, float scale, float bias) {
  return old + (static_cast<float>(sum) * scale + bias);
}

// Four neighbours, whose constants are read before the wait for their sums.
struct FourConstants {
  float scale[4], bias[4];
};
__device__ __forceinline__ FourConstants constants_of_four(const Pending& pending, int vector, bool wanted) {
  FourConstants four = {};
  if (wanted) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* constants = row_constants(pending, vector * 4 + i);
      four.scale[i] = constants[0];
      four.bias[i] = constants[pending.rows];
    }
  }
  return four;
}
__device__ __forceinline__ void settle_four(float4& x, const Pending& pending, int vector, const FourConstants& four) {
  const int4 sum = load_fresh(reinterpret_cast<const int4*>(pending.sums) + vector);
  x.x = settled(x.x, sum.x, four.scale[0], four.bias[0]);
  x.y = settled(x.y, sum.y, four.scale[1], four.bias[1]);
  x.z = settled(x.z, sum.z, four.scale[2], four.bias[2]);
  x.w = settled(x.w, sum.w, four.scale[3], four.bias[3]);
}

constexpr int COLUMN_THREADS = 512;
constexpr int TILE = 16;               // rows of a tensor-core product
constexpr int TILE_PIECES = 4 * TILE;  // of a unit
template <int BITS>
constexpr int VECTOR_UNITS = BITS == 8 ? 2 : 1;  // of 128 columns

// A tile times 128 columns of one token, which all columns of b are: the sums of rows lane / 4 and 8 more, the same in
// each of a row's four lanes. `multiplier`: of row lane / 4.
template <int BITS>
__device__ __forceinline__ int2 multiply_tile(const uint4* piece, const uint2 (&b)[4], const unsigned char* multiplier,
                                              int fine) {
  int parts[2][4] = {};
  int2 sum = make_int2(0, 0);
  if constexpr (BITS == 8) {
#pragma unroll
    for (int unit = 0; unit < 2; unit++) {
      const uint4 top = piece[unit * TILE_PIECES], low = piece[unit * TILE_PIECES + WARP];
      multiply_i8(parts[0], top.x, low.x, top.y, low.y, b[2 * unit].x, b[2 * unit].y);
      multiply_i8(parts[1], top.z, low.z, top.w, low.w, b[2 * unit + 1].x, b[2 * unit + 1].y);
    }
    sum.x = parts[0][0] + parts[1][0];
    sum.y = parts[0][2] + parts[1][2];
  } else {
    // As add_unit_w4: every sum is 16 times the true one.
    constexpr unsigned int HIGH = 0xf0f0f0f0u;
    const uint4 top4 = piece[0], low4 = piece[WARP];
    const unsigned int top[4] = {top4.x, top4.y, top4.z, top4.w}, low[4] = {low4.x, low4.y, low4.z, low4.w};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      multiply_i8(parts[step % 2], (top[step] << 4) & HIGH, (low[step] << 4) & HIGH, top[step] & HIGH,
                  low[step] & HIGH, b[step].x, b[step].y);
      if (fine || step == 3) {
        sum.x += multiplier[0] * (parts[0][0] + parts[1][0]);
        sum.y += multiplier[8] * (parts[0][2] + parts[1][2]);
#pragma unroll
        for (int i = 0; i < 4; i++) parts[0][i] = parts[1][i] = 0;
        multiplier += 16;
      }
    }
    sum.x >>= 4;
    sum.y >>= 4;
  }
  return sum;
}

// A warp's share of out_proj: neighbouring tiles of the 128 columns of one vector. A lane copies what it will use itself.
struct TileStream {
  const uint4* weight;  // (128, units, rows, 64 bytes), from the vector's first unit on
  uint4* slots;         // shared memory, `room` tiles, the lane's place
  int first_row, rows, units, room;
};
// Where 16 bytes of a row of the stream lie in global memory.
__device__ __forceinline__ const uint4* piece_of(const TileStream& stream, int row, int unit, int piece) {
  const int block = row / stream.rows;
  return stream.weight + ((block * (stream.units - 1) + unit) * stream.rows + row) * 4 + piece;
}
template <int BITS>
__device__ __forceinline__ void ask_for_tile(const TileStream& stream, int slot, int tile) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = stream.first_row + tile * TILE + half * (TILE / 2) + lane / 4;
    const uint4* from = piece_of(stream, row, 0, lane % 4);
#pragma unroll
    for (int unit = 0; unit < VECTOR_UNITS<BITS>; unit++) {
      copy16(stream.slots + (slot * VECTOR_UNITS<BITS> + unit) * TILE_PIECES + half * WARP,
             from + unit * stream.rows * 4);
    }
  }
}
// In the second-level cache.
template <int BITS>
__device__ __forceinline__ void prefetch_tile(const TileStream& stream, int tile) {
  const int lane = threadIdx.x % WARP;
  if (lane / TILE < VECTOR_UNITS<BITS>) {
    prefetch_line(piece_of(stream, stream.first_row + tile * TILE + lane % TILE, lane / TILE, 0));
  }
}

// Grid: `groups` blocks for each of the HK vectors of 128 channels. A block turns its vector alone, and multiplies it by
// part of the rows; a warp takes some tiles of 16 rows.
template <int BITS>
__global__ void __launch_bounds__(COLUMN_THREADS, 2)
    decode_out_columns(const float* y,                    // (hk, 128), one token
                       const uint4* weight,               // (128, units, rows, 64 bytes)
                       const unsigned char* multipliers,  // (128, tiles, units, 1 or 4, 16); null for W8
                       int* out_sums,                     // (d_model,), added to
                       int* x_sums,                       // cleared for the next layer
                       float* x_absmax,                   // (128,) to be UNTOLD for the next layer, or null
                       const int* before, int* mine,      // counters
                       int sums, float factor, int d_model, int hk, int rows, int units, int fine, int groups,
                       int room, int full, int late) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int UNITS = VECTOR_UNITS<BITS>;
  const Turn turn{before, full, mine, late};
  STAMP(5, 0)
  announce(turn);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const int vector = blockIdx.x / groups, group = blockIdx.x - vector * groups, tiles = d_model / TILE;
  const int start = group * tiles / groups, here = (group + 1) * tiles / groups - start;
  const int first = start + warp * here / warps, count = start + (warp + 1) * here / warps - first;
  const int of_warp = (here + warps - 1) / warps * (fine ? 4 : 1) * TILE;  // bytes of multipliers
  Carver carver{shared};
  uint4* slots = carver.take<uint4>(warps * room * UNITS * TILE_PIECES);
  unsigned int* codes = carver.take<unsigned int>(WARP);
  unsigned char* factors = carver.take<unsigned char>(BITS == 4 ? warps * of_warp : 0) + warp * of_warp;

  const TileStream stream{weight + vector * UNITS * rows * 4, slots + warp * room * UNITS * TILE_PIECES + lane,
                          first * TILE, rows, units, room};
  for (int tile = 0; tile < min(count, room); tile++) ask_for_tile<BITS>(stream, tile, tile);
  commit_copies();
#pragma unroll 1
  for (int tile = room; tile < count; tile++) prefetch_tile<BITS>(stream, tile);
  if constexpr (BITS == 4) {
    const int of_tile = (fine ? 4 : 1) * TILE, row_tiles = (rows + TILE - 1) / TILE;
#pragma unroll 1
    for (int at = lane; at < count * of_tile; at += WARP) {
      const int tile = at / of_tile, step = at % of_tile / TILE, row = (first + tile) * TILE + at % TILE;
      const int block = row / rows, own = row - block * rows;
      factors[at] = multipliers[((block * row_tiles + own / TILE) * units + vector) * of_tile + step * TILE + own % TILE];
    }
  }
  int* to = out_sums + first * TILE + lane / 4;

  await_turn(turn);
  STAMP(5, 1)
  if (warp == 0) rotate_vectors<1>(y + vector * BLOCKS, reinterpret_cast<signed char*>(codes), 0, 1, 1, factor);
  STAMP(5, 2)
  wait_for_copies();
  __syncthreads();
  STAMP(5, 3)
  uint2 b[4];
#pragma unroll
  for (int step = 0; step < 4; step++) b[step] = reinterpret_cast<const uint2*>(codes)[4 * step + lane % 4];
  int2 held = make_int2(0, 0);
#pragma unroll 4
  for (int tile = 0; tile < count; tile++) {
    const int slot = tile % room;
    if (tile > 0 && slot == 0) wait_for_copies();
    const int2 sum = multiply_tile<BITS>(stream.slots + slot * UNITS * TILE_PIECES, b,
                                         factors + tile * (fine ? 4 : 1) * TILE + lane / 4, fine);
    if (tile + room < count) ask_for_tile<BITS>(stream, slot, tile + room);
    // Each of a row's four lanes adds the sums of one of four tiles.
    if (tile % 4 == lane % 4) held = sum;
    if (tile % 4 == 3 || tile == count - 1) {
      const int its = tile - tile % 4 + lane % 4;
      if (its <= tile) {
        atomicAdd(to + its * TILE, held.x);
        atomicAdd(to + its * TILE + TILE / 2, held.y);
      }
    }
  }
  STAMP(5, 4)
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < sums; i += gridDim.x * blockDim.x) x_sums[i] = 0;
  if (x_absmax != nullptr && blockIdx.x == 0 && static_cast<int>(threadIdx.x) < BLOCKS) {
    x_absmax[threadIdx.x] = qm_from_bits(UNTOLD);
  }
  hand_on(turn);
  STAMP(5, 5)
  end_turn(turn);
}

#endif
