// int8 products of 64 tokens by groups of four warps, a group a part: tokens and weights in shared memory, rows of 64
// bytes in eights of 512 bytes as `turned_place` says. W4 is unpacked and multiplied into int8 on its way. Include
// decode_wide_ptx.cuh and decode_batch_product.cuh first.
#ifndef QM_DECODE_BATCH_WIDE_CUH
#define QM_DECODE_BATCH_WIDE_CUH

#if QM_WIDE
constexpr int WIDE_TOKENS = 64;

// Two words of four codes times their group's multiplier, from a word of low and high nibbles in two's complement.
// (code + 8) m and 128 - 8 m together stay within a byte, and so does what one sign bit makes of it.
__device__ __forceinline__ uint2 multiplied_codes(unsigned int word, unsigned int multiplier) {
  const unsigned int offset = 0x80808080u - multiplier * 0x08080808u;
  const unsigned int low = (word & 0x0f0f0f0fu) ^ 0x08080808u, high = (word >> 4 & 0x0f0f0f0fu) ^ 0x08080808u;
  return make_uint2((low * multiplier + offset) ^ 0x80808080u, (high * multiplier + offset) ^ 0x80808080u);
}

// ROWS: of weights in one tensor-core product, what follows `tiles` of them is multiplied and left.
template <int BITS, typename Rows, int ROWS>
struct WideProduct : Ring<BITS, 2, Rows, true> {
  using Base = Ring<BITS, 2, Rows, true>;
  using Base::count, Base::first, Base::lane, Base::member, Base::of, Base::of_line, Base::of_slot, Base::part;
  using Base::MEMBERS, Base::SPANS, Base::TOKEN_SLOTS, Base::WEIGHT_COPIES;
  uint4* codes;  // (CODE_SLOTS, rows, 4 pieces); W4 only
  int line[WEIGHT_COPIES];
  int sums[ROWS / 2] = {};

  __device__ __forceinline__ WideProduct(const Factors& factors, const Rows& rows)
      : Base(factors, rows), codes(factors.unpacked + part * CODE_SLOTS * of_slot) {
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
      const int row = of.first_row + (member + k * MEMBERS) * 8 + lane / ROW_PIECES;
      line[k] = Base::weight_step[k] > 0 ? (rows.line(row) + Base::first_unit) * of_line + rows.in_line(row) : 0;
    }
  }

  // What this lane has asked for itself, a span of it, to the place where the group multiplies it.
  __device__ __forceinline__ void unpack(uint4* to, const uint4* w, int unit, int span_of_unit) const {
    const int next = of.fine ? TILE_ROWS : 0;
#pragma unroll
    for (int k = 0; k < WEIGHT_COPIES; k++) {
      if (Base::weight_step[k] == 0) continue;
      const int at = (member + k * MEMBERS) * WARP;
      const uint2 words = reinterpret_cast<const uint2*>(w + at + lane)[span_of_unit];
      const unsigned char* m = of.multipliers + line[k] + unit * of_line + 2 * span_of_unit * next;
      const uint2 low = multiplied_codes(words.x, m[0]), high = multiplied_codes(words.y, m[next]);
      to[at + turned_place(lane)] = make_uint4(low.x, low.y, high.x, high.y);
    }
  }

  // After the turn.
  __device__ __forceinline__ void multiply() {
    this->begin_tokens();
    int slot = 0, unit = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      wait_for_all_but<TOKEN_SLOTS - 2>();
      const uint4* w = Base::weights + slot * of_slot;
      if constexpr (BITS == 4) {
        uint4* unpacked = codes + i % CODE_SLOTS * of_slot;
        unpack(unpacked, w, unit, (first + i) % SPANS);
        w = unpacked;
      }
      wait_for_wide();
      publish_writes();
      // All members' copies and codes are there, and all are done with the span before.
      meet_threads(1 + part, MEMBERS * WARP);
      begin_wide();
      multiply_wide<ROWS>(sums, Base::tokens + i % TOKEN_SLOTS * WIDE_TOKENS * ROW_PIECES, w);
      commit_wide();
      if (i > 0) this->go_on(unit);
      if ((first + i) % SPANS == SPANS - 1) {
        unit++;
        slot = slot + 1 == of.room ? 0 : slot + 1;
      }
    }
    wait_for_wide();
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
    each_pair([&](int row, int token, int sum, int next) {
      int* to = partial + (part * of.tiles * TILE_ROWS + row) * pitch_of_rows(WIDE_TOKENS) + token;
      to[0] = sum;
      to[pitch_of_rows(WIDE_TOKENS)] = next;
    });
  }
  __device__ __forceinline__ void hand_over_tokens(int* partial) const {
    const int pitch = pitch_of_tokens(of.tiles);
    each_pair([&](int row, int token, int sum, int next) {
      *reinterpret_cast<int2*>(partial + (part * WIDE_TOKENS + token) * pitch + row) = make_int2(sum, next);
    });
  }
};
#endif

// Groups of 64 tokens take the wide product where the target has it.
__device__ constexpr bool is_wide(int shares) { return QM_WIDE && shares == 2; }
// By how many bits the sums are too large.
__device__ constexpr int shift_of(int bits, int shares) { return bits == 4 && !is_wide(shares) ? 4 : 0; }

// The product around this block's turn, and the sums of its parts to shared memory over what the product used: rows of
// tokens (parts, rows of all tiles, pitch_of_rows) or of weights' rows (parts, tokens, pitch_of_tokens). turn() waits
// for the producers; the groups of copies before this call are there by then.
template <bool BY_ROWS, typename Product, typename Turn>
__device__ __forceinline__ void run_product(Product product, int* partial, Turn turn) {
  product.begin();
  wait_for_all_but<1>();
  __syncthreads();
  turn();
  product.multiply();
  wait_for_all_but<0>();
  __syncthreads();
  if (BY_ROWS) {
    product.hand_over_rows(partial);
  } else {
    product.hand_over_tokens(partial);
  }
  __syncthreads();
}
template <int BITS, int SHARES, bool BY_ROWS, typename Rows, typename Turn>
__device__ __forceinline__ void run_product(const Factors& factors, const Rows& rows, int* partial, Turn turn) {
#if QM_WIDE
  if constexpr (is_wide(SHARES)) {
    if (factors.tiles <= 4) {
      run_product<BY_ROWS>(WideProduct<BITS, Rows, 64>(factors, rows), partial, turn);
    } else if (factors.tiles == 5) {
      run_product<BY_ROWS>(WideProduct<BITS, Rows, 80>(factors, rows), partial, turn);
    } else {
      run_product<BY_ROWS>(WideProduct<BITS, Rows, 96>(factors, rows), partial, turn);
    }
    return;
  }
#endif
  if constexpr (!is_wide(SHARES)) {
    run_product<BY_ROWS>(NarrowProduct<BITS, SHARES, Rows>(factors, rows), partial, turn);
  }
}

#endif
