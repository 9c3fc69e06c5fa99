// Scalar functions that both backends agree on.
//
// The same text compiles as CUDA (NVRTC or nvcc) and as plain C++, where a test compares it with the reference
// over many values. Kernels round to int8 by qm_quantize; where one rounds in another way (fp16 rows in
// hadamard_tensor.cuh), its comment says so, and its output is of the class `grid`.
//
//   quantize(x)   = saturate(round_half_even(x * inv_scale)), range [-128, 127]
//   silu(x)       = x / (1 + exp(-x))
//   softplus(x)   = x for x > 20, else log1p(exp(x))
#ifndef QM_NUMERICS_CUH
#define QM_NUMERICS_CUH

#if defined(__CUDACC__)
#define QM_FN __device__ __forceinline__
QM_FN float qm_from_bits(unsigned int bits) { return __uint_as_float(bits); }
QM_FN unsigned int qm_to_bits(float x) { return __float_as_uint(x); }
#else
#include <cmath>
#include <cstring>
#define QM_FN static inline
QM_FN float qm_from_bits(unsigned int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
QM_FN unsigned int qm_to_bits(float x) {
  unsigned int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
#endif

// 1.5 * 2^23: adding it to |x| <= 2^22 rounds x half to even and leaves the integer in the low bits.
#define QM_MAGIC 12582912.0f

// Steps (real units times inv_scale) to int8; NaN becomes 127, since fminf returns its other operand.
QM_FN signed char qm_round_saturate(float steps) {
  const float clamped = fmaxf(fminf(steps, 127.0f), -128.0f);
  return static_cast<signed char>(qm_to_bits(clamped + QM_MAGIC) & 0xffu);
}

QM_FN signed char qm_quantize(float x, float inv_scale) { return qm_round_saturate(x * inv_scale); }

#if defined(__CUDACC__)
// Two values in steps to two bytes, the first in the lowest, below the two lower bytes of `above`: as
// qm_round_saturate has them, but NaN becomes 0. One instruction from compute capability 9.0 on; with .ftz in its
// conversions it would be three, and has the same results.
QM_FN unsigned int qm_two_bytes(float low, float high, unsigned int above) {
  unsigned int packed;
  asm("{\n.reg .s32 low, high;\ncvt.rni.s32.f32 low, %1;\ncvt.rni.s32.f32 high, %2;\n"
      "cvt.pack.sat.s8.s32.b32 %0, high, low, %3;\n}"
      : "=r"(packed)
      : "f"(low), "f"(high), "r"(above));
  return packed;
}

// Four values in steps to four bytes, the first in the lowest.
QM_FN unsigned int qm_four_bytes(float a, float b, float c, float d) {
  return qm_two_bytes(a, b, qm_two_bytes(c, d, 0));
}
#endif

// A signed byte, given as the low 8 bits of `byte`, to float without the conversion unit: 2^23 + (q + 128) is
// exact, and so is the subtraction.
QM_FN float qm_i8_to_f32(unsigned int byte) {
  return qm_from_bits(0x4B000000u | ((byte & 0xffu) ^ 0x80u)) - 8388736.0f;
}

QM_FN float qm_dequantize(signed char q, float scale) {
  return qm_i8_to_f32(static_cast<unsigned char>(q)) * scale;
}

QM_FN float qm_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

QM_FN float qm_silu(float x) { return x / (1.0f + expf(-x)); }

// The same from e = exp(-|x|), however it was found: max(x, 0) + log1p(e), the latter a polynomial times e of relative
// error below 1e-7. The threshold of 20 holds by itself, since log1p(exp(-20)) is below half an ulp of 20.
QM_FN float qm_softplus_from(float x, float e) {
  float q = 5.36448834e-3f;
  q = fmaf(q, e, -3.00644487e-2f);
  q = fmaf(q, e, 7.9202354e-2f);
  q = fmaf(q, e, -0.137536183f);
  q = fmaf(q, e, 0.191535696f);
  q = fmaf(q, e, -0.248571426f);
  q = fmaf(q, e, 0.33321321f);
  q = fmaf(q, e, -0.499996483f);
  q = fmaf(q, e, 1.0f);
  return fmaf(q, e, fmaxf(x, 0.0f));
}

QM_FN float qm_softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

#endif
