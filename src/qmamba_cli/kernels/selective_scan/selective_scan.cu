// Selective scan of Mamba-1, float32 inside; three kernels for one formula.
//
//   delta_t = softplus(dt_t + dt_bias)
//   h_t[n]  = exp(delta_t * A[n]) * h_{t-1}[n] + (delta_t * u_t) * B_t[n]
//   out_t   = (sum_n C_t[n] * h_t[n] + D * u_t) * silu(z_t)
//
// Shapes: u, dt, z rows of d channels, B, C rows of n states, one row a time step; consecutive channels (states)
//   are adjacent, rows and batches have any stride and any alignment. y (b, l, d) and the states are dense.
//
// Threads
//   walk   LPC lanes share a channel, S states each in registers; time runs from left to right. A lane finishes
//          and stores every LPC-th step; all operands come through shared memory, one tile ahead:
//             lane      0          1          0          1        (LPC = 2, one channel)
//             states    0..7       8..15      0..7       8..15
//             owns      step 0     step 1     step 2     step 3
//   lanes  LN lanes share a channel, 16 consecutive steps each; states are the outer loop. A lane runs its steps
//          from zero, a shuffle scan of (decay, state) gives its true start, it runs them again. Parallel over
//          the sequence: for few channels.
//   step   one token; a lane owns 4 states.
//
// Numerics: exp(x) = ex2.approx(x * log2 e), relative error 2^-22.5, results below 2^-126 are zero. softplus
//   = max(v, 0) + e * q(e), e = exp(-|v|), q a polynomial for log1p(e) / e with relative error below 1e-7: the
//   reference's threshold of 20 holds by itself, since log1p(exp(-20)) is below half an ulp of 20. The gate divides
//   by a number in [1, 2] with __fdividef (2 ulp). The recurrence and the sum over states use fmaf. walk and step
//   take steps left to right; lanes differs by the order of its float32 sums. y comes from the unrounded state.
//   B's scale joins delta * u and C's scale the sum, so int8 B and C enter as exact integers.
// Limits: n <= S * LPC (walk), 16 (lanes), 4 * lanes_per_channel (step); padded states stay zero.
// Source: Gu and Dao, "Mamba" (2023), algorithm 2. The kernels are ours.
#include "numerics.cuh"
#include "selective_scan.cuh"

constexpr int CHUNK = 64;       // steps between chunk states, as in reference.py
constexpr int WALK_THREADS = 128;
constexpr int STEP_STATES = 4;

// The parameters of every kernel. Strides are in elements; scales are real units a step, 1 for float operands.
//   u_inv_scale != 0 puts a float u on the grid first. state_inv_scale != 0: states are int8, else float32.
//   state_in (b, d, n) or null for zeros; state_out (b, d, n); chunk_states (b, ceil(l / CHUNK), d, n) or null.
//   blocks_x: blocks along the channels; blockIdx.x = batch * blocks_x + block of channels.
#define SCAN_PARAMETERS                                                                                     \
  const U *__restrict__ u, const In *__restrict__ dt, const In *__restrict__ z, const In *__restrict__ B,   \
      const In *__restrict__ C, const float *__restrict__ A, const float *__restrict__ D,                   \
      const float *__restrict__ dt_bias, const void *__restrict__ state_in, void *__restrict__ state_out,   \
      float *__restrict__ chunk_states, float *__restrict__ y, long long u_batch, long long u_row,          \
      long long dt_batch, long long dt_row, long long z_batch, long long z_row, long long b_batch,          \
      long long b_row, long long c_batch, long long c_row, float u_scale, float u_inv_scale, float dt_scale, \
      float b_scale, float c_scale, float z_scale, float state_scale, float state_inv_scale, int d, int l,  \
      int n, int blocks_x, int lanes_per_channel

__device__ constexpr int at_least(int value, int least) { return value < least ? least : value; }
__device__ constexpr int at_most(int value, int most) { return value < most ? value : most; }
// Blocks a multiprocessor that leave a thread of walk enough registers.
__device__ constexpr int walk_blocks(int S, int LPC) { return S * LPC != 16 ? 4 : LPC == 2 ? 5 : 3; }

template <typename In, typename U, int S, int LPC>
__global__ void __launch_bounds__(WALK_THREADS, walk_blocks(S, LPC)) selective_scan_walk(SCAN_PARAMETERS) {
  using RawIn = typename RawOf<In>::type;
  constexpr int N = S * LPC, CHANNELS = WALK_THREADS / LPC;
  constexpr int RUN = at_least(S * LPC == 16 ? 16 : 8, LPC), GROUPS = RUN / LPC;
  constexpr int TILE = at_least(at_most(512 / N, sizeof(In) == 1 ? 32 : 16), LPC);
  constexpr int PIECES = TILE * N / WALK_THREADS;  // of B, and as many of C, that a thread stages
  static_assert(TILE % RUN == 0 && CHUNK % TILE == 0 && S % 4 == 0, "tile, run and chunk must nest");
  __shared__ __align__(16) float shared_b[2][TILE * N];  // [buffer][step][state]
  __shared__ __align__(16) float shared_c[2][TILE * N];
  __shared__ __align__(16) In shared_dt[2][TILE * CHANNELS];  // [buffer][step][channel]
  __shared__ __align__(16) In shared_z[2][TILE * CHANNELS];
  __shared__ __align__(16) U shared_u[2][TILE * CHANNELS];
  // One scale and 256 codes: the gate of an int8 z is looked up.
  __shared__ float gates[sizeof(In) == 1 ? 256 : 1];

  const int tid = threadIdx.x, q = tid % LPC, own = tid / LPC;
  const int batch = blockIdx.x / blocks_x, c0 = (blockIdx.x % blocks_x) * CHANNELS;
  const bool live = c0 + own < d;
  const int c = live ? c0 + own : d - 1;
  // Each at the first step of the next tile that is fetched, or at this thread's next step to store.
  const U* u_at = u + batch * u_batch + c0;
  const In* dt_at = dt + batch * dt_batch + c0;
  const In* z_at = z + batch * z_batch + c0;
  const In* b_at = B + batch * b_batch + tid / N * b_row + tid % N;
  const In* c_at = C + batch * c_batch + tid / N * c_row + tid % N;
  float* y_at = y + (static_cast<long long>(batch) * l + q) * d + c;
  const bool aligned = c0 + CHANNELS <= d && rows_aligned<16>(u_at, u_row) && rows_aligned<16>(dt_at, dt_row) &&
                       rows_aligned<16>(z_at, z_row);
  const long long state_at = (static_cast<long long>(batch) * d + c) * n + q * S;
  const bool state_valid = tid % N < n;

  float h[S], A2[S];
#pragma unroll
  for (int s = 0; s < S; s++) {
    const bool valid = q * S + s < n;
    A2[s] = valid ? A[static_cast<long long>(c) * n + q * S + s] * LOG2E : 0.0f;
    h[s] = valid ? load_state(state_in, state_at + s, state_scale, state_inv_scale) : 0.0f;
  }
  const float bias = dt_bias[c], skip_weight = D[c];

  RawIn b_raw[PIECES], c_raw[PIECES];
  auto fetch = [&](int t0, int buffer) {
    if (t0 < l) {
      copy_tile<TILE, CHANNELS, WALK_THREADS>(shared_dt[buffer], dt_at, dt_row, l - t0, d - c0, aligned);
      copy_tile<TILE, CHANNELS, WALK_THREADS>(shared_z[buffer], z_at, z_row, l - t0, d - c0, aligned);
      copy_tile<TILE, CHANNELS, WALK_THREADS>(shared_u[buffer], u_at, u_row, l - t0, d - c0, aligned);
    }
    dt_at += TILE * dt_row;
    z_at += TILE * z_row;
    u_at += TILE * u_row;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int t = t0 + tid / N + i * (WALK_THREADS / N);
      const bool valid = state_valid && t < l;
      b_raw[i] = valid ? load_raw(b_at) : load_zero(b_at);
      c_raw[i] = valid ? load_raw(c_at) : load_zero(c_at);
      b_at += WALK_THREADS / N * b_row;
      c_at += WALK_THREADS / N * c_row;
    }
  };
  auto stage = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      shared_b[buffer][tid + i * WALK_THREADS] = steps_of(b_raw[i]);
      shared_c[buffer][tid + i * WALK_THREADS] = steps_of(c_raw[i]);
    }
    wait_for_copies();
    __syncthreads();
  };

  fetch(0, 0);
  fill_gates(gates, shared_z[0], z_scale);
  stage(0);
  int buffer = 0;
  for (int t0 = 0; t0 < l; t0 += TILE) {
    // The other buffer was last read before the barrier in stage.
    fetch(t0 + TILE, buffer ^ 1);
#pragma unroll 1
    for (int r = 0; r < TILE && t0 + r < l; r += RUN) {
      const int run_at = (r + q) * CHANNELS + own;
      float delta[GROUPS], driven[GROUPS], skip[GROUPS];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        // Steps behind the end leave the state: their delta is zero, without a branch.
        const float bias_now = t0 + r + g * LPC + q < l ? bias : NO_STEP;
        const int at = run_at + g * LPC * CHANNELS;
        const float u_now = u_of(load_raw(&shared_u[buffer][at]), u_scale, u_inv_scale);
        delta[g] = delta_of(load_raw(&shared_dt[buffer][at]), dt_scale, bias_now);
        driven[g] = delta[g] * u_now * b_scale;
        skip[g] = skip_weight * u_now;
      }
      const float4* b4 = reinterpret_cast<const float4*>(&shared_b[buffer][r * N + q * S]);
      const float4* c4 = reinterpret_cast<const float4*>(&shared_c[buffer][r * N + q * S]);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        float sums[LPC];
#pragma unroll
        for (int e = 0; e < LPC; e++) {
          const float delta_t = __shfl_sync(0xffffffffu, delta[g], e, LPC);
          const float driven_t = __shfl_sync(0xffffffffu, driven[g], e, LPC);
          // Two sums: a chain of S fmas would be waited for.
          float sum = 0.0f, sum_odd = 0.0f;
#pragma unroll
          for (int s = 0; s < S; s += 4) {
            const float4 bv = b4[((g * LPC + e) * N + s) / 4], cv = c4[((g * LPC + e) * N + s) / 4];
            h[s] = fmaf(exp2_approx(delta_t * A2[s]), h[s], driven_t * bv.x);
            h[s + 1] = fmaf(exp2_approx(delta_t * A2[s + 1]), h[s + 1], driven_t * bv.y);
            h[s + 2] = fmaf(exp2_approx(delta_t * A2[s + 2]), h[s + 2], driven_t * bv.z);
            h[s + 3] = fmaf(exp2_approx(delta_t * A2[s + 3]), h[s + 3], driven_t * bv.w);
            sum = s == 0 ? cv.x * h[s] : fmaf(cv.x, h[s], sum);
            sum_odd = s == 0 ? cv.y * h[s + 1] : fmaf(cv.y, h[s + 1], sum_odd);
            sum = fmaf(cv.z, h[s + 2], sum);
            sum_odd = fmaf(cv.w, h[s + 3], sum_odd);
          }
          sums[e] = sum + sum_odd;
        }
        const float total = reduce_scatter<LPC>(sums, q);
        const float gate_now = gate_of(gates, load_raw(&shared_z[buffer][run_at + g * LPC * CHANNELS]));
        const float out = fmaf(c_scale, total, skip[g]) * gate_now;
        if (live && t0 + r + g * LPC + q < l) *y_at = out;
        y_at += static_cast<long long>(LPC) * d;
      }
    }
    const bool chunk_ends = (t0 + TILE) % CHUNK == 0 || t0 + TILE >= l;
    if (chunk_states != nullptr && chunk_ends && live) {
      const int chunk = t0 / CHUNK, chunks = (l - 1) / CHUNK + 1;
      float* at = chunk_states + ((static_cast<long long>(batch) * chunks + chunk) * d + c) * n + q * S;
#pragma unroll
      for (int s = 0; s < S; s++) {
        if (q * S + s < n) at[s] = h[s];
      }
    }
    buffer ^= 1;
    stage(buffer);
  }
#pragma unroll
  for (int s = 0; s < S; s++) {
    if (live && q * S + s < n) store_state(state_out, state_at + s, h[s], state_inv_scale);
  }
}

// Dynamic shared memory, cuda.py counts the same: B, C [16][row]; y [channel][row]; A, h [channel][2][16];
// dt, z, u [channel][row of their type].
template <typename In, typename U, int LN>
__global__ void __launch_bounds__(LN == 32 ? 384 : 320, LN == 32 ? 1 : 2) selective_scan_lanes(SCAN_PARAMETERS) {
  constexpr int N = LANES_STATES, TILE = LN * SEGMENT, ROW = LN * PADDED + 4;
  constexpr int IN_ROW = staged_row<In, LN>(), U_ROW = staged_row<U, LN>();
  const int threads = blockDim.x, channels = threads / LN;
  extern __shared__ __align__(16) float shared_floats[];
  float* shared_b = shared_floats;
  float* shared_c = shared_b + N * ROW;
  float* shared_y = shared_c + N * ROW;
  float* shared_A = shared_y + channels * ROW;
  In* shared_dt = reinterpret_cast<In*>(shared_A + 2 * channels * N);
  In* shared_z = shared_dt + channels * IN_ROW;
  U* shared_u = reinterpret_cast<U*>(shared_z + channels * IN_ROW);

  const int tid = threadIdx.x, lane = tid % LN, ch = tid / LN;
  const int batch = blockIdx.x / blocks_x, c0 = (blockIdx.x % blocks_x) * channels;
  const int c = min(c0 + ch, d - 1);
  const bool live = c0 + ch < d;
  const int channels_here = min(channels, d - c0);
  const U* u_at = u + batch * u_batch + c0;
  const In* dt_at = dt + batch * dt_batch + c0;
  const In* z_at = z + batch * z_batch + c0;
  const In* b_at = B + batch * b_batch;
  const In* c_at = C + batch * c_batch;
  float* y_at = y + static_cast<long long>(batch) * l * d + c0;
  const float bias = dt_bias[c], skip_weight = D[c];
  const bool words = sizeof(In) == 1 && channels % 4 == 0 && channels_here == channels &&
                     rows_aligned<4>(dt_at, dt_row) && rows_aligned<4>(z_at, z_row) &&
                     (sizeof(U) != 1 || rows_aligned<4>(u_at, u_row));
  const int chunks = (l - 1) / CHUNK + 1;
  const long long state_at = (static_cast<long long>(batch) * d + c) * n;

  float* const A_at = shared_A + ch * 2 * N;
  for (int i = lane; i < N; i += LN) {
    const bool valid = i < n;
    A_at[i] = valid ? A[static_cast<long long>(c) * n + i] * LOG2E : 0.0f;
    A_at[N + i] = valid ? load_state(state_in, state_at + i, state_scale, state_inv_scale) : 0.0f;
  }
  for (int t0 = 0; t0 < l; t0 += TILE) {
    const In *dt_now = dt_at + t0 * dt_row, *z_now = z_at + t0 * z_row;
    const U* u_now = u_at + t0 * u_row;
    unsigned int dt_words[4], z_words[4], u_words[4];
    if constexpr (sizeof(In) == 1) {
      if (words) {
        load_words(dt_words, dt_now, dt_row, l - t0, channels);
        load_words(z_words, z_now, z_row, l - t0, channels);
        if constexpr (sizeof(U) == 1) load_words(u_words, u_now, u_row, l - t0, channels);
      }
    }
    stage_states<LN>(shared_b, shared_c, b_at + t0 * b_row, c_at + t0 * c_row, b_row, c_row, l - t0, n);
    if (!words) {
      stage_channels<LN>(shared_dt, IN_ROW, dt_now, dt_row, l - t0, channels, channels_here);
      stage_channels<LN>(shared_z, IN_ROW, z_now, z_row, l - t0, channels, channels_here);
    }
    if (!words || sizeof(U) != 1) {
      stage_channels<LN>(shared_u, U_ROW, u_now, u_row, l - t0, channels, channels_here);
    }
    if constexpr (sizeof(In) == 1) {
      if (words) {
        stage_words(shared_dt, IN_ROW, dt_words, channels);
        stage_words(shared_z, IN_ROW, z_words, channels);
        if constexpr (sizeof(U) == 1) stage_words(shared_u, U_ROW, u_words, channels);
      }
    }
    __syncthreads();
    // The next tile is not waited for from device memory.
    for (int t = t0 + TILE + tid; t < min(l, t0 + 2 * TILE); t += threads) {
      prefetch(dt_at + t * dt_row);
      prefetch(z_at + t * z_row);
      prefetch(u_at + t * u_row);
      prefetch(b_at + t * b_row);
      prefetch(c_at + t * c_row);
    }

    const int left = l - t0 - lane * SEGMENT;
    float delta[SEGMENT], driven[SEGMENT], sums[SEGMENT], span = 0.0f;
    {
      typename RawOf<In>::type dt_raw[SEGMENT];
      typename RawOf<U>::type u_raw[SEGMENT];
      read_segment(shared_dt + ch * IN_ROW, lane, dt_raw);
      read_segment(shared_u + ch * U_ROW, lane, u_raw);
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        delta[i] = delta_of(dt_raw[i], dt_scale, i < left ? bias : NO_STEP);
        driven[i] = delta[i] * u_of(u_raw[i], u_scale, u_inv_scale) * b_scale;
        sums[i] = 0.0f;
        span += delta[i];
      }
    }
    // Opaque, or its sum would be formed again for every state to save a register.
    asm("" : "+f"(span));
    // A chunk ends with every fourth lane; the last chunk's state is stored after the last tile.
    const int chunk = (t0 + lane * SEGMENT) / CHUNK;
    const bool ends = live && (lane + 1) % (CHUNK / SEGMENT) == 0 && chunk < chunks - 1;
    float* const chunk_at = ends && chunk_states != nullptr
                                ? chunk_states + ((static_cast<long long>(batch) * chunks + chunk) * d + c) * n
                                : nullptr;
    float* state = A_at;
    const float *b_now = shared_b + lane * PADDED, *c_now = shared_c + lane * PADDED;
#pragma unroll 1
    for (int i_state = 0; i_state < N; i_state++, state++, b_now += ROW, c_now += ROW) {
      const float A2 = state[0];
      const float carry = lane == 0 ? state[N] : 0.0f;
      float decay[SEGMENT], increment[SEGMENT], C_now[SEGMENT];
      read_segment(b_now, 0, increment);
      float h = carry;
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        decay[i] = exp2_approx(delta[i] * A2);
        increment[i] *= driven[i];
        h = fmaf(decay[i], h, increment[i]);
      }
      float P = exp2_approx(span * A2);
#pragma unroll
      for (int s = 1; s < LN; s *= 2) {
        const float P_before = __shfl_up_sync(0xffffffffu, P, s, LN);
        const float h_before = __shfl_up_sync(0xffffffffu, h, s, LN);
        h = lane >= s ? fmaf(P, h_before, h) : h;
        // Also where nothing is before: such a lane is complete, and no lane that is not uses its P again.
        P *= P_before;
      }
      if (chunk_at != nullptr && i_state < n) chunk_at[i_state] = h;
      __syncwarp();
      if (lane == LN - 1) state[N] = h;
      const float h_start = __shfl_up_sync(0xffffffffu, h, 1, LN);
      h = lane == 0 ? carry : h_start;
      read_segment(c_now, 0, C_now);
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        h = fmaf(decay[i], h, increment[i]);
        sums[i] = fmaf(C_now[i], h, sums[i]);
      }
    }
    {
      typename RawOf<In>::type z_raw[SEGMENT];
      typename RawOf<U>::type u_raw[SEGMENT];
      read_segment(shared_z + ch * IN_ROW, lane, z_raw);
      read_segment(shared_u + ch * U_ROW, lane, u_raw);
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        const float u_now = u_of(u_raw[i], u_scale, u_inv_scale);
        sums[i] = fmaf(c_scale, sums[i], skip_weight * u_now) * gate(real_of(z_raw[i], z_scale));
      }
    }
    float4* sums_at = reinterpret_cast<float4*>(shared_y + ch * ROW + lane * PADDED);
#pragma unroll
    for (int k = 0; k < SEGMENT / 4; k++) {
      sums_at[k] = make_float4(sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3]);
    }
    __syncthreads();
    store_channels<LN>(y_at + static_cast<long long>(t0) * d, shared_y, d, l - t0, channels, channels_here);
  }
  // Steps behind the end left the state.
#pragma unroll 1
  for (int i = lane; i < n && live; i += LN) {
    store_state(state_out, state_at + i, A_at[N + i], state_inv_scale);
    if (chunk_states != nullptr) {
      chunk_states[((static_cast<long long>(batch) * chunks + chunks - 1) * d + c) * n + i] = A_at[N + i];
    }
  }
}

// l = 1. lanes_per_channel is a power of two up to 32; chunk_states has one chunk.
template <typename In, typename U>
__global__ void __launch_bounds__(128) selective_scan_step(SCAN_PARAMETERS) {
  const int batch = blockIdx.x / blocks_x;
  const int index = (blockIdx.x % blocks_x) * blockDim.x + threadIdx.x;
  const int q = threadIdx.x & (lanes_per_channel - 1), c_own = index / lanes_per_channel;
  const bool live = c_own < d;
  const int c = live ? c_own : d - 1;
  const float u_now = u_of(load_raw(u + batch * u_batch + c), u_scale, u_inv_scale);
  const float delta = delta_of(load_raw(dt + batch * dt_batch + c), dt_scale, dt_bias[c]);
  const float z_now = real_of(load_raw(z + batch * z_batch + c), z_scale);
  const float driven = delta * u_now * b_scale;
  const long long state_at = (static_cast<long long>(batch) * d + c) * n;
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < STEP_STATES; s++) {
    const int i = q * STEP_STATES + s;
    if (i < n) {
      const float before = load_state(state_in, state_at + i, state_scale, state_inv_scale);
      const float decay = exp2_approx(delta * (A[static_cast<long long>(c) * n + i] * LOG2E));
      const float h = fmaf(decay, before, driven * steps_of(load_raw(B + batch * b_batch + i)));
      sum = fmaf(steps_of(load_raw(C + batch * c_batch + i)), h, sum);
      if (live) {
        store_state(state_out, state_at + i, h, state_inv_scale);
        if (chunk_states != nullptr) chunk_states[state_at + i] = h;
      }
    }
  }
  for (int o = lanes_per_channel / 2; o >= 1; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (live && q == 0) y[static_cast<long long>(batch) * d + c] = fmaf(c_scale, sum, D[c] * u_now) * gate(z_now);
}
