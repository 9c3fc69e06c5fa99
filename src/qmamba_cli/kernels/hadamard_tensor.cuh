// The transform of fp16 rows to int8 on tensor cores; include hadamard.cuh first.
//
//   n = K * 2^M, M 7 or 8; a warp owns a row. Element k * 2^M + s; s has the bits s0 (lowest) to s(M-1).
//
//   stage 1   fp16 products with a matrix of +-1, which are exact, and float32 sums: over k, s0 and the highest bit of
//             s, 4 K terms a sum. The row is the right operand: a lane's words of two halves are its fragments.
//   between   butterflies over the bits that a lane's registers count: s1, s2, and s6 where M = 8
//   stage 2   over s3, s4, s5, which lie across lanes: the sums of stage 1 are the left operand as they are. Each is cut
//             into a part of 11 bits and the rest, of which another 11 count: 2^-22 of a sum is lost, whatever its
//             magnitude, since tf32 has the exponents of float32.
//
// A lane then has 16 neighbours, s0 to s3, for each of its k and upper bits, and stores them at once. Nothing is
// shuffled, and an element costs about 11 instructions instead of 21.
//
//   lane (g, t) = (lane / 4, lane % 4)
//   right operand, stage 1   row of the fragment: k % 4 = t, s0 in a word, the highest bit of s in its two words; column
//                            g = (s5, s4, s3)
//   sums of stage 1          row: g = (k % 4 of the output, highest bit), upper half of the tile: s0; column:
//                            (s5, s4, s3) = 2 t + {0, 1}
//   sums of stage 2          the same rows; column: s3 in the pair, (s5, s4) = t
#ifndef QM_HADAMARD_TENSOR_CUH
#define QM_HADAMARD_TENSOR_CUH

constexpr int TENSOR_WARPS = 4;

__device__ __forceinline__ void multiply_half(float (&d)[4], const uint4& a, unsigned long long b,
                                              const float (&c)[4]) {
  asm("{\n.reg .b32 low, high;\nmov.b64 {low, high}, %8;\n"
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {low, high}, "
      "{%9, %10, %11, %12};\n}"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The sums of stage 1 as the left operand: column 2 t is the fragment's t, column 2 t + 1 its t + 4.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const float (&a)[4], unsigned int b0, unsigned int b1,
                                              const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(qm_to_bits(a[0])), "r"(qm_to_bits(a[2])), "r"(qm_to_bits(a[1])), "r"(qm_to_bits(a[3])), "r"(b0), "r"(b1),
        "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Whether entry (i, j) of H_K is -1.
template <int K, unsigned... ROWS>
__device__ __forceinline__ bool negative(int i, int j) {
  if constexpr (sizeof...(ROWS) == 0) return __popc(i & j) & 1;
  unsigned row = 0;
  int k = 0;
  ((row = i == k++ ? ROWS : row), ...);
  return row >> j & 1u;
}

// A sum to int8 plus what does not matter above the lowest byte. The first fma clamps to [0, 1], which are the ends of
// the grid; the second rounds half to even. Both together err by 1e-5 of a step at most.
__device__ __forceinline__ unsigned int low_byte(float sum, float factor) {
  float share;
  asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(share) : "f"(sum), "f"(factor), "f"(128.0f / 255.0f));
  return qm_to_bits(fmaf(share, 255.0f, QM_MAGIC - 128.0f));
}

__device__ __forceinline__ unsigned int four_bytes(float a, float b, float c, float d, float factor) {
  return __byte_perm(__byte_perm(low_byte(a, factor), low_byte(b, factor), 0x0040),
                     __byte_perm(low_byte(c, factor), low_byte(d, factor), 0x0040), 0x5410);
}

// A thread's share of a row of 16-byte pieces, copied behind its back; before compute capability 9.0.
template <int BYTES>
__device__ __forceinline__ void copy_row(unsigned int stage, const void* from, int thread, int threads) {
  for (int at = thread * 16; at < BYTES; at += threads * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(stage + at),
                 "l"(static_cast<const char*>(from) + at)
                 : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// A warp's next row on its way into shared memory.
struct RowFetch {
  unsigned int stage, barrier;  // shared addresses

  __device__ __forceinline__ void init() const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
      init_barrier(barrier, 1);
      publish_barriers();
    }
    __syncwarp();
#endif
  }

  // All lanes have read the row before.
  template <int BYTES>
  __device__ __forceinline__ void start(const void* from) const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
      arrive_expecting(barrier, BYTES);
      copy_bytes(stage, from, BYTES, barrier);
    }
    __syncwarp();
#else
    copy_row<BYTES>(stage, from, threadIdx.x % 32, 32);
#endif
  }

  __device__ __forceinline__ void wait(unsigned int parity) const {
#if __CUDA_ARCH__ >= 900
    wait_for(barrier, parity);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
#endif
  }
};

// Grid: blocks of four warps that stay; each warp takes rows in turn. Shared memory: (K / 4)^2 * 512 bytes for the
// fragments of the matrix, then a row a warp. factor: steps a unit of the sum.
template <int M, int K, unsigned... ROWS>
__global__ void __launch_bounds__(32 * TENSOR_WARPS, M == 7 ? 4 : 3)
    hadamard_tensor(const F16* __restrict__ x, signed char* __restrict__ out, long long rows, float factor) {
  constexpr int TILES = K / 4, UPPER = 1 << (M - 7), WORDS = 4 * UPPER;
  constexpr int SEGMENT = 2 << M, ORDER = K << M;
  extern __shared__ __align__(16) float shared[];
  __shared__ unsigned long long barriers[TENSOR_WARPS];
  uint4* fragments = reinterpret_cast<uint4*>(shared);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const unsigned int stage =
      static_cast<unsigned int>(__cvta_generic_to_shared(fragments + TILES * TILES * 32)) + warp * 2 * ORDER;
  const RowFetch fetch{stage, static_cast<unsigned int>(__cvta_generic_to_shared(barriers + warp))};
  long long row = static_cast<long long>(blockIdx.x) * TENSOR_WARPS + warp;
  const long long step = static_cast<long long>(gridDim.x) * TENSOR_WARPS;
  fetch.init();
  if (row < rows) fetch.start<2 * ORDER>(x + row * ORDER);
  for (int i = threadIdx.x; i < TILES * TILES * 32; i += 32 * TENSOR_WARPS) {
    const int of = i % 32, column = i / 32 % TILES, tile = i / 32 / TILES;
    const unsigned int both =
        negative<K, ROWS...>(4 * tile + of / 8, 4 * column + of % 4) ? 0xBC00BC00u : 0x3C003C00u;
    const unsigned int highest = of / 4 % 2 ? 0x80008000u : 0u;
    fragments[i] = make_uint4(both, both ^ 0x80000000u, both ^ highest, both ^ 0x80000000u ^ highest);
  }
  __syncthreads();
  // A base for each word of a piece of 16 bytes, apart by what only `rows` tells: were it a constant, four loads would
  // become one, whose words lie where no fragment has them.
  unsigned int words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    words[i] = stage + t * SEGMENT + g * 16 + (4 + static_cast<unsigned int>(rows >> 62)) * i;
  }
  const unsigned int b0 = 0x3F800000u | (__popc(g & 2 * t) & 1u) << 31;
  const unsigned int b1 = 0x3F800000u | (__popc(g & (2 * t + 1)) & 1u) << 31;
  const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const float share = factor / 255.0f;
  unsigned int parity = 0;
#pragma unroll 1
  for (; row < rows; row += step) {
    fetch.wait(parity);
    parity ^= 1;
    unsigned long long b[TILES][WORDS];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
      for (int n = 0; n < WORDS; n++) {
        asm volatile(
            "{\n.reg .b32 low, high;\nld.shared.u32 low, [%1];\nld.shared.u32 high, [%1 + %2];\n"
            "mov.b64 %0, {low, high};\n}"
            : "=l"(b[i][n])
            : "r"(words[n % 4] + i * 4 * SEGMENT + n / 4 * 128), "n"(SEGMENT / 2)
            : "memory");
      }
    }
    __syncwarp();
    if (row + step < rows) fetch.start<2 * ORDER>(x + (row + step) * ORDER);
    signed char* to = out + row * ORDER + (g >> 1 << M) + (g & 1) * (1 << (M - 1)) + t * 16;
#pragma unroll 1
    for (int tile = 0; tile < TILES; tile++, to += 4 << M) {
      float d[WORDS][4];
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        const uint4 a = fragments[(tile * TILES + i) * 32 + lane];
#pragma unroll
        for (int n = 0; n < WORDS; n++) {
          if (i == 0) {
            multiply_half(d[n], a, b[i][n], zero);
          } else {
            multiply_half(d[n], a, b[i][n], d[n]);
          }
        }
      }
#pragma unroll
      for (int distance = 1; distance < WORDS; distance *= 2) {
#pragma unroll
        for (int n = 0; n < WORDS; n++) {
          if (n & distance) continue;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float low = d[n][i], high = d[n + distance][i];
            d[n][i] = low + high;
            d[n + distance][i] = low - high;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < WORDS; n++) {
        float first[4], rest[4], sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          first[i] = qm_from_bits(qm_to_bits(d[n][i]) & 0xFFFFE000u);
          rest[i] = d[n][i] - first[i];
        }
        multiply_tf32(sums, rest, b0, b1, zero);
        multiply_tf32(d[n], first, b0, b1, sums);
      }
#pragma unroll
      for (int upper = 0; upper < UPPER; upper++) {
        unsigned int packed[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          // Words in the order of (s3, s2), bytes in that of (s1, s0).
          const float(&even)[4] = d[4 * upper + i % 2 * 2], (&odd)[4] = d[4 * upper + i % 2 * 2 + 1];
          packed[i] = four_bytes(even[i / 2], even[2 + i / 2], odd[i / 2], odd[2 + i / 2], share);
        }
        *reinterpret_cast<uint4*>(to + upper * 64) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
}

#endif
