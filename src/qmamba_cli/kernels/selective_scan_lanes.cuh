// Selective scan in parallel over the sequence; include selective_scan.cuh first.
//
// LN lanes share a channel. A tile is LN segments of 16 steps; a lane owns one segment and goes through the states,
// two at a time. For each it runs its steps from zero (lane 0: from the carry), keeps the decays, gets its true start
// by a shuffle scan of (decay, state) and runs the steps again:
//
//   lane              0            1            2         ...   LN - 1
//   steps of a tile   0..15        16..31       32..47    ...
//   (P, S)            -> scan ->   -> scan ->   -> scan -> ...  -> carry of the next tile
//
// One exponential a state and step and one more a segment. The last two warps of a block are helpers: while the
// others compute a tile, they fetch the next one, spread its B and C, and store y of the one before; one barrier a
// tile. Everything that both touch exists twice.
#ifndef QM_SELECTIVE_SCAN_LANES_CUH
#define QM_SELECTIVE_SCAN_LANES_CUH

constexpr int SEGMENT = 16;
constexpr int PADDED = 20;  // floats of a segment of B and C: 8 lanes reading 16 bytes hit all 32 banks
constexpr int LANES_STATES = 16;
constexpr int LANES_THREADS = 320;  // that compute, at most
constexpr int HELPERS = 64;

// A tile in shared memory: [step][PITCH channels] with a gap after every segment, so that the lanes of a warp hit
// different banks; B and C as [state][ROW steps].
template <int LN>
struct Tile {
  static constexpr int STEPS = LN * SEGMENT, PITCH = LANES_THREADS / LN, ROW = LN * PADDED + 4;
  static constexpr int Y_SEGMENT = SEGMENT * PITCH + 4, Y_SIZE = LN * Y_SEGMENT;
  static constexpr int STATES_SIZE = 2 * LANES_STATES * ROW;  // B, then C
  static constexpr int RAW_SIZE = 2 * STEPS * LANES_STATES;
};
template <int LN, typename T>
__device__ constexpr int operand_segment() {
  constexpr int SIZE = static_cast<int>(sizeof(T));
  return SEGMENT * Tile<LN>::PITCH + (128 / LN < 4 * SIZE ? 4 : 128 / LN / SIZE);
}
template <int LN, typename T>
__device__ constexpr int operand_size() {
  return LN * operand_segment<LN, T>();
}

// A tile of an operand's rows; rows behind `steps` are left as they are.
template <int LN, typename T>
__device__ __forceinline__ void copy_operand(T* to, const T* from, long long row, int steps, int channels,
                                             int helper) {
  constexpr int PITCH = Tile<LN>::PITCH;
  const bool quads = channels % 4 == 0 && rows_aligned<4 * sizeof(T)>(from, row);
  const int width = quads ? 4 : 1, pieces = channels / width, rows = HELPERS / pieces;
  const int first = helper / pieces, at = helper % pieces * width, stop = min(steps, Tile<LN>::STEPS);
  if (first >= rows) return;
  const T* from_at = from + first * row + at;
#pragma unroll 4
  for (int t = first; t < stop; t += rows, from_at += rows * row) {
    T* to_at = to + t / SEGMENT * operand_segment<LN, T>() + t % SEGMENT * PITCH + at;
    if (quads) {
      copy_async<4 * sizeof(T)>(to_at, from_at, true);
    } else {
      *to_at = *from_at;
    }
  }
}

// B and C are copied as they are to a place of this helper's own, and later spread as floats.
template <int LN, typename T>
__device__ __forceinline__ void copy_states(T* raw, const T* b, const T* c, long long b_row, long long c_row,
                                            int steps, int helper) {
  constexpr int QUADS = LANES_STATES / 4, ALL = Tile<LN>::STEPS * QUADS;
  const int at = helper % QUADS * 4, first = helper / QUADS;
  const T *b_at = b + first * b_row + at, *c_at = c + first * c_row + at;
#pragma unroll 4
  for (int k = 0; k < ALL / HELPERS; k++) {
    const bool valid = first + k * (HELPERS / QUADS) < steps;
    T* to = raw + 4 * (helper + k * HELPERS);
    copy_async<4 * sizeof(T)>(to, valid ? b_at : b, valid);
    copy_async<4 * sizeof(T)>(to + 4 * ALL, valid ? c_at : c, valid);
    b_at += HELPERS / QUADS * b_row;
    c_at += HELPERS / QUADS * c_row;
  }
}
__device__ __forceinline__ void read_quad(const signed char* p, float (&v)[4]) {
  const unsigned int word = *reinterpret_cast<const unsigned int*>(p) ^ 0x80808080u;
#pragma unroll
  for (int k = 0; k < 4; k++) v[k] = qm_from_bits(__byte_perm(word, 0x4B000000u, 0x7440u | k)) - 8388736.0f;
}
template <typename T>
__device__ __forceinline__ void read_quad(const T* p, float (&v)[4]) {
#pragma unroll
  for (int k = 0; k < 4; k++) v[k] = load_raw(p + k);
}
template <int LN, typename T>
__device__ __forceinline__ void spread_states(float* to, const T* raw, int helper) {
  constexpr int ROW = Tile<LN>::ROW, QUADS = LANES_STATES / 4, ALL = Tile<LN>::STEPS * QUADS;
  // A pass of the helpers covers one segment.
  static_assert(HELPERS / QUADS == SEGMENT, "the place advances by segments");
  float* to_at = to + helper % QUADS * 4 * ROW + helper / QUADS;
#pragma unroll 2
  for (int k = 0; k < LN; k++, to_at += PADDED) {
    float b_values[4], c_values[4];
    read_quad(raw + 4 * (helper + k * HELPERS), b_values);
    read_quad(raw + 4 * (ALL + helper + k * HELPERS), c_values);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      to_at[i * ROW] = b_values[i];
      to_at[(LANES_STATES + i) * ROW] = c_values[i];
    }
  }
}
// The same straight from device memory, for any alignment; zero behind n states.
template <int LN, typename T>
__device__ __forceinline__ void load_states(float* to, const T* b, const T* c, long long b_row, long long c_row,
                                            int steps, int n, int helper) {
  using Raw = typename RawOf<T>::type;
  const int state = helper % LANES_STATES;
  const T *b_at = b + state, *c_at = c + state;
#pragma unroll 4
  for (int t = helper / LANES_STATES; t < Tile<LN>::STEPS; t += HELPERS / LANES_STATES) {
    float* to_at = to + state * Tile<LN>::ROW + t / SEGMENT * PADDED + t % SEGMENT;
    const bool valid = t < steps && state < n;
    to_at[0] = steps_of(valid ? load_raw(b_at + t * b_row) : Raw(0));
    to_at[LANES_STATES * Tile<LN>::ROW] = steps_of(valid ? load_raw(c_at + t * c_row) : Raw(0));
  }
}

__device__ __forceinline__ void put4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
template <typename T>
__device__ __forceinline__ void put4(T* p, float4 v) {
  alignas(8) T out[4];
  narrow(v.x, out[0]);
  narrow(v.y, out[1]);
  narrow(v.z, out[2]);
  narrow(v.w, out[3]);
  *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(out);
}
// A tile of y to rows of d, by any number of threads.
template <int LN, typename T>
__device__ __forceinline__ void store_y(T* to, const float* from, int d, int steps, int channels, int thread,
                                        int threads) {
  const bool quads = channels % 4 == 0 && d % 4 == 0;
  const int width = quads ? 4 : 1, pieces = channels / width, rows = threads / pieces;
  const int first = thread / pieces, at = thread % pieces * width, stop = min(steps, Tile<LN>::STEPS);
  if (first >= rows) return;
  T* to_at = to + static_cast<long long>(first) * d + at;
#pragma unroll 4
  for (int t = first; t < stop; t += rows, to_at += static_cast<long long>(rows) * d) {
    const float* from_at = from + t / SEGMENT * Tile<LN>::Y_SEGMENT + t % SEGMENT * Tile<LN>::PITCH + at;
    if (quads) {
      put4(to_at, *reinterpret_cast<const float4*>(from_at));
    } else {
      narrow(*from_at, *to_at);
    }
  }
}

// Half a segment of B or C.
__device__ __forceinline__ void read_steps(float* to, const float* from) {
#pragma unroll
  for (int i = 0; i < SEGMENT / 2; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    to[i] = v.x;
    to[i + 1] = v.y;
    to[i + 2] = v.z;
    to[i + 3] = v.w;
  }
}

// One round of a shuffle scan over LN lanes: (P, h) after the W lanes before; a lane without them is complete, and no
// lane that is not uses its P again. Inline, for the shuffle's own predicate spares two moves.
template <int LN, int W>
__device__ __forceinline__ void scan_round(float& P, float& h) {
  asm volatile(
      "{\n.reg .pred before;\n.reg .f32 h_before;\n"
      "shfl.sync.up.b32 h_before|before, %0, %2, %3, 0xffffffff;\n"
      "@before fma.rn.ftz.f32 %0, %1, h_before, %0;\n}"
      : "+f"(h)
      : "f"(P), "n"(W), "n"((32 - LN) << 8));
  if constexpr (2 * W < LN) P *= __shfl_up_sync(0xffffffffu, P, W, LN);
}
template <int LN, int W, int SPI>
__device__ __forceinline__ void scan_lanes(float (&P)[SPI], float (&h)[SPI]) {
  if constexpr (W < LN) {
#pragma unroll
    for (int s = 0; s < SPI; s++) scan_round<LN, W>(P[s], h[s]);
    scan_lanes<LN, 2 * W>(P, h);
  }
}

// All states of one lane's segment: sums[i] += C h, in steps of C's scale. `states` is (A, h) of the channel, h the
// carry from tile to tile; chunk_state is null or where the state behind this segment goes.
template <int LN>
__device__ __forceinline__ void run_states(float (&sums)[SEGMENT], const float (&delta)[SEGMENT],
                                           const float (&driven)[SEGMENT], float span, float* states,
                                           const float* b, float* chunk_state, int n, int lane) {
  constexpr int ROW = Tile<LN>::ROW, SPI = 2;
#pragma unroll 1
  for (int state = 0; state < LANES_STATES; state += SPI) {
    float carry[SPI], h[SPI], P[SPI], decay[SPI][SEGMENT], increment[SPI][SEGMENT];
#pragma unroll
    for (int s = 0; s < SPI; s++) {
      const float2 own = *reinterpret_cast<const float2*>(states + 2 * s);
      carry[s] = lane == 0 ? own.y : 0.0f;
      P[s] = exp2_approx(span * own.x);
      h[s] = carry[s];
#pragma unroll
      for (int i = 0; i < SEGMENT; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(b + s * ROW + i);
        increment[s][i] = driven[i] * v.x;
        increment[s][i + 1] = driven[i + 1] * v.y;
        increment[s][i + 2] = driven[i + 2] * v.z;
        increment[s][i + 3] = driven[i + 3] * v.w;
      }
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) decay[s][i] = exp2_approx(delta[i] * own.x);
    }
#pragma unroll
    for (int i = 0; i < SEGMENT; i++) {
#pragma unroll
      for (int s = 0; s < SPI; s++) h[s] = fmaf(decay[s][i], h[s], increment[s][i]);
    }
    // Half of C is on its way while the shuffles run; for all of it there are not enough registers.
    float C_now[SPI][SEGMENT];
#pragma unroll
    for (int s = 0; s < SPI; s++) read_steps(&C_now[s][0], b + (LANES_STATES + s) * ROW);
    scan_lanes<LN, 1>(P, h);
    if (chunk_state != nullptr) {
#pragma unroll
      for (int s = 0; s < SPI; s++) {
        if (state + s < n) chunk_state[state + s] = h[s];
      }
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < SPI; s++) {
      if (lane == LN - 1) states[2 * s + 1] = h[s];
      const float h_start = __shfl_up_sync(0xffffffffu, h[s], 1, LN);
      h[s] = lane == 0 ? carry[s] : h_start;
    }
#pragma unroll
    for (int s = 0; s < SPI; s++) {
      read_steps(&C_now[s][SEGMENT / 2], b + (LANES_STATES + s) * ROW + SEGMENT / 2);
    }
#pragma unroll
    for (int i = 0; i < SEGMENT; i++) {
#pragma unroll
      for (int s = 0; s < SPI; s++) {
        h[s] = fmaf(decay[s][i], h[s], increment[s][i]);
        sums[i] = fmaf(C_now[s][i], h[s], sums[i]);
      }
    }
    states += 2 * SPI;
    b += SPI * ROW;
  }
}

// Of the 168 registers that a thread could have, 160: a multiprocessor then has room for the small blocks that expand
// the next weights meanwhile. Compilers before CUDA 12.4 cannot say so.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 4)
#define LANES_BOUNDS __maxnreg__(160)
#else
#define LANES_BOUNDS __launch_bounds__(LANES_THREADS + HELPERS, 1)
#endif

// Dynamic shared memory, cuda.py counts the same. Of all but (A, h) [channel][16], the raw B and C and the gates of an
// int8 z there are two: B and C as floats, y, and dt, z, u.
template <typename In, typename U, int LN>
__global__ void LANES_BOUNDS selective_scan_lanes(SCAN_PARAMETERS) {
  constexpr int N = LANES_STATES, TILE = Tile<LN>::STEPS, PITCH = Tile<LN>::PITCH;
  constexpr int IN_SIZE = operand_size<LN, In>(), U_SIZE = operand_size<LN, U>();
  constexpr int STATES_SIZE = Tile<LN>::STATES_SIZE, Y_SIZE = Tile<LN>::Y_SIZE;
  extern __shared__ __align__(16) float shared_floats[];
  float* const shared_bc = shared_floats;
  float* const shared_y = shared_bc + 2 * STATES_SIZE;
  float* const shared_A = shared_y + 2 * Y_SIZE;
  In* const shared_dt = reinterpret_cast<In*>(shared_A + 2 * PITCH * N);
  In* const shared_z = shared_dt + 2 * IN_SIZE;
  U* const shared_u = reinterpret_cast<U*>(shared_z + 2 * IN_SIZE);
  In* const raw = reinterpret_cast<In*>(shared_u + 2 * U_SIZE);
  float* const gates = reinterpret_cast<float*>(raw + Tile<LN>::RAW_SIZE);

  const int workers = blockDim.x - HELPERS, helper = static_cast<int>(threadIdx.x) - workers;
  const int channels = workers / LN;
  const int lane = threadIdx.x % LN, ch = threadIdx.x / LN;
  const int batch = blockIdx.x / blocks_x, c0 = (blockIdx.x % blocks_x) * channels;
  const int channels_here = min(channels, d - c0), chunks = (l - 1) / CHUNK + 1;
  typename OutOf<U>::type* y_at = y + static_cast<long long>(batch) * l * d + c0;

  auto fetch = [&](int t0, int buffer) {
    const long long t = t0;
    const int steps = l - t0;
    const In *b_at = B + batch * b_batch + t * b_row, *c_at = C + batch * c_batch + t * c_row;
    constexpr int QUAD = 4 * sizeof(In);
    const bool aligned = n == N && rows_aligned<QUAD>(b_at, b_row) && rows_aligned<QUAD>(c_at, c_row);
    if (aligned) copy_states<LN>(raw, b_at, c_at, b_row, c_row, steps, helper);
    copy_operand<LN>(shared_dt + buffer * IN_SIZE, dt + batch * dt_batch + t * dt_row + c0, dt_row, steps,
                     channels_here, helper);
    copy_operand<LN>(shared_u + buffer * U_SIZE, u + batch * u_batch + t * u_row + c0, u_row, steps, channels_here,
                     helper);
    copy_operand<LN>(shared_z + buffer * IN_SIZE, z + batch * z_batch + t * z_row + c0, z_row, steps, channels_here,
                     helper);
    if (!aligned) {
      load_states<LN>(shared_bc + buffer * STATES_SIZE, b_at, c_at, b_row, c_row, steps, n, helper);
    }
    return aligned;
  };
  for (int i = threadIdx.x; i < channels * N && helper < 0; i += workers) {
    const int c = min(c0 + i / N, d - 1), state = i % N;
    const long long at = (static_cast<long long>(batch) * d + c) * n + state;
    shared_A[2 * i] = state < n ? A[static_cast<long long>(c) * n + state] * LOG2E : 0.0f;
    shared_A[2 * i + 1] = state < n ? load_state(state_in, at, state_scale, state_inv_scale) : 0.0f;
  }
  if (helper < 0) fill_gates(gates, raw, z_scale, workers);
  const float bias = dt_bias[min(c0 + ch, d - 1)];
  // y is scaled by C's scale at the end.
  const float skip_weight = D[min(c0 + ch, d - 1)] / c_scale;
  const float u_step = u_step_of(u_steps, min(c0 + ch, d - 1), u_scale);
  const float u_inverse = u_inverse_of(u_steps, u_step, u_inv_scale);

  // The first round only fetches.
  int buffer = 1;
#pragma unroll 1
  for (int t0 = -TILE; t0 < l; t0 += TILE) {
    if (helper >= 0) {
      const int next = t0 + TILE;
      bool aligned = false;
      if (next < l) aligned = fetch(next, buffer ^ 1);
      if (t0 > 0) {
        store_y<LN>(y_at, shared_y + (buffer ^ 1) * Y_SIZE, d, TILE, channels_here, helper, HELPERS);
        y_at += static_cast<long long>(TILE) * d;
      }
      wait_for_copies();
      if (aligned) spread_states<LN>(shared_bc + (buffer ^ 1) * STATES_SIZE, raw, helper);
    } else if (t0 >= 0) {
      const int own_at = buffer * IN_SIZE + lane * operand_segment<LN, In>() + ch;
      const In *dt_own = shared_dt + own_at, *z_own = shared_z + own_at;
      const U* u_own = shared_u + buffer * U_SIZE + lane * operand_segment<LN, U>() + ch;
      float delta[SEGMENT], driven[SEGMENT], sums[SEGMENT], span = 0.0f;
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        const float u_now = u_of<U>(load_raw(u_own + i * PITCH), u_step, u_inverse);
        delta[i] = delta_of(load_raw(dt_own + i * PITCH), dt_scale, bias);
        driven[i] = delta[i] * u_now * b_scale;
        sums[i] = skip_weight * u_now;
      }
      // Steps behind the end leave the state, whatever lies in their rows.
      if (l - t0 < TILE) {
#pragma unroll
        for (int i = 0; i < SEGMENT; i++) {
          const bool valid = t0 + lane * SEGMENT + i < l;
          delta[i] = valid ? delta[i] : 0.0f;
          driven[i] = valid ? driven[i] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) span += delta[i];
      // Opaque, or its sum would be formed again for every state to save a register.
      asm("" : "+f"(span));
      // A chunk ends with every fourth lane; the last chunk's state is stored after the last tile.
      const int chunk = (t0 + lane * SEGMENT) / CHUNK;
      const bool ends_chunk = ch < channels_here && (lane + 1) % (CHUNK / SEGMENT) == 0 && chunk < chunks - 1;
      float* const chunk_state =
          ends_chunk && chunk_states != nullptr
              ? chunk_states + ((static_cast<long long>(batch) * chunks + chunk) * d + c0 + ch) * n
              : nullptr;
      run_states<LN>(sums, delta, driven, span, shared_A + 2 * ch * N,
                     shared_bc + buffer * STATES_SIZE + lane * PADDED, chunk_state, n, lane);
      float* y_own = shared_y + buffer * Y_SIZE + lane * Tile<LN>::Y_SEGMENT + ch;
#pragma unroll
      for (int i = 0; i < SEGMENT; i++) {
        y_own[i * PITCH] = c_scale * sums[i] * gate_of(gates, load_raw(z_own + i * PITCH));
      }
    }
    __syncthreads();
    buffer ^= 1;
  }
  const int last = (l - 1) / TILE * TILE;
  store_y<LN>(y + (static_cast<long long>(batch) * l + last) * d + c0, shared_y + (buffer ^ 1) * Y_SIZE, d, l - last,
              channels_here, threadIdx.x, blockDim.x);
  for (int i = threadIdx.x; i < channels_here * n; i += blockDim.x) {
    const int c = c0 + i / n, state = i % n;
    const float h = shared_A[2 * (i / n * N + state) + 1];
    store_state(state_out, (static_cast<long long>(batch) * d + c) * n + state, h, state_inv_scale);
    if (chunk_states != nullptr) {
      chunk_states[((static_cast<long long>(batch) * chunks + chunks - 1) * d + c) * n + state] = h;
    }
  }
}

#endif
