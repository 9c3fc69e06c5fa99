// Scalar functions and operand access of the selective scan; include numerics.cuh and half.cuh first.
//
// Operands are int8 (a byte as loaded, an unsigned int), float32, float16 or bfloat16 (a float as soon as loaded);
// every function here has one overload for each, so that a kernel is written once.
#ifndef QM_SELECTIVE_SCAN_CUH
#define QM_SELECTIVE_SCAN_CUH

constexpr int CHUNK = 64;  // steps between chunk states, as in reference.py
constexpr float LOG2E = 1.4426950408889634f;
// As the bias of a step behind the end: its delta is exactly zero. A select of the result would become a branch.
constexpr float NO_STEP = -1e30f;

// The parameters of every kernel. Strides are in elements; scales are real units a step, 1 for float operands.
//   u_steps (d) has a scale of u for each channel, or is null where u_scale is that of all.
//   u_inv_scale != 0 puts a float32 u on the grid first. state_inv_scale != 0: states are int8, else float32.
//   state_in (b, d, n) or null for zeros; state_out (b, d, n); chunk_states (b, ceil(l / CHUNK), d, n) or null.
//   blocks_x: blocks along the channels; blockIdx.x = batch * blocks_x + block of channels.
#define SCAN_PARAMETERS                                                                                     \
  const U *__restrict__ u, const In *__restrict__ dt, const In *__restrict__ z, const In *__restrict__ B,   \
      const In *__restrict__ C, const float *__restrict__ A, const float *__restrict__ D,                   \
      const float *__restrict__ dt_bias, const float *__restrict__ u_steps,                                 \
      const void *__restrict__ state_in, void *__restrict__ state_out, float *__restrict__ chunk_states,    \
      typename OutOf<U>::type *__restrict__ y, long long u_batch,                                           \
      long long u_row, long long dt_batch, long long dt_row, long long z_batch, long long z_row,            \
      long long b_batch, long long b_row, long long c_batch, long long c_row, float u_scale,                \
      float u_inv_scale, float dt_scale, float b_scale, float c_scale, float z_scale, float state_scale,    \
      float state_inv_scale, int d, int l, int n, int blocks_x, int lanes_per_channel

// Of y: u's own type, or float32 where u is int8.
template <typename U>
struct OutOf {
  using type = U;
};
template <>
struct OutOf<signed char> {
  using type = float;
};
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float softplus(float v) {
  return qm_softplus_from(v, exp2_approx(-LOG2E * fabsf(v)));
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
template <typename T>
__device__ __forceinline__ float load_raw(const T* p) {
  return widen(*p);
}

// Not yet converted: a conversion waits for its operand.
__device__ __forceinline__ unsigned int load_late(const signed char* p) { return load_raw(p); }
template <typename T>
__device__ __forceinline__ T load_late(const T* p) {
  return *p;
}

__device__ __forceinline__ float steps_of(unsigned int raw) { return qm_i8_to_f32(raw); }
template <typename T>
__device__ __forceinline__ float steps_of(T raw) {
  return widen(raw);
}

__device__ __forceinline__ float real_of(unsigned int raw, float scale) { return qm_i8_to_f32(raw) * scale; }
__device__ __forceinline__ float real_of(float raw, float) { return raw; }

// u's scale in channel c, and its inverse: zero where nothing is rounded.
__device__ __forceinline__ float u_step_of(const float* u_steps, int c, float u_scale) {
  return u_steps == nullptr ? u_scale : u_steps[c];
}
__device__ __forceinline__ float u_inverse_of(const float* u_steps, float u_step, float u_inv_scale) {
  return u_steps == nullptr || u_inv_scale == 0.0f ? u_inv_scale : __frcp_rn(u_step);
}

// Only a float32 u may have to be put on its grid.
template <typename U>
__device__ __forceinline__ float u_of(unsigned int raw, float scale, float) {
  return real_of(raw, scale);
}
template <typename U>
__device__ __forceinline__ float u_of(float raw, float scale, float inv_scale) {
  return sizeof(U) < 4 || inv_scale == 0.0f ? raw : qm_dequantize(qm_quantize(raw, inv_scale), scale);
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
__device__ __forceinline__ void fill_gates(float* gates, const signed char*, float z_scale, int threads) {
  for (int i = threadIdx.x; i < 256; i += threads) {
    gates[i] = gate(real_of(static_cast<unsigned int>(i), z_scale));
  }
}
template <typename T>
__device__ __forceinline__ void fill_gates(float*, const T*, float, int) {}
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
      to[i] = step < steps && at < channels ? from[step * row + at] : T{};
    }
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
