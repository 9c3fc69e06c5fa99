// 16-bit floats as they lie in memory, without CUDA's own headers: arithmetic is float32, rounded once at the end.
// Include numerics.cuh first.
#ifndef QM_HALF_CUH
#define QM_HALF_CUH

struct F16 {
  unsigned short bits;
};
struct BF16 {
  unsigned short bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(BF16 x) { return qm_from_bits(static_cast<unsigned int>(x.bits) << 16); }

// To the nearest, ties to even; beyond the range infinity.
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, F16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void narrow(float x, BF16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

#endif
