// The machine instructions of Hopper's asynchronous matrix products, which its own target alone has. A test replaces
// this file, as decode_ptx.cuh, and runs the rest on a CPU.
#ifndef QM_DECODE_WIDE_PTX_CUH
#define QM_DECODE_WIDE_PTX_CUH

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QM_WIDE 1

// What this thread wrote to shared memory, or knows to be written, becomes visible to products that begin later. It
// waits for the thread's own copies, so a thread that multiplies asks for none.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_wide() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_wide() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the newest PENDING groups of products.
template <int PENDING>
__device__ __forceinline__ void wait_for_wide() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A word in shared memory that counts arrivals; a phase ends with the last of `count`, and the next one begins.
__device__ __forceinline__ unsigned int shared_address(const void* p) {
  return static_cast<unsigned int>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void begin_arrivals(unsigned long long* word, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(word)), "r"(count) : "memory");
}
// Of a word that no thread uses any more.
__device__ __forceinline__ void end_arrivals(unsigned long long* word) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(shared_address(word)) : "memory");
}
__device__ __forceinline__ void arrive(unsigned long long* word) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(word)) : "memory");
}
// Once this thread's copies are there.
__device__ __forceinline__ void arrive_after_copies(unsigned long long* word) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(word)) : "memory");
}
// Waits for the end of the phase of this parity, of 0 first. What never ends ends the launch with an error.
__device__ __forceinline__ void await_arrivals(const unsigned long long* word, int parity) {
  for (unsigned int tries = 0u;; tries++) {
    unsigned int done;
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(word)), "r"(parity)
        : "memory");
    if (done) break;
    if (tries == 1u << 24) asm volatile("trap;");
  }
}

// Rows of 64 bytes in groups of eight, 512 bytes a group, whose 16-byte pieces lie at piece ^ (row / 2 % 4); 32 bytes
// more are the next step of columns.
__device__ __forceinline__ unsigned long long rows_of_64(const uint4* rows) {
  constexpr unsigned long long SWIZZLE_64 = 2ull << 62, GROUP_BYTES = 512ull >> 4;
  return SWIZZLE_64 | GROUP_BYTES << 32 | 1ull << 16 | (shared_address(rows) & 0x3ffff) >> 4;
}

#define QM_W4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define QM_W8(d, i) QM_W4(d, i), QM_W4(d, i + 4)
#define QM_W16(d, i) QM_W8(d, i), QM_W8(d, i + 8)

// sums += a times the transpose of b, a (64, 64) and b (ROWS, 64) of int8 in shared memory as above. With w = warp % 4,
// g = lane / 4 and q = lane % 4 a lane holds sums[4 j + 2 h + e] = (16 w + g + 8 h, 8 j + 2 q + e). All four warps call
// it; sums are there after `wait_for_wide`.
template <int ROWS>
__device__ __forceinline__ void multiply_wide(int (&sums)[ROWS / 2], const uint4* a, const uint4* b) {
  const unsigned long long of_a = rows_of_64(a), of_b = rows_of_64(b);
#pragma unroll
  for (int step = 0; step < 4; step += 2) {
    if constexpr (ROWS == 64) {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1;"
          : QM_W16(sums, 0), QM_W16(sums, 16)
          : "l"(of_a + step), "l"(of_b + step));
    } else if constexpr (ROWS == 80) {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n80k32.s32.s8.s8 {"
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
          "%32, %33, %34, %35, %36, %37, %38, %39}, %40, %41, 1;"
          : QM_W16(sums, 0), QM_W16(sums, 16), QM_W8(sums, 32)
          : "l"(of_a + step), "l"(of_b + step));
    } else {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {"
          "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
          "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, %48, %49, 1;"
          : QM_W16(sums, 0), QM_W16(sums, 16), QM_W16(sums, 32)
          : "l"(of_a + step), "l"(of_b + step));
    }
  }
}

#undef QM_W4
#undef QM_W8
#undef QM_W16
#else
#define QM_WIDE 0
#endif
#endif
