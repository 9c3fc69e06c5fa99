// A value and its index as one 64-bit key, for kernels that look for the largest; include numerics.cuh first.
//
// The value's bits in an order of unsigned numbers, NaN above all, then the index upside down: the largest key is the
// first of the largest values whatever the order of comparing.
#ifndef QM_ARGMAX_KEY_CUH
#define QM_ARGMAX_KEY_CUH

__device__ __forceinline__ unsigned long long key_of(float x, int index) {
  const unsigned int bits = qm_to_bits(x + 0.0f);  // one zero
  const unsigned int ordered = x != x ? 0xffffffffu : (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned int>(index));
}

__device__ __forceinline__ unsigned long long largest_of_warp(unsigned long long key) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, key, distance);
    key = other > key ? other : key;
  }
  return key;
}

__device__ __forceinline__ long long index_of(unsigned long long key) {
  return 0xffffffffu - static_cast<unsigned int>(key);
}

#endif
