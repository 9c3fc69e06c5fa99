// int8 products of 32 or 64 tokens with weights in the decode kernels' order; include carver.cuh, decode_ptx.cuh and
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
//
// decode_batch_wide.cuh has the product of 64 tokens where the target multiplies by groups of warps.
#ifndef QM_DECODE_BATCH_PRODUCT_CUH
#define QM_DECODE_BATCH_PRODUCT_CUH

constexpr int THREADS = 512;
constexpr int TILE_ROWS = 16;    // of a tensor-core product
constexpr int TILE_TOKENS = 8;   // of one
constexpr int WARP_TILES = 4;    // token tiles of a warp
constexpr int WARP_TOKENS = WARP_TILES * TILE_TOKENS;
constexpr int SIDE_TILES = 3;    // tiles of rows of a warp, at most
constexpr int SIDES = 2;
constexpr int ROW_PIECES = 4;    // of a unit
constexpr int TILE_PIECES = TILE_ROWS * ROW_PIECES;

// Spans of W4's weights of a part, unpacked.
constexpr int CODE_SLOTS = 2;
// Words in front of the operands.
constexpr int ARRIVAL_WORDS = 96;

// Spans of tokens of a part on their way or in use; `room` is as large, or holds all.
__device__ constexpr int token_slots(int shares) { return shares == 1 ? 3 : 4; }

// Where column `column` of a unit of 64 is among the 64 bytes of its token.
__device__ __forceinline__ int place_of_column(int column) {
  return column % 32 / 8 * 16 + column / 32 * 8 + column % 8;
}

// Ints from one row's sums to the next one's, and from one token's.
__device__ constexpr int pitch_of_rows(int tokens) { return tokens + 4; }
__device__ __forceinline__ int pitch_of_tokens(int tiles) { return tiles * TILE_ROWS + 8; }

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
  const uint4* codes;            // (spans, width tokens, 4 pieces)
  unsigned long long* arrivals;  // words that a wide product counts with
  uint4* weights;
  uint4* unpacked;               // (parts, CODE_SLOTS, tiles, 64 pieces), of a wide product of W4
  uint4* tokens;
  const unsigned char* multipliers;
  int width;             // tokens
  int tiles, first_row;  // tiles of 16 rows, at most SIDES * SIDE_TILES, and the first one's first row
  int first_span, spans;
  int room;
  int fine;              // as `Multipliers`
};

// Line `index` of `bytes` (a multiple of 16) of an array to shared memory, behind the back of the whole block.
__device__ __forceinline__ void copy_line(unsigned char* to, const uint4* from, int index, int bytes) {
  copy_block(to, from + static_cast<long long>(index) * (bytes / 16), bytes);
}

// Shared memory for the operands; the sums take its place. Rows of 64 bytes lie in eights of 512.
template <int BITS, int SHARES>
__device__ __forceinline__ Factors carve_factors(Carver& carver, int tiles, int room) {
  constexpr int TOKENS = SHARES * WARP_TOKENS, PARTS = THREADS / WARP / (SIDES * SHARES);
  carver.take<unsigned long long>(ARRIVAL_WORDS);
  carver.next += -reinterpret_cast<unsigned long long>(carver.next) % 512;
  Factors factors{};
  factors.arrivals = reinterpret_cast<unsigned long long*>(carver.next) - ARRIVAL_WORDS;
  factors.weights = carver.take<uint4>(PARTS * room * tiles * TILE_PIECES);
  factors.unpacked = carver.take<uint4>(BITS == 4 && SHARES == 2 ? PARTS * CODE_SLOTS * tiles * TILE_PIECES : 0);
  factors.tokens = carver.take<uint4>(PARTS * token_slots(SHARES) * TOKENS * ROW_PIECES);
  factors.width = TOKENS;
  factors.tiles = tiles;
  factors.room = room;
  return factors;
}

// What the members of a part ask for, and where it goes.
template <int BITS, int SHARES, typename Rows>
struct Ring {
  static constexpr int MEMBERS = SIDES * SHARES;
  static constexpr int SPANS = BITS == 8 ? 1 : 2;  // of a unit
  // 32 pieces each that a member asks for: half tiles of a unit, token tiles of a span.
  static constexpr int WEIGHT_COPIES = 2 * SIDES * SIDE_TILES / MEMBERS;
  static constexpr int TOKEN_COPIES = WARP_TILES * SHARES / MEMBERS;
  static constexpr int TOKEN_SLOTS = token_slots(SHARES);

  const Factors& of;
  const int lane, part, member, of_slot, of_line;
  int first, count;            // spans of this part
  int first_unit, units;       // and the units that have them
  int asked, ask_slot;         // units asked for, and the next one's slot
  int asked_span;
  uint4 *weights, *tokens;
  const uint4* weight_at[WEIGHT_COPIES];
  int weight_step[WEIGHT_COPIES];  // 0 where there are no such rows
  const uint4* token_at;

  __device__ __forceinline__ Ring(const Factors& factors, const Rows& rows)
      : of(factors), lane(threadIdx.x % WARP), part(threadIdx.x / (WARP * MEMBERS)),
        member(threadIdx.x / WARP % MEMBERS), of_slot(factors.tiles * TILE_PIECES),
        of_line(factors.fine ? 4 * TILE_ROWS : TILE_ROWS) {
    const int parts = blockDim.x / (WARP * MEMBERS);
    first = of.first_span + part * of.spans / parts;
    count = of.first_span + (part + 1) * of.spans / parts - first;
    first_unit = first / SPANS;
    units = (first + count + SPANS - 1) / SPANS - first_unit;
    weights = of.weights + part * of.room * of_slot;
    tokens = of.tokens + part * TOKEN_SLOTS * of.width * ROW_PIECES;
    token_at = of.codes + first * of.width * ROW_PIECES + member * WARP + lane;
    asked = ask_slot = asked_span = 0;
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
      const int half_tile = member + k * MEMBERS, row = of.first_row + half_tile * 8 + lane / ROW_PIECES;
      const bool is = half_tile < 2 * of.tiles && rows.has(row);
      weight_step[k] = is ? rows.step(row) : 0;
      weight_at[k] = of.weight + (is ? rows.start(row) + lane % ROW_PIECES + first_unit * weight_step[k] : 0);
    }
  }

  __device__ __forceinline__ void ask_weights() {
    uint4* to = weights + ask_slot * of_slot + member * WARP + lane;
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
      if (weight_step[k] > 0) copy16(to + k * MEMBERS * WARP, weight_at[k]);
      weight_at[k] += weight_step[k];
    }
    asked++;
    ask_slot = ask_slot + 1 == of.room ? 0 : ask_slot + 1;
  }

  __device__ __forceinline__ void ask_tokens() {
    uint4* to = tokens + asked_span % TOKEN_SLOTS * of.width * ROW_PIECES + member * WARP + lane;
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

  // After the turn.
  __device__ __forceinline__ void begin_tokens() {
#pragma unroll
    for (int i = 0; i < TOKEN_SLOTS; i++) {
      if (i < count) ask_tokens();
      commit_copies();
    }
  }

  // Behind the barrier of the part at span i > 0: what the span before it used is free.
  __device__ __forceinline__ void go_on(int unit) {
    while (asked < units && asked < unit + of.room) ask_weights();
    if (asked_span < count) ask_tokens();
    commit_copies();
  }
};

// By single warps.
template <int BITS, int SHARES, typename Rows>
struct NarrowProduct : Ring<BITS, SHARES, Rows> {
  using Base = Ring<BITS, SHARES, Rows>;
  using Base::count, Base::first, Base::lane, Base::member, Base::of, Base::of_line, Base::of_slot, Base::part;
  using Base::MEMBERS, Base::SPANS, Base::TOKEN_SLOTS;
  static constexpr unsigned int HIGH = 0xf0f0f0f0u;
  const int side;
  int line[SIDE_TILES][2];
  int sums[SIDE_TILES][WARP_TILES][4] = {};

  __device__ __forceinline__ NarrowProduct(const Factors& factors, const Rows& rows)
      : Base(factors, rows), side((member + part) % SIDES) {
    if constexpr (BITS == 4) {
#pragma unroll
      for (int k = 0; k < SIDE_TILES; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int row = of.first_row + tile_of(k) * TILE_ROWS + half * 8 + lane / ROW_PIECES;
          if (!rows.has(row)) row = of.first_row;
          line[k][half] = (rows.line(row) + Base::first_unit) * of_line + rows.in_line(row);
        }
      }
    }
  }

  __device__ __forceinline__ int side_tiles() const {
    const int most = (of.tiles + 1) / SIDES;
    return side == 0 ? most : of.tiles - most;
  }
  __device__ __forceinline__ int tile_of(int k) const { return side * ((of.tiles + 1) / SIDES) + k; }

  __device__ __forceinline__ void add_w8(const uint4* w, const uint4 (&b)[WARP_TILES]) {
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
  __device__ __forceinline__ void add_w4(const uint4* w, const uint4 (&b)[WARP_TILES], int unit, int span_of_unit) {
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

  // After the turn.
  __device__ __forceinline__ void multiply() {
    const int share = member / SIDES;
    this->begin_tokens();
    int slot = 0, unit = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      wait_for_all_but<TOKEN_SLOTS - 2>();
      // All members' copies are there, and all are done with the span before.
      meet_threads(1 + part, MEMBERS * WARP);
      if (i > 0) this->go_on(unit);
      const uint4* x =
          Base::tokens + (i % TOKEN_SLOTS * of.width + share * WARP_TILES * TILE_TOKENS) * ROW_PIECES + lane;
      uint4 b[WARP_TILES];
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) b[n] = x[n * WARP];
      const uint4* w = Base::weights + slot * of_slot + lane;
      if constexpr (BITS == 8) {
        add_w8(w, b);
      } else {
        add_w4(w, b, unit, (first + i) % SPANS);
      }
      if ((first + i) % SPANS == SPANS - 1) {
        unit++;
        slot = slot + 1 == of.room ? 0 : slot + 1;
      }
    }
  }

  // This thread's sums to store(row, token, sum of that token, sum of the next).
  template <typename Store>
  __device__ __forceinline__ void each_pair(Store store) const {
    const int share = member / SIDES;
#pragma unroll
    for (int k = 0; k < SIDE_TILES; k++) {
      if (k >= side_tiles()) break;
      const int row = tile_of(k) * TILE_ROWS + lane / 4;
#pragma unroll
      for (int n = 0; n < WARP_TILES; n++) {
        const int* s = sums[k][n];
        const int token = (share * WARP_TILES + n) * TILE_TOKENS + lane % 4 * 2;
        store(row, token, s[0], s[1]);
        store(row + 8, token, s[2], s[3]);
      }
    }
  }
  __device__ __forceinline__ void hand_over_rows(int* partial) const {
    each_pair([&](int row, int token, int sum, int next) {
      int* to = partial + (part * of.tiles * TILE_ROWS + row) * pitch_of_rows(of.width) + token;
      *reinterpret_cast<int2*>(to) = make_int2(sum, next);
    });
  }
  __device__ __forceinline__ void hand_over_tokens(int* partial) const {
    const int pitch = pitch_of_tokens(of.tiles);
    each_pair([&](int row, int token, int sum, int next) {
      int* to = partial + (part * of.width + token) * pitch + row;
      to[0] = sum;
      to[pitch] = next;
    });
  }
};

// Four sums of all parts, which are `stride` apart.
template <int SHIFT>
__device__ __forceinline__ int4 sums_of(const int* partial, int parts, int stride) {
  int4 sum = *reinterpret_cast<const int4*>(partial);
#pragma unroll 4
  for (int part = 1; part < parts; part++) {
    const int4 more = *reinterpret_cast<const int4*>(partial + part * stride);
    sum.x += more.x;
    sum.y += more.y;
    sum.z += more.z;
    sum.w += more.w;
  }
  return make_int4(sum.x >> SHIFT, sum.y >> SHIFT, sum.z >> SHIFT, sum.w >> SHIFT);
}

#endif
