// The decode kernel that makes the scan step; include decode_columns.cuh first.
#ifndef QM_DECODE_SCAN_CUH
#define QM_DECODE_SCAN_CUH

// Lanes of a channel, each with two states.
constexpr int LANES = 8;
constexpr int SCAN_THREADS = 512;
constexpr int MAX_PIECES = 2;  // of a row of dt_proj a lane, 16 columns each

// Sums over a channel's lanes of COUNT values each; lane l is left with the sum of value l % COUNT.
template <int COUNT, typename T>
__device__ __forceinline__ T spread_sum(T (&values)[COUNT], int lane) {
#pragma unroll
  for (int o = COUNT / 2; o >= 1; o /= 2) {
#pragma unroll
    for (int e = 0; e < o; e++) {
      const T sent = (lane & o) ? values[e] : values[e + o], kept = (lane & o) ? values[e + o] : values[e];
      values[e] = kept + __shfl_xor_sync(ALL_LANES, sent, o);
    }
  }
  T sum = values[0];
#pragma unroll
  for (int o = COUNT; o < LANES; o *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, o);
  return sum;
}

// Two neighbouring states of every token, of the first from `at`, an even index, of the next `stride` behind it; as
// they are stored, so that nothing waits for them yet.
template <int TOKENS>
__device__ __forceinline__ void fetch_states(const void* state, long long at, long long stride, int tokens,
                                             float inv_scale, uint2 (&stored)[TOKENS]) {
#pragma unroll
  for (int token = 0; token < TOKENS; token++) stored[token] = make_uint2(0u, 0u);
  if (inv_scale == 0.0f) {
    const float* from = static_cast<const float*>(state) + at;
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      if (token < tokens) stored[token] = load_fresh(reinterpret_cast<const uint2*>(from + token * stride));
    }
  } else {
    const signed char* from = static_cast<const signed char*>(state) + at;
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      if (token < tokens) stored[token].x = load_fresh(reinterpret_cast<const unsigned short*>(from + token * stride));
    }
  }
}
__device__ __forceinline__ float2 states_of(const uint2& stored, float scale, float inv_scale) {
  if (inv_scale == 0.0f) return make_float2(qm_from_bits(stored.x), qm_from_bits(stored.y));
  return make_float2(qm_i8_to_f32(stored.x) * scale, qm_i8_to_f32(stored.x >> 8) * scale);
}
__device__ __forceinline__ void store_states(void* state, long long at, const float2& h, float inv_scale) {
  if (inv_scale == 0.0f) {
    *reinterpret_cast<float2*>(static_cast<float*>(state) + at) = h;
  } else {
    const unsigned int low = static_cast<unsigned char>(qm_quantize(h.x, inv_scale));
    const unsigned int high = static_cast<unsigned char>(qm_quantize(h.y, inv_scale));
    *reinterpret_cast<unsigned short*>(static_cast<signed char*>(state) + at) =
        static_cast<unsigned short>(low | high << 8);
  }
}

// The rows of x_proj from the blocks' sums (copies, tokens, x_rows), on the grid: the first `rank` to dt_low
// (tokens, dt_bytes), the next 32 as real B and C to bc (tokens, 32). A thread has ROUNDS items under way.
struct ProjectionGrid {
  const float* factor;  // (x_rows,) real units a step of a sum
  float own_factor;     // of row threadIdx.x % x_rows, read ahead
  float scale, inv_scale;
};
template <int ROUNDS>
__device__ __forceinline__ void requantize_projections(const int* x_sums, const ProjectionGrid& grid,
                                                       signed char* dt_low, float* bc, int tokens, int x_rows,
                                                       int copies, int rank, int dt_bytes) {
  const int items = tokens * x_rows;
  for (int base = threadIdx.x; base < items; base += ROUNDS * blockDim.x) {
    int sums[ROUNDS];
    float factors[ROUNDS];
    // All that is under way before anything is waited for.
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int item = base + r * blockDim.x;
      sums[r] = item < items ? load_fresh(x_sums + item) : 0;
      factors[r] = item == static_cast<int>(threadIdx.x) ? grid.own_factor : grid.factor[item % x_rows];
    }
#pragma unroll 1
    for (int copy = 1; copy < copies; copy++) {
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        const int item = base + r * blockDim.x;
        if (item < items) sums[r] += load_fresh(x_sums + copy * items + item);
      }
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int item = base + r * blockDim.x, token = token_of(item, x_rows, tokens);
      const int row = item - token * x_rows;
      if (item < items) {
        const signed char code = qm_quantize(static_cast<float>(sums[r]) * factors[r], grid.inv_scale);
        if (row < rank) {
          dt_low[token * dt_bytes + row] = code;
        } else if (row < rank + 2 * STATES) {
          bc[token * 2 * STATES + row - rank] = qm_dequantize(code, grid.scale);
        }
      }
    }
  }
}

// One piece of a row of dt_proj against a token's dt_low.
__device__ __forceinline__ int dot16(const uint4& w, const uint4& x, int dot) {
  dot = __dp4a(static_cast<int>(w.x), static_cast<int>(x.x), dot);
  dot = __dp4a(static_cast<int>(w.y), static_cast<int>(x.y), dot);
  dot = __dp4a(static_cast<int>(w.z), static_cast<int>(x.z), dot);
  return __dp4a(static_cast<int>(w.w), static_cast<int>(x.w), dot);
}

// Drops the oldest scale of every token's conv history (tokens, taps - 1) and appends the newest.
__device__ __forceinline__ void move_scales(const float* x_absmax, float* history_scale, int tokens, int taps) {
  const int lane = threadIdx.x % WARP;
  for (int token = threadIdx.x / WARP; token < tokens; token += blockDim.x / WARP) {
    const float newest = token_scale(x_absmax + token * BLOCKS);
    float* scales = history_scale + token * (taps - 1);
    const float moved = lane < taps - 2 ? load_fresh(scales + lane + 1) : newest;
    __syncwarp();
    if (lane < taps - 1) scales[lane] = moved;
  }
}

// Grid: 128 blocks of 8 HK threads; 8 lanes a channel. TOKENS is `tokens` rounded up; what is computed for tokens
// behind the last is not stored.
template <int TOKENS>
__global__ void __launch_bounds__(SCAN_THREADS)
    decode_scan(const int* x_sums,                 // (copies, tokens, x_rows)
                const float* x_factor,             // (x_rows,) real units a step of a sum
                const uint4* dt_weight,            // (128, hk, dt_pieces) of 16 columns
                const float2* A_log2e,             // (128, hk, 8) pairs
                const float* constants,            // (128, 3, hk): dt_proj's factor, dt_bias, D
                const unsigned long long* core,    // (hk,) rows of H_HK, bit k: entry k is -1
                const float* u_gate,               // (tokens, 128, 2, hk)
                void* state,                       // (tokens, d_inner, 16)
                float* y,                          // (tokens, hk, 128) out
                const float* x_absmax,             // (tokens, 128); dynamic conv input only
                float* history_scale,              // (tokens, taps - 1) or null, moved on by one token
                float* residual,                   // (d_model,), to which `out_sums` are added
                int* out_sums,                     // (d_model,) of decode_out_columns, cleared; or null
                const float* out_constants,        // (128, 2, out_rows) of the block before
                const int* before, int* mine, int* stale,  // counters; `stale` are cleared, a line apart
                float bc_scale, float inv_bc_scale, float dt_scale, float inv_dt_scale, float state_scale,
                float inv_state_scale,             // 0: float32 states
                int tokens, int hk, int rank, int x_rows, int copies, int dt_pieces, int taps, int d_model,
                int out_rows, int full, int late, int stale_count) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Turn turn{before, full, mine, late};
  STAMP(2, 0)
  announce(turn);
  Carver carver{shared};
  signed char* dt_low = carver.take<signed char>(TOKENS * dt_pieces * 16);
  float* bc = carver.take<float>(TOKENS * 2 * STATES);  // B, then C
  float* gated = carver.take<float>(TOKENS * hk);
  const int lane = threadIdx.x % WARP, ch = threadIdx.x / LANES, n = threadIdx.x % LANES;
  const int own = n % TOKENS;  // the token whose sums end in this lane
  const int block = blockIdx.x;
  const long long d_inner = static_cast<long long>(hk) * BLOCKS, channel = block + BLOCKS * ch;

  uint4 w[MAX_PIECES];
#pragma unroll
  for (int i = 0; i < MAX_PIECES; i++) {
    w[i] = make_uint4(0u, 0u, 0u, 0u);
    if (n + i * LANES < dt_pieces) w[i] = dt_weight[(block * hk + ch) * dt_pieces + n + i * LANES];
  }
  const float2 a = A_log2e[(block * hk + ch) * LANES + n];
  const float dt_factor = constants[block * 3 * hk + ch], dt_bias = constants[(block * 3 + 1) * hk + ch];
  const float skip = constants[(block * 3 + 2) * hk + ch];
  const unsigned long long signs = core[ch];
  const float own_factor = x_factor[threadIdx.x % x_rows];
  const int state_bytes = inv_state_scale == 0.0f ? 4 : 1;
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    if (n == 0 && token < tokens) {
      prefetch_line(static_cast<char*>(state) + (token * d_inner + channel) * STATES * state_bytes);
    }
  }
  const int own_row = block * out_rows + static_cast<int>(threadIdx.x);
  const bool settles = TOKENS == 1 && out_sums != nullptr && own_row < min(d_model, (block + 1) * out_rows);
  const float* out_constant = row_constants({out_sums, out_constants, out_rows}, settles ? own_row : 0);
  const float out_scale = settles ? out_constant[0] : 0.0f, out_bias = settles ? out_constant[out_rows] : 0.0f;
  for (int i = threadIdx.x; i < TOKENS * dt_pieces * 16; i += blockDim.x) dt_low[i] = 0;
  for (int i = threadIdx.x; i < TOKENS * 2 * STATES; i += blockDim.x) bc[i] = 0.0f;
  __syncthreads();

  await_turn(turn);
  STAMP(2, 1)
  if (block == 0 && static_cast<int>(threadIdx.x) < stale_count) stale[threadIdx.x * COUNTER_STRIDE] = 0;
  uint2 stored[TOKENS];
  fetch_states<TOKENS>(state, channel * STATES + 2 * n, d_inner * STATES, tokens, inv_state_scale, stored);
  const float* own_u = u_gate + (static_cast<long long>(min(own, tokens - 1)) * BLOCKS + block) * 2 * hk + ch;
  const float u = load_fresh(own_u), gate = load_fresh(own_u + hk);
  const float old = settles ? load_fresh(residual + own_row) : 0.0f;
  const int out_sum = settles ? load_fresh(out_sums + own_row) : 0;
  requantize_projections<(TOKENS > 2 ? 4 : 1)>(x_sums, {x_factor, own_factor, bc_scale, inv_bc_scale}, dt_low, bc,
                                               tokens, x_rows, copies, rank, dt_pieces * 16);
  __syncthreads();
  STAMP(2, 2)

  int dots[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    dots[token] = 0;
#pragma unroll
    for (int i = 0; i < MAX_PIECES; i++) {
      if (n + i * LANES < dt_pieces) {
        const uint4 x = reinterpret_cast<const uint4*>(dt_low)[token * dt_pieces + n + i * LANES];
        dots[token] = dot16(w[i], x, dots[token]);
      }
    }
  }
  const float dt = static_cast<float>(spread_sum<TOKENS>(dots, lane)) * dt_factor;
  const float delta = qm_softplus(qm_dequantize(qm_quantize(dt, inv_dt_scale), dt_scale) + dt_bias);
  const float driven = delta * u;
  float sums[TOKENS];
  float2 h[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    h[token] = states_of(stored[token], state_scale, inv_state_scale);
    const int from = (lane & ~(LANES - 1)) | token;
    const float its_delta = __shfl_sync(ALL_LANES, delta, from), its_drive = __shfl_sync(ALL_LANES, driven, from);
    const float2 b = reinterpret_cast<const float2*>(bc)[token * STATES + n];
    const float2 c = reinterpret_cast<const float2*>(bc)[token * STATES + LANES + n];
    h[token].x = fmaf(exp2_approx(its_delta * a.x), h[token].x, its_drive * b.x);
    h[token].y = fmaf(exp2_approx(its_delta * a.y), h[token].y, its_drive * b.y);
    sums[token] = fmaf(c.y, h[token].y, c.x * h[token].x);
  }
  const float sum = spread_sum<TOKENS>(sums, lane);
  if (n < TOKENS) gated[n * hk + ch] = (sum + skip * u) * gate;
  __syncthreads();
  STAMP(2, 3)

  float turned[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; token++) turned[token] = 0.0f;
  for (int k = n; k < hk; k += LANES) {
    const bool negative = (signs >> k) & 1u;
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      const float value = gated[token * hk + k];
      turned[token] += negative ? -value : value;
    }
  }
  const float out = spread_sum<TOKENS>(turned, lane);
  if (n < TOKENS && n < tokens) y[(n * hk + ch) * BLOCKS + block] = out;

  // Every block of decode_in has read both by now.
  if (settles) {
    residual[own_row] = settled(old, out_sum, out_scale, out_bias);
    out_sums[own_row] = 0;
  }
  // Every block of decode_conv has read the scales by now.
  if (history_scale != nullptr && block == 0) move_scales(x_absmax, history_scale, tokens, taps);
  STAMP(2, 4)
  hand_on(turn);
  // Nobody reads the state before the next token.
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    if (token < tokens) {
      store_states(state, (token * d_inner + channel) * STATES + 2 * n, h[token], inv_state_scale);
    }
  }
  STAMP(2, 5)
  end_turn(turn);
}

#endif
