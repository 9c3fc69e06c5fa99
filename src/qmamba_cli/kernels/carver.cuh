// Arrays in dynamic shared memory.
#ifndef QM_CARVER_CUH
#define QM_CARVER_CUH

// Cuts the dynamic shared memory into arrays of whole 16 bytes; the launcher adds up the same sizes.
struct Carver {
  unsigned char* next;
  template <typename T>
  __device__ __forceinline__ T* take(int count) {
    T* start = reinterpret_cast<T*>(next);
    next += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return start;
  }
};

#endif
