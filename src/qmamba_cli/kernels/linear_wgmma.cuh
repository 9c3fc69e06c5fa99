// The machine instructions of linear_wide: Hopper's asynchronous matrix products and copies of whole tiles; include
// barriers.cuh first. All of it needs sm_90a.
#ifndef QM_LINEAR_WGMMA_CUH
#define QM_LINEAR_WGMMA_CUH

// A tile's place in memory, CUtensorMap of the driver.
struct __align__(64) TensorMap {
  unsigned long long words[16];
};

// Copies the tile that begins at this column and row; what lies outside the matrix becomes zero.
__device__ __forceinline__ void copy_tile(unsigned int to, const TensorMap& map, int column, int row,
                                          unsigned int barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the newest PENDING groups of products.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Rows of 128 bytes in groups of eight, 1024 bytes a group, whose 16-byte pieces lie at piece ^ (row % 8).
__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned int address) {
  constexpr unsigned long long kSwizzle128 = 1ull << 62, kGroupBytes = 1024ull >> 4;
  return kSwizzle128 | (kGroupBytes << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

#define QM_R4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define QM_R16(d, i) QM_R4(d, i), QM_R4(d, i + 4), QM_R4(d, i + 8), QM_R4(d, i + 12)
#define QM_R32(d) QM_R16(d, 0), QM_R16(d, 16)
#define QM_R64(d) QM_R32(d), QM_R16(d, 32), QM_R16(d, 48)
#define QM_R80(d) QM_R64(d), QM_R16(d, 64)
#define QM_R96(d) QM_R80(d), QM_R16(d, 80)
#define QM_R128(d) QM_R96(d), QM_R16(d, 96), QM_R16(d, 112)
// Their places in the instruction.
#define QM_P32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QM_P64 \
  QM_P32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QM_P80 \
  QM_P64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define QM_P96 \
  QM_P80 ", " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QM_P128 \
  QM_P96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// acc (64, n) = a (64, 32) times the transpose of b (n, 32), plus acc where `add` is not zero. With w = warp % 4,
// g = lane / 4 and q = lane % 4 a lane holds acc[4 j + 2 h + e] = (16 w + g + 8 h, 8 j + 2 q + e).
#define QM_MULTIPLY(SUMS, N, A, B, ADD)                                                                             \
  __device__ __forceinline__ void multiply(int (&acc)[SUMS], unsigned long long a, unsigned long long b, int add) { \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD                                                       \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k32.s32.s8.s8 {" QM_P##SUMS "}, %" A ", %" B           \
                 ", add;\n}"                                                                                        \
                 : QM_R##SUMS(acc)                                                                                  \
                 : "l"(a), "l"(b), "r"(add));                                                                       \
  }
QM_MULTIPLY(64, "128", "64", "65", "66")
QM_MULTIPLY(80, "160", "80", "81", "82")
QM_MULTIPLY(96, "192", "96", "97", "98")
QM_MULTIPLY(128, "256", "128", "129", "130")

// The same with a lane's own words of a: of rows g and g + 8 in turn, the columns 4 q ..., then 16 + 4 q ...
#define QM_MULTIPLY_OWN(SUMS, N, A0, A1, A2, A3, B, ADD)                                                         \
  __device__ __forceinline__ void multiply_own(int (&acc)[SUMS], const unsigned int (&a)[4], unsigned long long b, \
                                               int add) {                                                        \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD                                                    \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k32.s32.s8.s8 {" QM_P##SUMS "}, {%" A0 ", %" A1     \
                 ", %" A2 ", %" A3 "}, %" B ", add;\n}"                                                          \
                 : QM_R##SUMS(acc)                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                \
  }
QM_MULTIPLY_OWN(32, "64", "32", "33", "34", "35", "36", "37")
QM_MULTIPLY_OWN(64, "128", "64", "65", "66", "67", "68", "69")

#undef QM_R4
#undef QM_R16
#undef QM_R32
#undef QM_R64
#undef QM_R80
#undef QM_R96
#undef QM_R128
#undef QM_P32
#undef QM_P64
#undef QM_P80
#undef QM_P96
#undef QM_P128
#undef QM_MULTIPLY
#undef QM_MULTIPLY_OWN

#endif
