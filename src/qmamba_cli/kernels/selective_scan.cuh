// Scalar functions and operand access of the selective scan; include numerics.cuh first.
//
// Operands are int8 (a byte as loaded, an unsigned int) or float32; every function here has one overload for each,
// so that a kernel is written once.
#ifndef QM_SELECTIVE_SCAN_CUH
#define QM_SELECTIVE_SCAN_CUH

constexpr float LOG2E = 1.4426950408889634f;

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
