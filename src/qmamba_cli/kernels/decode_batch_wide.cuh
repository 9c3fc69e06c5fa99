// int8 products of 64 tokens by groups of four warps, a group a part: tokens and weights in shared memory, rows of 64
// bytes in eights of 512 bytes as `turned_place` says. W4 is unpacked and multiplied into int8 on its way. Include
// decode_wide_ptx.cuh and decode_batch_product.cuh first.
#ifndef QM_DECODE_BATCH_WIDE_CUH
#define QM_DECODE_BATCH_WIDE_CUH

// A product's sums to shared memory as `run_product` says.
template <bool BY_ROWS, typename Product>
__device__ __forceinline__ void hand_over(const Product& product, int* partial) {
  if (BY_ROWS) {
    product.hand_over_rows(partial);
  } else {
    product.hand_over_tokens(partial);
  }
}

#if QM_WIDE
constexpr int WIDE_TOKENS = 64;
constexpr int GROUP_WARPS = 4;
constexpr int GROUP = GROUP_WARPS * WARP;

// Where piece `lane` of eight rows of 64 bytes lies: what the rows have of one column is in different banks.
__device__ __forceinline__ int turned_place(int lane) { return lane ^ lane / 8 % 4; }

// A part's units, and where they go.
struct Share {
  int first_unit, units;
  unsigned long long* words;  // of arrivals
  uint4 *weights, *unpacked, *tokens;
};

// Two words of four codes times their group's multiplier, from a word of low and high nibbles in two's complement.
// (code + 8) m and 128 - 8 m together stay within a byte; the sign bit turned, the byte is code m.
__device__ __forceinline__ uint2 multiplied_codes(unsigned int word, unsigned int multiplier) {
  const unsigned int offset = 0x80808080u - multiplier * 0x08080808u;
  const unsigned int low = (word & 0x0f0f0f0fu) ^ 0x08080808u, high = (word >> 4 & 0x0f0f0f0fu) ^ 0x08080808u;
  return make_uint2((low * multiplier + offset) ^ 0x80808080u, (high * multiplier + offset) ^ 0x80808080u);
}

// Words of arrivals of a part: units of weights, spans of tokens, and spans that have been used.
constexpr int MOST_ROOM = 16;
constexpr int WIDE_SLOTS = token_slots(2);
constexpr int WORDS_OF_PART = MOST_ROOM + 2 * WIDE_SLOTS;

// One of the warps behind the multiplying ones: asks for everything that its part multiplies. The ring of weights holds
// all units of the part, or two at least.
template <int BITS, typename Rows>
struct Asker {
  static constexpr int SPANS = BITS == 8 ? 1 : 2, COPIES = 2 * SIDES * SIDE_TILES;
  const Factors& of;
  const Share share;
  const int lane;
  int asked, slot;  // units, and the next one's slot
  int at[COPIES], step[COPIES];

  __device__ __forceinline__ Asker(const Factors& factors, const Rows& rows, const Share& of_part)
      : of(factors), share(of_part), lane(threadIdx.x % WARP), asked(0), slot(0) {
#pragma unroll
    for (int k = 0; k < COPIES; k++) {
      const int row = of.first_row + k * 8 + lane / ROW_PIECES;
      step[k] = k < 2 * of.tiles && rows.has(row) ? rows.step(row) : 0;
      at[k] = step[k] > 0 ? rows.start(row) + lane % ROW_PIECES + share.first_unit * step[k] : 0;
    }
  }

  __device__ __forceinline__ void ask_weights(int until) {
    for (; asked < min(until, share.units); asked++) {
      uint4* to = share.weights + slot * of.tiles * TILE_PIECES + (BITS == 8 ? turned_place(lane) : lane);
#pragma unroll
      for (int k = 0; k < COPIES; k++) {
        if (step[k] > 0) copy16(to + k * WARP, of.weight + at[k]);
        at[k] += step[k];
      }
      arrive_after_copies(share.words + slot);
      slot = slot + 1 == of.room ? 0 : slot + 1;
    }
  }

  // After the turn.
  __device__ __forceinline__ void run() {
    const int count = share.units * SPANS;
    const uint4* from = of.codes + share.first_unit * SPANS * WIDE_TOKENS * ROW_PIECES + lane;
    for (int i = 0; i < count || asked < share.units; i++) {
      const int token_slot = i % WIDE_SLOTS;
      if (i >= WIDE_SLOTS) {
        await_arrivals(share.words + MOST_ROOM + WIDE_SLOTS + token_slot, (i / WIDE_SLOTS - 1) % 2);
      }
      if (i < count) {
        uint4* to = share.tokens + token_slot * WIDE_TOKENS * ROW_PIECES + turned_place(lane);
#pragma unroll
        for (int k = 0; k < WIDE_TOKENS * ROW_PIECES / WARP; k++) copy16(to + k * WARP, from + k * WARP);
        from += WIDE_TOKENS * ROW_PIECES;
        arrive_after_copies(share.words + MOST_ROOM + token_slot);
      }
      if (i >= WIDE_SLOTS) ask_weights(of.room + (i - WIDE_SLOTS + 1) / SPANS);
    }
  }
};

// A group of four warps. ROWS: of weights in one tensor-core product, what follows `tiles` of them is multiplied and
// left.
template <int BITS, typename Rows, int ROWS>
struct WideProduct {
  static constexpr int SPANS = BITS == 8 ? 1 : 2, HALF_TILES = SIDE_TILES;  // that a warp unpacks, at most
  const Factors& of;
  const Share share;
  const int lane, part, member;
  int line[HALF_TILES];  // of the next unit's multipliers, W4 only
  int sums[ROWS / 2] = {};

  __device__ __forceinline__ WideProduct(const Factors& factors, const Rows& rows, const Share& of_part)
      : of(factors), share(of_part), lane(threadIdx.x % WARP), part(threadIdx.x / GROUP),
        member(threadIdx.x / WARP % GROUP_WARPS) {
#pragma unroll
    for (int k = 0; k < HALF_TILES; k++) {
      const int row = of.first_row + (member + k * GROUP_WARPS) * 8 + lane / ROW_PIECES;
      line[k] = rows.has(row) ? (rows.line(row) + share.first_unit) * line_step() + rows.in_line(row) : 0;
    }
  }
  __device__ __forceinline__ int line_step() const { return of.fine ? 4 * TILE_ROWS : TILE_ROWS; }

  __device__ __forceinline__ const uint4* tokens_of(int i) const {
    return share.tokens + i % WIDE_SLOTS * WIDE_TOKENS * ROW_PIECES;
  }
  __device__ __forceinline__ void await_tokens(int i) const {
    await_arrivals(share.words + MOST_ROOM + i % WIDE_SLOTS, i / WIDE_SLOTS % 2);
  }
  __device__ __forceinline__ void free_tokens(int i) const {
    if (lane == 0) arrive(share.words + MOST_ROOM + WIDE_SLOTS + i % WIDE_SLOTS);
  }

  __device__ __forceinline__ void multiply_w8() {
    int slot = 0, parity = 0;
#pragma unroll 1
    for (int i = 0; i < share.units; i++) {
      await_arrivals(share.words + slot, parity);
      await_tokens(i);
      publish_writes();
      begin_wide();
      multiply_wide<ROWS>(sums, tokens_of(i), share.weights + slot * of.tiles * TILE_PIECES);
      commit_wide();
      wait_for_wide<1>();
      if (i > 0) free_tokens(i - 1);
      if (++slot == of.room) slot = 0, parity ^= 1;
    }
    wait_for_wide<0>();
  }

  // A unit of this warp's half tiles to both of its spans as int8.
  __device__ __forceinline__ void unpack(uint4* to, const uint4* w, int span) {
#pragma unroll
    for (int k = 0; k < HALF_TILES; k++) {
      const int half_tile = member + k * GROUP_WARPS;
      if (half_tile >= 2 * of.tiles) break;
      const uint4 piece = w[half_tile * WARP + lane];
      const unsigned char* m = of.multipliers + line[k];
      line[k] += line_step();
      unsigned int by[4] = {m[0], m[0], m[0], m[0]};
      if (of.fine) {
#pragma unroll
        for (int s = 1; s < 4; s++) by[s] = m[s * TILE_ROWS];
      }
      uint4* there = to + half_tile * WARP + turned_place(lane);
      const uint2 a = multiplied_codes(piece.x, by[0]), b = multiplied_codes(piece.y, by[1]);
      there[0] = make_uint4(a.x, a.y, b.x, b.y);
      const uint2 c = multiplied_codes(piece.z, by[2]), d = multiplied_codes(piece.w, by[3]);
      there[span] = make_uint4(c.x, c.y, d.x, d.y);
    }
  }

  __device__ __forceinline__ void multiply_w4() {
    const int span = of.tiles * TILE_PIECES;
    int slot = 0, parity = 0;
#pragma unroll 1
    for (int i = 0; i < share.units; i++) {
      await_arrivals(share.words + slot, parity);
      wait_for_wide<0>();
      if (i > 0) {
        free_tokens(2 * i - 2);
        free_tokens(2 * i - 1);
      }
      // All are done with the unit before.
      meet_threads(1 + part, GROUP);
      unpack(share.unpacked, share.weights + slot * span, span);
      await_tokens(2 * i);
      await_tokens(2 * i + 1);
      publish_writes();
      meet_threads(1 + part, GROUP);
      begin_wide();
      multiply_wide<ROWS>(sums, tokens_of(2 * i), share.unpacked);
      multiply_wide<ROWS>(sums, tokens_of(2 * i + 1), share.unpacked + span);
      commit_wide();
      if (++slot == of.room) slot = 0, parity ^= 1;
    }
    wait_for_wide<0>();
  }

  // This thread's sums to store(row, token, sum of that row, sum of the next).
  template <typename Store>
  __device__ __forceinline__ void each_pair(Store store) const {
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++) {
      if (n >= 2 * of.tiles) break;
      const int row = n * 8 + lane % 4 * 2, token = member * 16 + lane / 4;
      store(row, token, sums[4 * n], sums[4 * n + 1]);
      store(row, token + 8, sums[4 * n + 2], sums[4 * n + 3]);
    }
  }
  __device__ __forceinline__ void hand_over_rows(int* partial) const {
    constexpr int PITCH = pitch_of_rows(WIDE_TOKENS);
    each_pair([&](int row, int token, int sum, int next) {
      int* to = partial + (part * of.tiles * TILE_ROWS + row) * PITCH + token;
      to[0] = sum;
      to[PITCH] = next;
    });
  }
  __device__ __forceinline__ void hand_over_tokens(int* partial) const {
    const int pitch = pitch_of_tokens(of.tiles);
    each_pair([&](int row, int token, int sum, int next) {
      *reinterpret_cast<int2*>(partial + (part * WIDE_TOKENS + token) * pitch + row) = make_int2(sum, next);
    });
  }
};

// What a group of four warps does after the turn.
template <int BITS, int ROWS, bool BY_ROWS, typename Rows>
__device__ __forceinline__ void multiply_share(const Factors& factors, const Rows& rows, const Share& share,
                                               int* partial) {
  WideProduct<BITS, Rows, ROWS> product(factors, rows, share);
  if (BITS == 8) {
    product.multiply_w8();
  } else {
    product.multiply_w4();
  }
  wait_for_copies();
  __syncthreads();
  hand_over<BY_ROWS>(product, partial);
}

// As `run_product`: parts share the units, and a part is four warps that multiply and one, behind them all, that asks.
template <int BITS, bool BY_ROWS, typename Rows, typename Turn>
__device__ __forceinline__ void run_wide(const Factors& factors, const Rows& rows, int* partial, Turn turn) {
  constexpr int SPANS = BITS == 8 ? 1 : 2, PARTS = THREADS / GROUP;
  const bool asks = static_cast<int>(threadIdx.x) >= THREADS;
  const int part = asks ? (threadIdx.x - THREADS) / WARP : threadIdx.x / GROUP;
  const int first = factors.first_span / SPANS, units = factors.spans / SPANS, span = factors.tiles * TILE_PIECES;
  Share share;
  share.first_unit = first + part * units / PARTS;
  share.units = first + (part + 1) * units / PARTS - share.first_unit;
  share.words = factors.arrivals + part * WORDS_OF_PART;
  share.weights = factors.weights + part * factors.room * span;
  share.unpacked = factors.unpacked + part * CODE_SLOTS * span;
  share.tokens = factors.tokens + part * WIDE_SLOTS * WIDE_TOKENS * ROW_PIECES;
  for (int i = threadIdx.x; i < PARTS * WORDS_OF_PART; i += blockDim.x) {
    begin_arrivals(factors.arrivals + i, i % WORDS_OF_PART < MOST_ROOM + WIDE_SLOTS ? WARP : GROUP_WARPS);
  }
  __syncthreads();
  if (asks) {
    Asker<BITS, Rows> asker(factors, rows, share);
    asker.ask_weights(factors.room);
    commit_copies();
    wait_for_all_but<1>();
    __syncthreads();
    turn();
    asker.run();
    wait_for_copies();
    __syncthreads();
  } else {
    wait_for_copies();
    __syncthreads();
    turn();
    if (factors.tiles <= 4) {
      multiply_share<BITS, 64, BY_ROWS>(factors, rows, share, partial);
    } else if (factors.tiles == 5) {
      multiply_share<BITS, 80, BY_ROWS>(factors, rows, share, partial);
    } else {
      multiply_share<BITS, 96, BY_ROWS>(factors, rows, share, partial);
    }
  }
  // The block has met behind the last wait; the words may be begun again.
  for (int i = threadIdx.x; i < PARTS * WORDS_OF_PART; i += blockDim.x) end_arrivals(factors.arrivals + i);
  __syncthreads();
}
#endif

// Groups of 64 tokens take the wide product where the target has it.
__device__ constexpr bool is_wide(int shares) { return QM_WIDE && shares == 2; }
// Threads of a block: of wide products one warp a part asks beside the four that multiply.
__device__ constexpr int block_threads(int shares) { return is_wide(shares) ? THREADS / 4 * 5 : THREADS; }
// By how many bits the sums are too large.
__device__ constexpr int shift_of(int bits, int shares) { return bits == 4 && !is_wide(shares) ? 4 : 0; }

// The product around this block's turn, and the sums of its parts to shared memory over what the product used: rows of
// tokens (parts, rows of all tiles, pitch_of_rows) or of weights' rows (parts, tokens, pitch_of_tokens). turn() waits
// for the producers; the copies that were asked for before this call are there by then.
template <int BITS, int SHARES, bool BY_ROWS, typename Rows, typename Turn>
__device__ __forceinline__ void run_product(const Factors& factors, const Rows& rows, int* partial, Turn turn) {
  if constexpr (is_wide(SHARES)) {
#if QM_WIDE
    run_wide<BITS, BY_ROWS>(factors, rows, partial, turn);
#endif
  } else {
    NarrowProduct<BITS, SHARES, Rows> product(factors, rows);
    product.begin();
    wait_for_all_but<1>();
    __syncthreads();
    turn();
    product.multiply();
    wait_for_copies();
    __syncthreads();
    hand_over<BY_ROWS>(product, partial);
    __syncthreads();
  }
}

#endif
