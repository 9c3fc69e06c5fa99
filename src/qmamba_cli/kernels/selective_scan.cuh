// Scalar functions and operand access of the selective scan; include numerics.cuh first.
//
// Operands are int8 (a byte as loaded, an unsigned int) or float32; every function here has one overload for each,
// so that a kernel is written once.
#ifndef QM_SELECTIVE_SCAN_CUH
#define QM_SELECTIVE_SCAN_CUH

constexpr float LOG2E = 1.4426950408889634f;
// As the bias of a step behind the end: its delta is exactly zero. A select of the result would become a branch.
constexpr float NO_STEP = -1e30f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float softplus(float v) {
  const float e = exp2_approx(-LOG2E * fabsf(v));
  float q = 5.36448834e-3f;
  q = fmaf(q, e, -3.00644487e-2f);
  q = fmaf(q, e, 7.9202354e-2f);
  q = fmaf(q, e, -0.137536183f);
  q = fmaf(q, e, 0.191535696f);
  q = fmaf(q, e, -0.248571426f);
  q = fmaf(q, e, 0.33321321f);
  q = fmaf(q, e, -0.499996483f);
  q = fmaf(q, e, 1.0f);
  return fmaf(q, e, fmaxf(v, 0.0f));
}

// z * sigmoid(z); the divisor is in [1, 2] for either sign.
__device__ __forceinline__ float gate(float z) {
  const float e = exp2_approx(-LOG2E * fabsf(z));
  return __fdividef(z < 0.0f ? z * e : z, 1.0f + e);
}

// An operand as it is loaded (int8 stays a byte until it is used), and its value.
__device__ __forceinline__ unsigned int load_raw(const signed char* p) {
  return *reinterpret_cast<const unsigned char*>(p);
}
__device__ __forceinline__ float load_raw(const float* p) { return *p; }

__device__ __forceinline__ unsigned int load_zero(const signed char*) { return 0u; }
__device__ __forceinline__ float load_zero(const float*) { return 0.0f; }

__device__ __forceinline__ float steps_of(unsigned int raw) { return qm_i8_to_f32(raw); }
__device__ __forceinline__ float steps_of(float raw) { return raw; }

__device__ __forceinline__ float real_of(unsigned int raw, float scale) { return qm_i8_to_f32(raw) * scale; }
__device__ __forceinline__ float real_of(float raw, float) { return raw; }

__device__ __forceinline__ float u_of(unsigned int raw, float scale, float) { return real_of(raw, scale); }
__device__ __forceinline__ float u_of(float raw, float scale, float inv_scale) {
  return inv_scale == 0.0f ? raw : qm_dequantize(qm_quantize(raw, inv_scale), scale);
}

__device__ __forceinline__ float delta_of(unsigned int raw, float scale, float bias) {
  return softplus(fmaf(qm_i8_to_f32(raw), scale, bias));
}
__device__ __forceinline__ float delta_of(float raw, float, float bias) { return softplus(raw + bias); }

template <typename T>
struct RawOf {
  using type = float;
};
template <>
struct RawOf<signed char> {
  using type = unsigned int;
};

__device__ __forceinline__ float load_state(const void* state, long long i, float scale, float inv_scale) {
  if (state == nullptr) return 0.0f;
  if (inv_scale == 0.0f) return static_cast<const float*>(state)[i];
  return qm_dequantize(static_cast<const signed char*>(state)[i], scale);
}

__device__ __forceinline__ void store_state(void* state, long long i, float h, float inv_scale) {
  if (inv_scale == 0.0f) {
    static_cast<float*>(state)[i] = h;
  } else {
    static_cast<signed char*>(state)[i] = qm_quantize(h, inv_scale);
  }
}

// The gate of every int8 code, or, of float32 operands, no table; the second argument names the type.
__device__ __forceinline__ void fill_gates(float* gates, const signed char*, float z_scale) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    gates[i] = gate(real_of(static_cast<unsigned int>(i), z_scale));
  }
}
__device__ __forceinline__ void fill_gates(float*, const float*, float) {}
__device__ __forceinline__ float gate_of(const float* gates, unsigned int raw) { return gates[raw]; }
__device__ __forceinline__ float gate_of(const float*, float z) { return gate(z); }

// BYTES (4, 8 or 16, all of them aligned) from global to shared memory behind the thread's back; zeros if !valid.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  const unsigned int to_shared = static_cast<unsigned int>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to_shared), "l"(from), "n"(BYTES),
               "r"(valid ? BYTES : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Whether every row that starts at p + i * row allows accesses of BYTES.
template <int BYTES, typename T>
__device__ __forceinline__ bool rows_aligned(const T* p, long long row) {
  const unsigned long long start = reinterpret_cast<unsigned long long>(p);
  return (start | static_cast<unsigned long long>(row * static_cast<long long>(sizeof(T)))) % BYTES == 0;
}

// A tile of STEPS rows of CHANNELS, dense in shared memory; behind `steps` rows and `channels` it is zero.
// `aligned` promises 16-byte rows (or as many as there are) and CHANNELS channels.
template <int STEPS, int CHANNELS, int THREADS, typename T>
__device__ __forceinline__ void copy_tile(T* to, const T* from, long long row, int steps, int channels,
                                          bool aligned) {
  constexpr int BYTES = CHANNELS * sizeof(T) < 16 ? CHANNELS * sizeof(T) : 16;
  constexpr int WIDTH = BYTES / sizeof(T), PIECES = CHANNELS / WIDTH;
  if (aligned) {
#pragma unroll
    for (int k = 0; k < (STEPS * PIECES - 1) / THREADS + 1; k++) {
      const int i = threadIdx.x + k * THREADS, step = i / PIECES, at = i % PIECES * WIDTH;
      const bool valid = step < steps;
      if (STEPS * PIECES % THREADS != 0 && step >= STEPS) break;
      copy_async<BYTES>(to + step * CHANNELS + at, from + (valid ? step : 0) * row + at, valid);
    }
  } else {
    static_assert(STEPS * CHANNELS % THREADS == 0, "every thread copies as much");
#pragma unroll 4
    for (int k = 0; k < STEPS * CHANNELS / THREADS; k++) {
      const int i = threadIdx.x + k * THREADS, step = i / CHANNELS, at = i % CHANNELS;
      to[i] = step < steps && at < channels ? from[step * row + at] : T(0);
    }
  }
}

// 4 rows of 4 bytes to their transpose.
__device__ __forceinline__ void transpose_bytes(unsigned int (&w)[4]) {
  const unsigned int low01 = __byte_perm(w[0], w[1], 0x5140), low23 = __byte_perm(w[2], w[3], 0x5140);
  const unsigned int high01 = __byte_perm(w[0], w[1], 0x7362), high23 = __byte_perm(w[2], w[3], 0x7362);
  w[0] = __byte_perm(low01, low23, 0x5410);
  w[1] = __byte_perm(low01, low23, 0x7632);
  w[2] = __byte_perm(high01, high23, 0x5410);
  w[3] = __byte_perm(high01, high23, 0x7632);
}

// Of the kernel whose lanes share a channel's steps; a tile has LN segments.
constexpr int SEGMENT = 16;  // consecutive steps of one lane
constexpr int PADDED = 20;   // floats of a segment in shared memory: 8 lanes reading 16 bytes hit all 32 banks
constexpr int LANES_STATES = 16;

// Where step t of a tile lies in a channel's row of a staged operand, and 16 consecutive steps from there.
__device__ __forceinline__ int staged_at(const signed char*, int t) { return t; }
__device__ __forceinline__ int staged_at(const float*, int t) { return t / SEGMENT * PADDED + t % SEGMENT; }
template <typename T, int LN>
__device__ constexpr int staged_row() {
  return sizeof(T) == 1 ? LN * SEGMENT + 16 : LN * PADDED + 4;
}
__device__ __forceinline__ unsigned int load_word(const signed char* p) {
  return *reinterpret_cast<const unsigned int*>(p);
}

// A tile of LN * SEGMENT rows of `channels` to [channel][step]; behind `steps` rows and `channels_here` it is zero.
template <int LN, typename T>
__device__ __forceinline__ void stage_channels(T* to, int to_row, const T* from, long long row, int steps,
                                               int channels, int channels_here) {
  const int ch = threadIdx.x % channels, first = threadIdx.x / channels;
#pragma unroll 8
  for (int k = 0; k < SEGMENT; k++) {
    const int t = first + k * LN;
    to[ch * to_row + staged_at(to, t)] = ch < channels_here && t < steps ? from[t * row + ch] : T(0);
  }
}

// The same for whole words, in two parts, so that several operands are waited for at once: a thread takes 4 steps
// of 4 channels and transposes them.
__device__ __forceinline__ void load_words(unsigned int (&w)[4], const signed char* from, long long row, int steps,
                                           int channels) {
  const int quads = channels / 4, t = threadIdx.x / quads * 4;
  const signed char* p = from + t * row + threadIdx.x % quads * 4;
#pragma unroll
  for (int k = 0; k < 4; k++) w[k] = t + k < steps ? load_word(p + k * row) : 0u;
}
__device__ __forceinline__ void stage_words(signed char* to, int to_row, unsigned int (&w)[4], int channels) {
  const int quads = channels / 4, at = threadIdx.x % quads * 4, t = threadIdx.x / quads * 4;
  transpose_bytes(w);
#pragma unroll
  for (int k = 0; k < 4; k++) *reinterpret_cast<unsigned int*>(to + (at + k) * to_row + t) = w[k];
}

// The same rows of B and C to float [state][step], zero behind n states.
template <int LN, typename T>
__device__ __forceinline__ void stage_states(float* to_b, float* to_c, const T* b, const T* c, long long b_row,
                                             long long c_row, int steps, int n) {
  constexpr int N = LANES_STATES, ROW = LN * PADDED + 4;
  if constexpr (sizeof(T) == 1) {
    if (n == N && rows_aligned<4>(b, b_row) && rows_aligned<4>(c, c_row)) {
      const int at = threadIdx.x % (N / 4) * 4;
#pragma unroll 4
      for (int t = threadIdx.x / (N / 4); t < LN * SEGMENT; t += blockDim.x / (N / 4)) {
        const unsigned int b_word = t < steps ? load_word(b + t * b_row + at) : 0u;
        const unsigned int c_word = t < steps ? load_word(c + t * c_row + at) : 0u;
        const int to = at * ROW + staged_at(to_b, t);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          to_b[to + k * ROW] = steps_of(__byte_perm(b_word, 0u, 0x4440u | k));
          to_c[to + k * ROW] = steps_of(__byte_perm(c_word, 0u, 0x4440u | k));
        }
      }
      return;
    }
  }
  const int state = threadIdx.x % N;
#pragma unroll 4
  for (int t = threadIdx.x / N; t < LN * SEGMENT; t += blockDim.x / N) {
    const T *b_at = b + t * b_row + state, *c_at = c + t * c_row + state;
    const bool valid = state < n && t < steps;
    const int to = state * ROW + staged_at(to_b, t);
    to_b[to] = steps_of(valid ? load_raw(b_at) : load_zero(b_at));
    to_c[to] = steps_of(valid ? load_raw(c_at) : load_zero(c_at));
  }
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A tile of y, staged as [channel][step], to rows of d floats.
template <int LN>
__device__ __forceinline__ void store_channels(float* to, const float* from, int d, int steps, int channels,
                                               int channels_here) {
  constexpr int ROW = LN * PADDED + 4;
  if (channels % 4 == 0 && channels_here == channels && d % 4 == 0) {
    const int quads = channels / 4, at = threadIdx.x % quads * 4, first = threadIdx.x / quads;
#pragma unroll
    for (int k = 0; k < SEGMENT / 4; k++) {
      const int t = first + k * LN * 4;
      const float* p = from + at * ROW + staged_at(from, t);
      const float4 v = make_float4(p[0], p[ROW], p[2 * ROW], p[3 * ROW]);
      if (t < steps) *reinterpret_cast<float4*>(to + static_cast<long long>(t) * d + at) = v;
    }
    return;
  }
  const int ch = threadIdx.x % channels, first = threadIdx.x / channels;
#pragma unroll 4
  for (int k = 0; k < SEGMENT; k++) {
    const int t = first + k * LN;
    if (ch < channels_here && t < steps) {
      to[static_cast<long long>(t) * d + ch] = from[ch * ROW + staged_at(from, t)];
    }
  }
}

__device__ __forceinline__ void read_segment(const signed char* row, int lane, unsigned int (&raw)[SEGMENT]) {
  const uint4 w = *reinterpret_cast<const uint4*>(row + lane * SEGMENT);
  const unsigned int words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < SEGMENT; i++) raw[i] = __byte_perm(words[i / 4], 0u, 0x4440u | (i % 4));
}
__device__ __forceinline__ void read_segment(const float* row, int lane, float (&values)[SEGMENT]) {
  const float4* at = reinterpret_cast<const float4*>(row + lane * PADDED);
#pragma unroll
  for (int k = 0; k < SEGMENT / 4; k++) {
    const float4 v = at[k];
    values[4 * k] = v.x;
    values[4 * k + 1] = v.y;
    values[4 * k + 2] = v.z;
    values[4 * k + 3] = v.w;
  }
}

// Sums over LPC lanes of LPC values each; lane q is left with the sum of the values at q.
template <int LPC>
__device__ __forceinline__ float reduce_scatter(float (&p)[LPC], int q) {
#pragma unroll
  for (int o = LPC / 2; o >= 1; o /= 2) {
#pragma unroll
    for (int e = 0; e < o; e++) {
      const float sent = (q & o) ? p[e] : p[e + o], kept = (q & o) ? p[e + o] : p[e];
      p[e] = kept + __shfl_xor_sync(0xffffffffu, sent, o);
    }
  }
  return p[0];
}

#endif
