// int8 products of 32 or 64 tokens with weights in the decode kernels' order; include decode_ptx.cuh and
// decode_weights.cuh first (which draws the pieces of a row).
//
// Parts of a block share the columns. Members of a part are warps that meet at its barrier: SHARES of 32 tokens by two
// sides of the rows. Operands are 16-byte pieces, as they lie:
//
//   weight   (row, 4 pieces) of a unit: 64 columns of W8, 128 of W4
//   tokens   (token, 4 pieces) of a span of 64 columns; piece q has the columns 8 q ... 8 q + 7 and 32 + 8 q ...
//            39 + 8 q
//
// Weights are asked for before the turn, `room` units of them; the rest and the tokens follow in rings.
#ifndef QM_DECODE_BATCH_PRODUCT_CUH
#define QM_DECODE_BATCH_PRODUCT_CUH

constexpr int TILE_ROWS = 16;    // of a tensor-core product
constexpr int TILE_TOKENS = 8;   // of one
constexpr int WARP_TILES = 4;    // token tiles of a warp
constexpr int SIDE_TILES = 3;    // tiles of rows of a warp, at most
constexpr int SIDES = 2;
constexpr int ROW_PIECES = 4;    // of a unit
constexpr int TILE_PIECES = TILE_ROWS * ROW_PIECES;

// Spans of tokens of a part on their way or in use; `room` is as large, or holds all.
__device__ constexpr int token_slots(int shares) { return shares == 1 ? 3 : 4; }

// Where column `column` of a unit of 64 is among the 64 bytes of its token.
__device__ __forceinline__ int place_of_column(int column) {
  return column % 32 / 8 * 16 + column / 32 * 8 + column % 8;
}

// Rows of in_proj's pack: tiles of 16 rows, each (units, rows, pieces).
struct TiledRows {
  int rows, units;
  __device__ __forceinline__ int height(int row) const { return min(TILE_ROWS, rows - row / TILE_ROWS * TILE_ROWS); }
  __device__ __forceinline__ bool has(int row) const { return row < rows; }
  // In pieces, of unit 0, and from one unit to the next.
  __device__ __forceinline__ int start(int row) const {
    return row / TILE_ROWS * TILE_PIECES * units + row % TILE_ROWS * ROW_PIECES;
  }
  __device__ __forceinline__ int step(int row) const { return height(row) * ROW_PIECES; }
  // Multipliers of a unit lie in lines of 16 rows.
  __device__ __forceinline__ int line(int row) const { return row / TILE_ROWS * units; }
  __device__ __forceinline__ int in_line(int row) const { return row % TILE_ROWS; }
};

// Rows of several blocks of out_proj's pack, each (units, `each` rows, pieces).
struct BlockRows {
  int rows, units, each;
  __device__ __forceinline__ bool has(int row) const { return row < rows; }
  __device__ __forceinline__ int start(int row) const {
    return (row / each * units * each + row % each) * ROW_PIECES;
  }
  __device__ __forceinline__ int step(int) const { return each * ROW_PIECES; }
  __device__ __forceinline__ int line(int row) const {
    const int lines = (each + TILE_ROWS - 1) / TILE_ROWS;
    return (row / each * lines + row % each / TILE_ROWS) * units;
  }
  __device__ __forceinline__ int in_line(int row) const { return row % each % TILE_ROWS; }
};

// What a block multiplies. Shared memory: `weights` (parts, room, tiles, 64 pieces), `tokens` (parts, token_slots,
// width, 4 pieces), `multipliers` as they lie in global memory.
struct Factors {
  const uint4* weight;
  const uint4* codes;  // (spans, width tokens, 4 pieces)
  uint4* weights;
  uint4* tokens;
  const unsigned char* multipliers;
  int width;             // tokens
  int tiles, first_row;  // tiles of 16 rows, at most SIDES * SIDE_TILES, and the first one's first row
  int first_span, spans;
  int room;
  int fine;              // as `Multipliers`
};

// Line `index` of `bytes` (a multiple of 16) of an array to shared memory, by the whole block and at once.
__device__ __forceinline__ void fill_block(unsigned char* to, const uint4* from, int index, int bytes) {
  for (int at = threadIdx.x; at < bytes / 16; at += blockDim.x) {
    reinterpret_cast<uint4*>(to)[at] = from[static_cast<long long>(index) * (bytes / 16) + at];
  }
  __syncthreads();
}

template <int BITS, int SHARES, typename Rows>
struct Product {
  static constexpr int MEMBERS = SIDES * SHARES;
  static constexpr int SPANS = BITS == 8 ? 1 : 2;  // of a unit
  // 32 pieces each that a member asks for: half tiles of a unit, token tiles of a span.
  static constexpr int WEIGHT_COPIES = 2 * SIDES * SIDE_TILES / MEMBERS;
  static constexpr int TOKEN_COPIES = WARP_TILES * SHARES / MEMBERS;
  static constexpr int TOKEN_SLOTS = token_slots(SHARES);
  static constexpr unsigned int HIGH = 0xf0f0f0f0u;

  const Factors& of;
  const int lane, part, member, side, of_slot, of_line;
  int first, count;            // spans of this part
  int first_unit, units;       // and the units that have them
  int asked, ask_slot;         // units asked for, and the next one's slot
  int asked_span;
  uint4 *weights, *tokens;
  const uint4* weight_at[WEIGHT_COPIES];
  int weight_step[WEIGHT_COPIES];  // 0 where there are no such rows
  const uint4* token_at;
  int line[SIDE_TILES][2];

  __device__ __forceinline__ Product(const Factors& factors, const Rows& rows)
      : of(factors), lane(threadIdx.x % WARP), part(threadIdx.x / (WARP * MEMBERS)),
        member(threadIdx.x / WARP % MEMBERS), side((member + part) % SIDES), of_slot(factors.tiles * TILE_PIECES),
        of_line(factors.fine ? 4 * TILE_ROWS : TILE_ROWS) {
    const int parts = blockDim.x / (WARP * MEMBERS);
    first = of.first_span + part * of.spans / parts;
    count = of.first_span + (part + 1) * of.spans / parts - first;
    first_unit = first / SPANS;
    units = (first + count + SPANS - 1) / SPANS - first_unit;
    weights = of.weights + part * of.room * of_slot + lane;
    tokens = of.tokens + part * TOKEN_SLOTS * of.width * ROW_PIECES + lane;
    token_at = of.codes + first * of.width * ROW_PIECES + member * WARP + lane;
    asked = ask_slot = asked_span = 0;
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
      const int half_tile = member + k * MEMBERS, row = of.first_row + half_tile * 8 + lane / ROW_PIECES;
      const bool is = half_tile < 2 * of.tiles && rows.has(row);
      weight_step[k] = is ? rows.step(row) : 0;
      weight_at[k] = of.weight + (is ? rows.start(row) + lane % ROW_PIECES + first_unit * weight_step[k] : 0);
    }
    if constexpr (BITS == 4) {
#pragma unroll
      for (int k = 0; k < SIDE_TILES; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int row = of.first_row + tile_of(k) * TILE_ROWS + half * 8 + lane / ROW_PIECES;
          if (!rows.has(row)) row = of.first_row;
          line[k][half] = (rows.line(row) + first_unit) * of_line + rows.in_line(row);
        }
      }
    }
  }

  __device__ __forceinline__ int side_tiles() const {
    const int most = (of.tiles + 1) / SIDES;
    return side == 0 ? most : of.tiles - most;
  }
  __device__ __forceinline__ int tile_of(int k) const { return side * ((of.tiles + 1) / SIDES) + k; }

  __device__ __forceinline__ void ask_weights() {
    uint4* to = weights + ask_slot * of_slot + member * WARP;
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
      if (weight_step[k] > 0) copy16(to + k * MEMBERS * WARP, weight_at[k]);
      weight_at[k] += weight_step[k];
    }
    asked++;
    ask_slot = ask_slot + 1 == of.room ? 0 : ask_slot + 1;
  }

  __device__ __forceinline__ void ask_tokens() {
    uint4* to = tokens + asked_span % TOKEN_SLOTS * of.width * ROW_PIECES + member * WARP;
#pragma unroll
    for (int k = 0; k < TOKEN_COPIES; k++) copy16(to + k * MEMBERS * WARP, token_at + k * MEMBERS * WARP);
    token_at += of.width * ROW_PIECES;
    asked_span++;
  }

  // Before the turn.
  __device__ __forceinline__ void begin() {
    while (asked < min(of.room, units)) ask_weights();
    commit_copies();
  }

  __device__ __forceinline__ void add_w8(int (&sums)[SIDE_TILES][WARP_TILES][4], const uint4* w,
                                         const uint4 (&b)[WARP_TILES]) {
#pragma unroll
    for (int k = 0; k < SIDE_TILES; k++) {
      if (k >= side_tiles()) break;
      const uint4 top = w[tile_of(k) * TILE_PIECES], low = w[tile_of(k) * TILE_PIECES + WARP];
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) {
        multiply_i8(sums[k][n], top.x, low.x, top.y, low.y, b[n].x, b[n].y);
      }
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) {
        multiply_i8(sums[k][n], top.z, low.z, top.w, low.w, b[n].z, b[n].w);
      }
    }
  }

  // Nibbles stay in the high half of their byte, where the sign is theirs: every sum is 16 times the true one.
  __device__ __forceinline__ void add_w4(int (&sums)[SIDE_TILES][WARP_TILES][4], const uint4* w,
                                         const uint4 (&b)[WARP_TILES], int unit, int span_of_unit) {
#pragma unroll
    for (int k = 0; k < SIDE_TILES; k++) {
      if (k >= side_tiles()) break;
      const uint2* halves = reinterpret_cast<const uint2*>(w + tile_of(k) * TILE_PIECES) + span_of_unit;
      const uint2 top = halves[0], low = halves[2 * WARP];
      const unsigned char *m_top = of.multipliers + line[k][0] + unit * of_line,
                          *m_low = of.multipliers + line[k][1] + unit * of_line;
      const int next = of.fine ? TILE_ROWS : 0, own = 2 * span_of_unit * next;
      const int m[2] = {m_top[own], m_low[own]};
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) {
        int group[4] = {};
        multiply_i8(group, (top.x << 4) & HIGH, (low.x << 4) & HIGH, top.x & HIGH, low.x & HIGH, b[n].x, b[n].y);
        if (!of.fine) {
          multiply_i8(group, (top.y << 4) & HIGH, (low.y << 4) & HIGH, top.y & HIGH, low.y & HIGH, b[n].z, b[n].w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[k][n][i] += m[i / 2] * group[i];
      }
      if (of.fine) {
        const int more[2] = {m_top[own + next], m_low[own + next]};
#pragma unroll
        for (int n = 0; n < WARP_TILES; n++) {
          int group[4] = {};
          multiply_i8(group, (top.y << 4) & HIGH, (low.y << 4) & HIGH, top.y & HIGH, low.y & HIGH, b[n].z, b[n].w);
#pragma unroll
          for (int i = 0; i < 4; i++) sums[k][n][i] += more[i / 2] * group[i];
        }
      }
    }
  }

  // After the turn: the sums of this block's parts to shared memory, over what the products used, as
  // `sums_of` reads them.
  __device__ __forceinline__ void run(int4* partial) {
    int sums[SIDE_TILES][WARP_TILES][4] = {};
    const int share = member / SIDES;
#pragma unroll
    for (int i = 0; i < TOKEN_SLOTS; i++) {
      if (i < count) ask_tokens();
      commit_copies();
    }
    int slot = 0, unit = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      wait_for_all_but<TOKEN_SLOTS - 2>();
      // All members' copies are there, and all are done with the span before.
      meet_threads(1 + part, MEMBERS * WARP);
      if (i > 0) {
        while (asked < units && asked < unit + of.room) ask_weights();
        if (asked_span < count) ask_tokens();
        commit_copies();
      }
      const uint4* x = tokens + (i % TOKEN_SLOTS * of.width + share * WARP_TILES * TILE_TOKENS) * ROW_PIECES;
      uint4 b[WARP_TILES];
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) b[n] = x[n * WARP];
      const uint4* w = weights + slot * of_slot;
      if constexpr (BITS == 8) {
        add_w8(sums, w, b);
      } else {
        add_w4(sums, w, b, unit, (first + i) % SPANS);
      }
      if ((first + i) % SPANS == SPANS - 1) {
        unit++;
        slot = slot + 1 == of.room ? 0 : slot + 1;
      }
    }
    wait_for_all_but<0>();
    __syncthreads();
    const int tiles = of.width / TILE_TOKENS;
    int4* to = partial + (part * of.tiles * tiles + share * WARP_TILES) * WARP + lane;
#pragma unroll
    for (int k = 0; k < SIDE_TILES; k++) {
      if (k >= side_tiles()) break;
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) {
        const int* s = sums[k][n];
        to[(tile_of(k) * tiles + n) * WARP] = make_int4(s[0], s[1], s[2], s[3]);
      }
    }
    __syncthreads();
  }
};

// The whole sums of one item of `tiles * width / 8 * 32`: rows (row, row, row + 8, row + 8), tokens (token, token + 1)
// of both.
struct Item {
  int row, token;
  int sums[4];
};
template <int BITS>
__device__ __forceinline__ Item sums_of(const int4* partial, int item, int parts, int items, int width) {
  const int lane = item % WARP, tile_of_all = item / WARP, tiles = width / TILE_TOKENS;
  int4 sum = partial[item];
#pragma unroll 4
  for (int part = 1; part < parts; part++) {
    const int4 more = partial[part * items + item];
    sum.x += more.x;
    sum.y += more.y;
    sum.z += more.z;
    sum.w += more.w;
  }
  constexpr int SHIFT = BITS == 4 ? 4 : 0;
  return {tile_of_all / tiles * TILE_ROWS + lane / 4, tile_of_all % tiles * TILE_TOKENS + lane % 4 * 2,
          {sum.x >> SHIFT, sum.y >> SHIFT, sum.z >> SHIFT, sum.w >> SHIFT}};
}

#endif
