// The scan step of many tokens; include decode_parts.cuh and decode_batch_product.cuh first.
#ifndef QM_DECODE_BATCH_SCAN_CUH
#define QM_DECODE_BATCH_SCAN_CUH

constexpr int SCAN_TOKENS = 16;  // of a block: two token tiles
constexpr int SCAN_BLOCK = 512;
constexpr int CHANNEL_SLOTS = SCAN_BLOCK / SCAN_TOKENS;
constexpr float LOG2E = 1.4426950408889634f;
// Copies of x_proj's sums, which blocks add to in turn: adding to one word by all of them would take its time.
constexpr int X_COPIES = 4;

__device__ __forceinline__ float softplus(float v) {
  return qm_softplus_from(v, exp2_approx(-LOG2E * fabsf(v)));
}

// Sixteen states of a channel and token, as they are stored.
template <bool INT8>
struct States {
  static constexpr int PIECES = INT8 ? 1 : 4;
  uint4 pieces[PIECES];

  __device__ __forceinline__ void load(const void* state, int at) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      pieces[i] = load_fresh(static_cast<const uint4*>(state) + static_cast<long long>(at) * PIECES + i);
    }
  }
  __device__ __forceinline__ void store(void* state, int at) const {
#pragma unroll
    for (int i = 0; i < PIECES; i++) static_cast<uint4*>(state)[static_cast<long long>(at) * PIECES + i] = pieces[i];
  }

  // Four states of word i of an int8 piece, or of float piece i.
  __device__ __forceinline__ void get(int i, float scale, float (&h)[4]) const {
    if constexpr (INT8) {
      const unsigned int word = (i == 0 ? pieces[0].x : i == 1 ? pieces[0].y : i == 2 ? pieces[0].z : pieces[0].w) ^
                                0x80808080u;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        // The byte under the exponent of 2^23, which is taken off with the offset.
        h[k] = (qm_from_bits(__byte_perm(word, 0x4B000000u, 0x7440 + k)) - 8388736.0f) * scale;
      }
    } else {
      const uint4& four = pieces[INT8 ? 0 : i];
      h[0] = qm_from_bits(four.x);
      h[1] = qm_from_bits(four.y);
      h[2] = qm_from_bits(four.z);
      h[3] = qm_from_bits(four.w);
    }
  }
  __device__ __forceinline__ void put(int i, float inv_scale, const float (&h)[4]) {
    if constexpr (INT8) {
      int q[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        // The sum rounds half to even; its bits order as integers down to -128, the conversion saturates above.
        q[k] = static_cast<int>(qm_to_bits(fmaxf(fmaf(h[k], inv_scale, QM_MAGIC), QM_MAGIC - 128.0f))) - 0x4B400000;
      }
      const unsigned int word = pack_saturated(q[0], q[1], q[2], q[3]);
      if (i == 0) pieces[0].x = word;
      if (i == 1) pieces[0].y = word;
      if (i == 2) pieces[0].z = word;
      if (i == 3) pieces[0].w = word;
    } else {
      pieces[INT8 ? 0 : i] = make_uint4(qm_to_bits(h[0]), qm_to_bits(h[1]), qm_to_bits(h[2]), qm_to_bits(h[3]));
    }
  }
};

// One step of x_proj's sums (X_COPIES, x_rows, width) to the grid: the first `rank` rows to dt_low (16 tokens,
// dt_stride bytes), the next 32 as real B and C to bc (32, 16). `factor` lies in shared memory.
__device__ __forceinline__ void requantize(const int* x_sums, const float* factor, signed char* dt_low, float* bc,
                                           float scale, float inv_scale, int width, int x_rows, int rank,
                                           int dt_stride) {
  constexpr int FOURS = SCAN_TOKENS / 4, ROUNDS = 2;
  const int items = (rank + 2 * STATES) * FOURS;
  for (int base = threadIdx.x; base < items; base += ROUNDS * SCAN_BLOCK) {
    int4 sums[ROUNDS][X_COPIES];
    // All that is under way before anything is waited for.
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int item = min(base + r * SCAN_BLOCK, items - 1), row = item / FOURS;
      const int* from = x_sums + row * width + item % FOURS * 4;
#pragma unroll
      for (int copy = 0; copy < X_COPIES; copy++) {
        sums[r][copy] = load_fresh(reinterpret_cast<const int4*>(from + copy * x_rows * width));
      }
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
      const int item = base + r * SCAN_BLOCK, row = item / FOURS, token = item % FOURS * 4;
      if (item >= items) break;
      int4 sum = sums[r][0];
#pragma unroll
      for (int copy = 1; copy < X_COPIES; copy++) {
        sum.x += sums[r][copy].x;
        sum.y += sums[r][copy].y;
        sum.z += sums[r][copy].z;
        sum.w += sums[r][copy].w;
      }
      const float of_row = factor[row];
      const signed char q[4] = {qm_quantize(static_cast<float>(sum.x) * of_row, inv_scale),
                                qm_quantize(static_cast<float>(sum.y) * of_row, inv_scale),
                                qm_quantize(static_cast<float>(sum.z) * of_row, inv_scale),
                                qm_quantize(static_cast<float>(sum.w) * of_row, inv_scale)};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (row < rank) {
          dt_low[(token + k) * dt_stride + row] = q[k];
        } else {
          bc[(row - rank) * SCAN_TOKENS + token + k] = qm_dequantize(q[k], scale);
        }
      }
    }
  }
}

// Rows of the core that a thread makes, of order 20 such that all threads have as much to do, and what they are apart.
__device__ __forceinline__ int core_rows(int order) { return order % 5 == 0 ? 5 : 4; }
__device__ constexpr int core_pitch(int rows) { return (rows + 3) / 4 * 4; }

// The core of H_HK, signs (order, order / ROWS, core_pitch) of 1 and -1 by columns, over the upper part of the channel.
template <int ROWS, typename HandOn>
__device__ __forceinline__ void turn_core(const float* y, const float* signs, int width, int hk, int levels,
                                          HandOn hand_on) {
  const int token = threadIdx.x % SCAN_TOKENS, slot = threadIdx.x / SCAN_TOKENS;
  const int order = hk >> levels, others = 1 << levels, columns = width * others;
  for (int item = slot; item < columns * (order / ROWS); item += CHANNEL_SLOTS) {
    const int rows = item / columns, row = rows * ROWS, column = item % columns;
    const int block = column >> levels, low = column & (others - 1);
    const float* from = y + (block * hk + low) * SCAN_TOKENS + token;
    float sums[ROWS] = {};
#pragma unroll 10
    for (int k = 0; k < order; k++) {
      const float value = from[(k << levels) * SCAN_TOKENS];
      const float* sign = signs + (k * (order / ROWS) + rows) * core_pitch(ROWS);
      const float4 four = *reinterpret_cast<const float4*>(sign);
      sums[0] = fmaf(four.x, value, sums[0]);
      sums[1] = fmaf(four.y, value, sums[1]);
      sums[2] = fmaf(four.z, value, sums[2]);
      sums[3] = fmaf(four.w, value, sums[3]);
      if constexpr (ROWS == 5) sums[4] = fmaf(sign[4], value, sums[4]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) hand_on(block, ((row + r) << levels) + low, sums[r]);
  }
}

// H_HK over the channels of each of `width` blocks in y (width, hk, 16 tokens), whose pairs of neighbouring channels
// are turned where there are levels: butterflies over the next of the lowest `levels` bits of the channel in place,
// then the core. Values go to hand_on(block, channel, value), of this thread's token.
template <typename HandOn>
__device__ __forceinline__ void turn_channels(float* y, const float* signs, int width, int hk, int levels,
                                              HandOn hand_on) {
  const int token = threadIdx.x % SCAN_TOKENS, slot = threadIdx.x / SCAN_TOKENS;
  for (int level = 1; level < levels; level++) {
    const int distance = 1 << level;
    for (int pair = slot; pair < width * hk / 2; pair += CHANNEL_SLOTS) {
      const int at = ((pair >> level << (level + 1)) + (pair & (distance - 1))) * SCAN_TOKENS + token;
      const float low = y[at], high = y[at + distance * SCAN_TOKENS];
      y[at] = low + high;
      y[at + distance * SCAN_TOKENS] = low - high;
    }
    __syncthreads();
  }
  const int order = hk >> levels;
  if (order == 1) {
    for (int c = slot; c < width * hk; c += CHANNEL_SLOTS) hand_on(c / hk, c % hk, y[c * SCAN_TOKENS + token]);
  } else if (core_rows(order) == 5) {
    turn_core<5>(y, signs, width, hk, levels, hand_on);
  } else {
    turn_core<4>(y, signs, width, hk, levels, hand_on);
  }
}

// Grid: x: (128 / width) groups of blocks by `sixteens` of tokens, y: groups of `tokens`.
// The bound on threads leaves registers for blocks of batch_rotate beside one of int8 states.
template <bool INT8>
__global__ void __launch_bounds__(INT8 ? SCAN_BLOCK + 96 : SCAN_BLOCK, 1)
    batch_scan(const int* x_sums,               // (groups, X_COPIES, x_rows, tokens)
               const float* x_factor,           // (x_rows,) real units a step of a sum
               const uint4* dt_weight,          // (128 hk, dt_pieces) of 16 columns
               const uint4* A_log2e,            // (128 hk, 16) floats
               const float* constants,          // (3, 128 hk): dt_proj's factor, dt_bias, D
               const uint4* core,               // (order, order / core_rows, core_pitch) floats, columns of H_HK's core
               const float* u,                  // (groups, 128 hk, tokens)
               const float* gate,               // likewise
               void* state,                     // (groups, 128 hk, tokens, 16)
               float* y,                        // (groups, hk, 128, tokens) out
               const float* newest,             // (groups, tokens): scale of the newest conv input, or null
               float* history_scale,            // (groups, tokens, 4), moved on by one token, or null
               float bc_scale, float inv_bc_scale, float dt_scale, float inv_dt_scale, float state_scale,
               float inv_state_scale, int tokens, int sixteens, int hk, int rank, int x_rows, int dt_pieces, int width,
               int levels) {
  extern __shared__ __align__(16) unsigned char shared[];
  STAMP(2, 0)
  release_dependents();
  const int channels = width * hk, dt_bytes = dt_pieces * 16, dt_stride = dt_bytes + 16;
  const int first_block = static_cast<int>(blockIdx.x) / sixteens * width;
  const int first_token = static_cast<int>(blockIdx.x) % sixteens * SCAN_TOKENS;
  const int first = first_block * hk, d_inner = BLOCKS * hk;
  const int token = threadIdx.x % SCAN_TOKENS, slot = threadIdx.x / SCAN_TOKENS;
  // Of this thread's first channel; each next one is CHANNEL_SLOTS further.
  const int at = (static_cast<int>(blockIdx.y) * d_inner + first + slot) * tokens + first_token + token;
  Carver carver{shared};
  uint4* shared_dt = carver.take<uint4>(channels * dt_pieces);
  float* shared_A = carver.take<float>(channels * STATES);
  float* shared_constants = carver.take<float>(3 * channels);
  signed char* dt_low = carver.take<signed char>(SCAN_TOKENS * dt_stride);
  float* bc = carver.take<float>(2 * STATES * SCAN_TOKENS);
  float* delta = carver.take<float>(channels * SCAN_TOKENS);  // sums of dt_proj, later y
  const int order = hk >> levels, of_core = core_rows(order);
  const int sign_count = order * (order / of_core) * core_pitch(of_core);
  float* signs = carver.take<float>(sign_count);
  float* shared_factor = carver.take<float>(x_rows);

  copy_block(shared_dt, dt_weight + first * dt_pieces, channels * dt_bytes);
  copy_block(shared_A, A_log2e + first * (STATES / 4), channels * STATES * 4);
  for (int i = 0; i < 3; i++) {
    copy_block(shared_constants + i * channels, constants + i * d_inner + first, channels * 4);
  }
  if (order > 1) copy_block(signs, core, sign_count * 4);
  copy_block(shared_factor, x_factor, x_rows * 4);
  commit_copies();
  for (int i = threadIdx.x; i < SCAN_TOKENS * dt_stride; i += SCAN_BLOCK) dt_low[i] = 0;
  for (int c = slot; c < channels; c += CHANNEL_SLOTS) {
    if (INT8 ? token % 8 == 0 : token % 2 == 0) {
      prefetch_line(static_cast<const char*>(state) +
                    (at + (c - slot) * static_cast<long long>(tokens)) * (STATES * (INT8 ? 1 : 4)));
    }
  }
  wait_for_copies();
  __syncthreads();

  STAMP(2, 1)
  wait_for_producers();
  STAMP(2, 2)
  if (history_scale != nullptr && blockIdx.x == 0 && static_cast<int>(threadIdx.x) < tokens) {
    const int of_token = static_cast<int>(blockIdx.y) * tokens + threadIdx.x;
    float* scales = history_scale + of_token * 4;
    const float older = load_fresh(scales + 1), old = load_fresh(scales + 2);
    scales[0] = older;
    scales[1] = old;
    scales[2] = load_fresh(newest + of_token);
  }
  // The next two channels, on their way.
  States<INT8> next[2];
  float next_u[2], next_gate[2];
  auto fetch = [&](int c, int i) {
    if (c < channels) {
      const int here = at + (c - slot) * tokens;
      next[i].load(state, here);
      next_u[i] = load_fresh(u + here);
      next_gate[i] = load_fresh(gate + here);
    }
  };
  fetch(slot, 0);
  fetch(slot + CHANNEL_SLOTS, 1);
  requantize(x_sums + static_cast<int>(blockIdx.y) * X_COPIES * x_rows * tokens + first_token, shared_factor, dt_low,
             bc, bc_scale, inv_bc_scale, tokens, x_rows, rank, dt_stride);
  __syncthreads();
  STAMP(2, 3)

  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int tile = warp; tile * TILE_ROWS < channels; tile += SCAN_BLOCK / WARP) {
    const int row[2] = {tile * TILE_ROWS + lane / 4, tile * TILE_ROWS + lane / 4 + 8};
    const signed char* w = reinterpret_cast<const signed char*>(shared_dt);
    int sums[2][4] = {};
    for (int column = 8 * (lane % 4); column - 8 * (lane % 4) < dt_bytes; column += 32) {
      uint2 top = make_uint2(0u, 0u), low = top, x[2] = {top, top};
      if (column + 8 <= dt_bytes) {
        top = *reinterpret_cast<const uint2*>(w + min(row[0], channels - 1) * dt_bytes + column);
        low = *reinterpret_cast<const uint2*>(w + min(row[1], channels - 1) * dt_bytes + column);
#pragma unroll
        for (int n = 0; n < 2; n++) {
          x[n] = *reinterpret_cast<const uint2*>(dt_low + (n * TILE_TOKENS + lane / 4) * dt_stride + column);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; n++) multiply_i8(sums[n], top.x, low.x, top.y, low.y, x[n].x, x[n].y);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (row[half] >= channels) continue;
      float* to = delta + row[half] * SCAN_TOKENS + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int* pair = sums[n] + half * 2;
        const float2 both = make_float2(static_cast<float>(pair[0]), static_cast<float>(pair[1]));
        *reinterpret_cast<float2*>(to + n * TILE_TOKENS) = both;
      }
    }
  }
  __syncthreads();

  STAMP(2, 4)
  float b[STATES], c_row[STATES];
#pragma unroll
  for (int s = 0; s < STATES; s++) {
    b[s] = bc[s * SCAN_TOKENS + token];
    c_row[s] = bc[(STATES + s) * SCAN_TOKENS + token];
  }
#pragma unroll 1
  for (int c = slot; c < channels; c += CHANNEL_SLOTS) {
    States<INT8> now = next[0];
    const float u_now = next_u[0], gate_now = next_gate[0];
    next[0] = next[1];
    next_u[0] = next_u[1];
    next_gate[0] = next_gate[1];
    fetch(c + 2 * CHANNEL_SLOTS, 1);
    const float dt = delta[c * SCAN_TOKENS + token] * shared_constants[c];
    const float delta_now =
        softplus(qm_dequantize(qm_quantize(dt, inv_dt_scale), dt_scale) + shared_constants[channels + c]);
    const float driven = delta_now * u_now;
    const float4* a = reinterpret_cast<const float4*>(shared_A + c * STATES);
    float sum = 0.0f, sum_odd = 0.0f;
#pragma unroll
    for (int i = 0; i < STATES / 4; i++) {
      const float4 four = a[i];
      float h[4];
      now.get(i, state_scale, h);
      h[0] = fmaf(exp2_approx(delta_now * four.x), h[0], driven * b[4 * i]);
      h[1] = fmaf(exp2_approx(delta_now * four.y), h[1], driven * b[4 * i + 1]);
      h[2] = fmaf(exp2_approx(delta_now * four.z), h[2], driven * b[4 * i + 2]);
      h[3] = fmaf(exp2_approx(delta_now * four.w), h[3], driven * b[4 * i + 3]);
      sum = fmaf(c_row[4 * i], h[0], sum);
      sum_odd = fmaf(c_row[4 * i + 1], h[1], sum_odd);
      sum = fmaf(c_row[4 * i + 2], h[2], sum);
      sum_odd = fmaf(c_row[4 * i + 3], h[3], sum_odd);
      now.put(i, inv_state_scale, h);
    }
    now.store(state, at + (c - slot) * tokens);
    float value = ((sum + sum_odd) + shared_constants[2 * channels + c] * u_now) * gate_now;
    if (levels > 0) {
      // The neighbouring channel is 16 lanes away.
      const float other = __shfl_xor_sync(ALL_LANES, value, SCAN_TOKENS);
      value = slot % 2 == 0 ? value + other : other - value;
    }
    delta[c * SCAN_TOKENS + token] = value;
  }
  __syncthreads();
  STAMP(2, 5)

  turn_channels(delta, signs, width, hk, levels, [&](int block, int i, float value) {
    y[((static_cast<int>(blockIdx.y) * hk + i) * BLOCKS + first_block + block) * tokens + first_token + token] = value;
  });
  STAMP(2, 6)
}

#endif
