// The arithmetic of the causal_conv1d kernels: sums of int8 windows, SiLU, and its way onto the int8 grid. Included
// after numerics.cuh; causal_conv1d/causal_conv1d.cu describes all of it.
#ifndef QM_CAUSAL_CONV1D_SILU_CUH
#define QM_CAUSAL_CONV1D_SILU_CUH

typedef unsigned int u32;
typedef signed char i8;
typedef long long i64;

constexpr float LOG2E = 1.44269504f;
// int8 with one scale: SiLU is computed two channels at a time, in units of UNIT.
constexpr float UNIT = 0x1p-63f;
// The bits of QM_MAGIC: integers added to them are added to the float.
constexpr int MAGIC_BITS = 0x4B400000;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Infinite exp2 gives the limit 0, so nothing is bounded.
__device__ __forceinline__ float silu(float a) { return a * rcp_approx(1.0f + exp2_approx(-LOG2E * a)); }

// (1 + exp(-a)) * UNIT, at most 1: that keeps the product of two of them a normal number, and leaves of SiLU a * UNIT
// where exp(-a) is above 2^63. Saturating is part of the instruction.
__device__ __forceinline__ float divisor(float a) {
  float y;
  asm("fma.rn.ftz.sat.f32 %0, %1, %2, %2;" : "=f"(y) : "f"(exp2_approx(-LOG2E * a)), "f"(UNIT));
  return y;
}

// SiLU of two channels 2k and 2k + 1 at one step, by one reciprocal: a and b become silu / UNIT. The pair is the same
// in all layouts and calls, and so are the bits.
__device__ __forceinline__ void silu_pair(float& a, float& b) {
  const float p = divisor(a), q = divisor(b), both = rcp_approx(p * q);
  a *= q * both;
  b *= p * both;
}

// UNIT / out_scale of four channels: EACH its own, or one for all, in one register.
template <bool EACH>
struct InvScales {
  float value[EACH ? 4 : 1];
  // unit: of the values that are multiplied.
  template <typename Four>
  __device__ __forceinline__ void set(const Four& out_scales, float inv_scale, float unit = UNIT) {
    if constexpr (EACH) {
#pragma unroll
      for (int j = 0; j < 4; ++j) value[j] = __frcp_rn(out_scales[j]) * unit;
    } else {
      value[0] = inv_scale * unit;
    }
  }
  __device__ __forceinline__ float operator[](int j) const { return value[EACH ? j : 0]; }
};

// Four values in units of UNIT to int8 as qm_quantize has it.
template <bool EACH>
__device__ __forceinline__ u32 quantize_four(const float (&v)[4], const InvScales<EACH>& inv_scales) {
  return qm_four_bytes(v[0] * inv_scales[0], v[1] * inv_scales[1], v[2] * inv_scales[2], v[3] * inv_scales[3]);
}

// The exact dot product of four bytes with the taps.
__device__ __forceinline__ float dot(u32 window, u32 taps) {
  return __int_as_float(__dp4a(static_cast<int>(window), static_cast<int>(taps), MAGIC_BITS)) - QM_MAGIC;
}

// Output k of four from their bytes and the four before them.
__device__ __forceinline__ float window_dot(u32 before, u32 now, u32 taps, int k) {
  return dot(__byte_perm(before, now, 0x4321 + 0x1111 * k), taps);
}

#endif
