// The machine instructions of the decode kernels: copies behind a thread's back, tensor-core products, words that
// blocks wait for. Nothing else in those kernels but overlap.cuh is tied to one compiler, so that a test can replace
// these two files and run them on a CPU.
#ifndef QM_DECODE_PTX_CUH
#define QM_DECODE_PTX_CUH

// Time of a multiprocessor in cycles, and of the whole device in ns; for benchmarks.
__device__ __forceinline__ long long cycles() { return clock64(); }
__device__ __forceinline__ long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Counts a block whose writes are done; call it in one thread, after a barrier of the block.
__device__ __forceinline__ void count_block(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits in one thread until `full` blocks have been counted; a barrier of the block then hands what they wrote to its
// other threads. Blocks that will never be counted end the launch with an error after some seconds.
__device__ __forceinline__ void wait_for_blocks(const int* counter, int full) {
  for (unsigned int tries = 0u;; tries++) {
    int seen;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= full) break;
    if (tries == 1u << 24) asm volatile("trap;");
  }
}

// A word that other blocks wait for, and four such words, waited for until none is `untold` any more. Words that never
// come end the launch with an error after some seconds.
__device__ __forceinline__ void tell(float* to, float value) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}
__device__ __forceinline__ float4 wait_for_four(const float4* from, unsigned int untold) {
  uint4 seen;
  for (unsigned int tries = 0u;; tries++) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(seen.x), "=r"(seen.y), "=r"(seen.z), "=r"(seen.w)
                 : "l"(from)
                 : "memory");
    if (seen.x != untold && seen.y != untold && seen.z != untold && seen.w != untold) break;
    if (tries == 1u << 24) asm volatile("trap;");
  }
  return make_float4(__uint_as_float(seen.x), __uint_as_float(seen.y), __uint_as_float(seen.z),
                     __uint_as_float(seen.w));
}

// 16 aligned bytes from global to shared memory.
__device__ __forceinline__ void copy16(void* to, const void* from) {
  const unsigned int to_shared = static_cast<unsigned int>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the newest group of this thread's copies.
__device__ __forceinline__ void wait_for_older_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Waits for all but the newest COUNT groups.
template <int COUNT>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// Waits for the `threads` threads (whole warps of one block) that meet at this barrier, 1 to 15.
__device__ __forceinline__ void meet_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Asks for a line in the second-level cache. It hands over no value, so it may run before `wait_for_producers`.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Reads past the first-level cache, which other multiprocessors' writes do not reach.
template <typename T>
__device__ __forceinline__ T load_fresh(const T* p) {
  return __ldcg(p);
}

// sums += a b, a (16, 32) and b (32, 8) of int8, exact in int32. With g = lane / 4 and q = lane % 4 a lane hands over
// two words of four columns of each of its rows g (top) and g + 8 (low), the same columns of column g of b, and holds
// sums = {(g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)}. Which columns are a lane's is the caller's choice.
__device__ __forceinline__ void multiply_i8(int (&sums)[4], unsigned int top_0, unsigned int low_0,
                                            unsigned int top_1, unsigned int low_1, unsigned int b_0,
                                            unsigned int b_1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(top_0), "r"(low_0), "r"(top_1), "r"(low_1), "r"(b_0), "r"(b_1));
}

// Four integers, saturated to int8, the first in the lowest byte.
__device__ __forceinline__ unsigned int pack_saturated(int a, int b, int c, int d) {
  unsigned int upper, all;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(upper) : "r"(d), "r"(c), "r"(0));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(b), "r"(a), "r"(upper));
  return all;
}

// x / y within 2 ulp; 0 where y is infinite.
__device__ __forceinline__ float divide_approx(float x, float y) { return __fdividef(x, y); }

// 2^x; relative error 2^-22.5, results below 2^-126 are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif
