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
//   lanes  LN lanes share a channel, 16 consecutive steps each; states are the outer loop: selective_scan_lanes.cuh.
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
#include "half.cuh"
#include "overlap.cuh"
#include "selective_scan.cuh"
#include "selective_scan_lanes.cuh"

constexpr int WALK_THREADS = 128;
constexpr int STEP_STATES = 4;

__device__ constexpr int at_least(int value, int least) { return value < least ? least : value; }
__device__ constexpr int at_most(int value, int most) { return value < most ? value : most; }
// Blocks a multiprocessor that leave a thread of walk enough registers.
__device__ constexpr int walk_blocks(int S, int LPC) { return S * LPC != 16 ? 4 : LPC == 2 ? 5 : 3; }

template <typename In, typename U, int S, int LPC>
__global__ void __launch_bounds__(WALK_THREADS, walk_blocks(S, LPC)) selective_scan_walk(SCAN_PARAMETERS) {
  using Late = decltype(load_late(B));
  constexpr int N = S * LPC, CHANNELS = WALK_THREADS / LPC;
  constexpr int RUN = at_least(S * LPC == 16 ? 16 : 8, LPC), GROUPS = RUN / LPC;
  constexpr int TILE = at_least(at_most(512 / N, sizeof(In) <= 2 ? 32 : 16), LPC);
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
  typename OutOf<U>::type* y_at = y + (static_cast<long long>(batch) * l + q) * d + c;
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
  // A value whose first use is inside the loop is waited for there, every time, together with whatever is on its way
  // for the next tile; so add zero.
  const float bias = dt_bias[c] + 0.0f, skip_weight = D[c] + 0.0f;
  const float u_step = u_step_of(u_steps, c, u_scale) + 0.0f, u_inverse = u_inverse_of(u_steps, u_step, u_inv_scale);

  Late b_raw[PIECES], c_raw[PIECES];
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
      b_raw[i] = valid ? load_late(b_at) : Late{};
      c_raw[i] = valid ? load_late(c_at) : Late{};
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
  fill_gates(gates, shared_z[0], z_scale, WALK_THREADS);
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
        const float u_now = u_of<U>(load_raw(&shared_u[buffer][at]), u_step, u_inverse);
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
        if (live && t0 + r + g * LPC + q < l) narrow(out, *y_at);
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

// l = 1. lanes_per_channel is a power of two up to 32; chunk_states has one chunk.
template <typename In, typename U>
__global__ void __launch_bounds__(128) selective_scan_step(SCAN_PARAMETERS) {
  release_dependents();
  wait_for_producers();
  const int batch = blockIdx.x / blocks_x;
  const int index = (blockIdx.x % blocks_x) * blockDim.x + threadIdx.x;
  const int q = threadIdx.x & (lanes_per_channel - 1), c_own = index / lanes_per_channel;
  const bool live = c_own < d;
  const int c = live ? c_own : d - 1;
  const float u_step = u_step_of(u_steps, c, u_scale), u_inverse = u_inverse_of(u_steps, u_step, u_inv_scale);
  const float u_now = u_of<U>(load_raw(u + batch * u_batch + c), u_step, u_inverse);
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
  const float out = fmaf(c_scale, sum, D[c] * u_now) * gate(z_now);
  if (live && q == 0) narrow(out, y[static_cast<long long>(batch) * d + c]);
}
