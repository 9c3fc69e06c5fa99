// How the decode kernels read weights and multiply; include decode_ptx.cuh first.
#ifndef QM_DECODE_WEIGHTS_CUH
#define QM_DECODE_WEIGHTS_CUH

constexpr int WARP = 32;

// `bytes` (a multiple of 16) from global to shared memory by the whole block.
__device__ __forceinline__ void copy_block(void* to, const void* from, int bytes) {
  for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
    copy16(static_cast<char*>(to) + at, static_cast<const char*>(from) + at);
  }
}

// A matrix is a row of units of columns (64 of W8, 128 of W4), a unit 64 bytes of each of the block's rows.
// Lane l of a warp owns 16 bytes, called a piece, of rows l / 4, l / 4 + 8, ... of each unit:
//
//   step s of 32 columns:  columns 32 s + 8 (l % 4) + 0..7     W8: steps 0-1, 8 bytes each; W4: steps 0-3, 4 bytes
//                                                              each, column i in the low nibble of byte i, column
//                                                              4 + i in the high nibble, two's complement
//
// A lane copies what it will use itself, so no barrier stands between a copy and its use.
struct Stream {
  const uint4* from;  // global memory, the warp's first unit
  uint4* slots;       // shared memory, `room` units
  int pieces;         // of a unit: 4 a row
  int count;          // units of this warp
  int room;           // units that fit
};

template <int HALVES>
__device__ __forceinline__ void ask_for(const Stream& stream, int slot, int unit) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    const int at = half * WARP + lane;
    if (at < stream.pieces) {
      copy16(stream.slots + slot * stream.pieces + at, stream.from + unit * stream.pieces + at);
    }
  }
}

// Fills the slots, `slice` units at a time with at most `under_way` (1 or 2) slices on their way, so that small messages
// of the kernels before find a short queue; asks for the rest in the second-level cache.
template <int HALVES>
__device__ __forceinline__ void begin_stream(const Stream& stream, int slice, int under_way) {
  const int kept = min(stream.count, stream.room);
  int left = slice;
  for (int unit = 0; unit < kept; unit++) {
    ask_for<HALVES>(stream, unit, unit);
    if (--left == 0) {
      commit_copies();
      if (under_way == 2) {
        wait_for_older_copies();
      } else if (unit + 1 < kept) {
        wait_for_copies();
      }
      left = slice;
    }
  }
  commit_copies();
  constexpr int LINE = 8;  // pieces
  for (int at = kept * stream.pieces + threadIdx.x % WARP * LINE; at < stream.count * stream.pieces;
       at += WARP * LINE) {
    prefetch_line(stream.from + at);
  }
}

// What the weights meet: int8 codes in shared memory, one row a token.
struct Activations {
  const signed char* codes;  // (tokens, stride)
  int stride;                // bytes; 32 more than a multiple of 64 or 128 keeps the loads free of bank conflicts
  int tokens;                // at most 8
};

// Integer multipliers of W4 groups, in shared memory: (tiles, units, steps or 1, 16 rows). `fine`: one a step.
struct Multipliers {
  const unsigned char* values;
  int units;  // of a whole row
  int fine;
};

// Two sums a value, added at the end: products of a warp wait for each other half as often.
template <int TILES>
struct Sums {
  int parts[2][TILES][4];
};

// Where a lane reads its operands of a unit, in shared memory. For rows behind a unit's last one it reads an earlier
// one's, and for tokens behind the last one the last one's: a product's sums of one row and token depend on no other row
// and token, and theirs are not used.
template <int TILES>
struct Places {
  const uint4* piece;               // of row lane / 4
  int halves[2 * TILES];            // pieces from there to that of 0, 8, 16 and 24 rows more
  const signed char* codes;         // of token lane / 4, the lane's columns of step 0
  const unsigned char* multiplier;  // of row lane / 4
};

template <int TILES>
__device__ __forceinline__ void add_unit_w8(const Places<TILES>& places, int pieces, Sums<TILES>& sums) {
  const uint2* columns = reinterpret_cast<const uint2*>(places.codes);
  const uint2 b0 = columns[0], b1 = columns[4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (tile > 0 && tile * 2 * WARP >= pieces) break;
    const uint4 top = places.piece[places.halves[2 * tile]], low = places.piece[places.halves[2 * tile + 1]];
    multiply_i8(sums.parts[0][tile], top.x, low.x, top.y, low.y, b0.x, b0.y);
    multiply_i8(sums.parts[1][tile], top.z, low.z, top.w, low.w, b1.x, b1.y);
  }
}

// Nibbles stay in the high half of their byte, where the sign is theirs: every sum is 16 times the true one.
// FINE: each step of 32 columns has its multiplier, else the unit. `of_tile`: bytes of a tile's multipliers.
template <int TILES, bool FINE>
__device__ __forceinline__ void add_unit_w4(const Places<TILES>& places, int pieces, int of_tile, Sums<TILES>& sums) {
  constexpr unsigned int HIGH = 0xf0f0f0f0u;
  const uint2* columns = reinterpret_cast<const uint2*>(places.codes);
  uint2 b[4];
#pragma unroll
  for (int step = 0; step < 4; step++) b[step] = columns[4 * step];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (tile > 0 && tile * 2 * WARP >= pieces) break;
    const uint4 top4 = places.piece[places.halves[2 * tile]], low4 = places.piece[places.halves[2 * tile + 1]];
    const unsigned int top[4] = {top4.x, top4.y, top4.z, top4.w}, low[4] = {low4.x, low4.y, low4.z, low4.w};
    const unsigned char* m = places.multiplier + tile * of_tile;
    int group[2][4] = {};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      multiply_i8(group[step % 2], (top[step] << 4) & HIGH, (low[step] << 4) & HIGH, top[step] & HIGH,
                  low[step] & HIGH, b[step].x, b[step].y);
      if (FINE || step == 3) {
        const int factors[2] = {m[0], m[8]};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sums.parts[0][tile][i] += factors[i / 2] * (group[0][i] + group[1][i]);
          group[0][i] = group[1][i] = 0;
        }
        m += 16;
      }
    }
  }
}

// Adds the warp's products to totals (tokens, rows of the block) in shared memory: whole int32 sums in any order.
template <int BITS, int TILES>
__device__ __forceinline__ void multiply_stream(const Stream& stream, const Activations& x,
                                                const Multipliers& multipliers, int first_unit, int* totals,
                                                int rows_of_block) {
  const int lane = threadIdx.x % WARP;
  constexpr int UNIT = BITS == 8 ? 64 : 128;
  const int of_unit = multipliers.fine ? 64 : 16, of_tile = multipliers.units * of_unit;
  Places<TILES> places;
#pragma unroll
  for (int half = 0; half < 2 * TILES; half++) {
    places.halves[half] = half > 0 && half * WARP + lane < stream.pieces ? half * WARP : 0;
  }
  places.codes = x.codes + min(lane / 4, x.tokens - 1) * x.stride + 8 * (lane % 4) + first_unit * UNIT;
  places.multiplier = multipliers.values + first_unit * of_unit + lane / 4;
  Sums<TILES> sums = {};
  for (int base = 0; base < stream.count; base += stream.room) {
    if (base > 0) wait_for_copies();
    const int here = min(stream.room, stream.count - base), again = stream.count - base - stream.room;
    places.piece = stream.slots + (lane < stream.pieces ? lane : 0);
#pragma unroll 1
    for (int slot = 0; slot < here; slot++) {
      if constexpr (BITS == 8) {
        add_unit_w8<TILES>(places, stream.pieces, sums);
      } else if (multipliers.fine) {
        add_unit_w4<TILES, true>(places, stream.pieces, of_tile, sums);
      } else {
        add_unit_w4<TILES, false>(places, stream.pieces, of_tile, sums);
      }
      if (slot < again) ask_for<2 * TILES>(stream, slot, base + slot + stream.room);
      places.piece += stream.pieces;
      places.codes += UNIT;
      places.multiplier += of_unit;
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = tile * 16 + lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
      if (row * 4 < stream.pieces && token < x.tokens) {
        const int sum = sums.parts[0][tile][i] + sums.parts[1][tile][i];
        atomicAdd(totals + token * rows_of_block + row, BITS == 4 ? sum >> 4 : sum);
      }
    }
  }
}

#endif
