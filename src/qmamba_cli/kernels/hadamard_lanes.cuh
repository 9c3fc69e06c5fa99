// The transform of float32 rows to int8 of the orders that hadamard_tensor.cuh has for halves; include that first.
//
//   n = K * 2^M, M 7 or 8; one warp owns a row, or two, of which each has all columns and half of the bits s7 that come
//   out. Element k * 2^M + s; s has the bits s0 (lowest) to s(M-1).
//
//   load      a lane has the values of all k at four s, s0 and s6 of which differ; for M = 8 their sum or difference over
//             s7, which both warps of a row read
//   core      over k, in registers
//   stage 1   over s0, s2, s3, s6: the columns of 16 values are the right operand as they are, of a matrix of +-1
//   stage 2   over s1, s4, s5, which are columns of the sums of stage 1, so that these are the left operand as they are
//
// Both stages are sums of tf32 products with +-1, which are exact. Each operand is cut into a part of 11 bits and the
// rest, of which another 11 count: 2^-22 of it is lost, whatever its magnitude. The tensor core reads no lower bits, so
// the first part is the value itself.
//
// A lane then has four neighbours, s0 and s1, of each k, and a warp stores 128 bytes of it. Nothing is shuffled, and
// warps wait for none but the other of their row.
//
//   lane (g, t) = (lane / 4, lane % 4)
//   right operand, stage 1   row of the fragment: t = (s3, s2), s0 in its two words, s6 in its two steps; column
//                            g = (s5, s4, s1)
//   sums of stage 1          row: g = (s6, s3, s2), upper half of the tile: s0; column: (s5, s4, s1) = 2 t + {0, 1}
//   sums of stage 2          the same rows; column: s1 in the pair, (s5, s4) = t
#ifndef QM_HADAMARD_LANES_CUH
#define QM_HADAMARD_LANES_CUH

// Few warps with many registers: their independent sums hide more latency than more warps would.
constexpr int LANES_WARPS = 8;

// d = a * b + c; the fragments of a as they lie in registers.
__device__ __forceinline__ void multiply_signs(float (&d)[4], const float (&a)[4], float b0, float b1,
                                               const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(qm_to_bits(a[0])), "r"(qm_to_bits(a[1])), "r"(qm_to_bits(a[2])), "r"(qm_to_bits(a[3])),
        "r"(qm_to_bits(b0)), "r"(qm_to_bits(b1)), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// What the 11 bits of tf32 leave of a float.
__device__ __forceinline__ float rest_of(float x) { return x - qm_from_bits(qm_to_bits(x) & 0xFFFFE000u); }

// A row on its way into shared memory, for the warps that read it.
template <int PARTS>
struct SharedRow {
  unsigned int stage, barrier;  // shared addresses
  int slot, part;               // of the row in the block, of the warp in the row

  // All threads of the block meet between this and the first copy.
  __device__ __forceinline__ void init() const {
#if __CUDA_ARCH__ >= 900
    if (part == 0 && threadIdx.x % 32 == 0) {
      init_barrier(barrier, 1);
      publish_barriers();
    }
#endif
  }

  // The other warp of the row has come as far, too.
  __device__ __forceinline__ void meet() const {
    if (PARTS == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, 64;" ::"r"(slot + 1) : "memory");
    }
  }

  // This warp has read the row. Only the warp that asks for the next one waits for the other; that one cannot run ahead
  // by more than this row.
  __device__ __forceinline__ void release() const {
#if __CUDA_ARCH__ >= 900
    if (PARTS == 2 && part == 1) {
      asm volatile("bar.arrive %0, 64;" ::"r"(slot + 1) : "memory");
      return;
    }
#endif
    meet();
  }

  template <int BYTES>
  __device__ __forceinline__ void start(const void* from) const {
#if __CUDA_ARCH__ >= 900
    if (part == 0 && threadIdx.x % 32 == 0) {
      arrive_expecting(barrier, BYTES);
      copy_bytes(stage, from, BYTES, barrier);
    }
#else
    copy_row<BYTES>(stage, from, part * 32 + threadIdx.x % 32, PARTS * 32);
#endif
  }

  __device__ __forceinline__ void wait(unsigned int parity) const {
#if __CUDA_ARCH__ >= 900
    wait_for(barrier, parity);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    meet();
#endif
  }
};

// Four columns of a row, all k: `from` is the place of the first, `sign` that of s7 in a difference.
template <int M, int K, unsigned... ROWS>
__device__ __forceinline__ void load_columns(float (&v)[4][K], unsigned int from, float sign) {
#pragma unroll
  for (int s6 = 0; s6 < 2; s6++) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      float values[M - 6][2];
#pragma unroll
      for (int s7 = 0; s7 < M - 6; s7++) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(values[s7][0]), "=f"(values[s7][1])
                     : "r"(from + (k << M) * 4 + s6 * 256 + s7 * 512)
                     : "memory");
      }
#pragma unroll
      for (int s0 = 0; s0 < 2; s0++) {
        v[2 * s6 + s0][k] = M == 7 ? values[0][s0] : fmaf(sign, values[M - 7][s0], values[0][s0]);
      }
    }
    core<K, ROWS...>(v[2 * s6]);
    core<K, ROWS...>(v[2 * s6 + 1]);
  }
}

// Grid: blocks of eight warps that stay and take rows in turn. Shared memory: the rows of a block, then 8 bytes for each.
// factor: steps a unit of the sum.
template <int M, int K, unsigned... ROWS>
__global__ void __launch_bounds__(32 * LANES_WARPS, 1)
    hadamard_lanes(const float* __restrict__ x, signed char* __restrict__ out, long long rows, float factor) {
  constexpr int PARTS = M - 6, SLOTS = LANES_WARPS / PARTS, ORDER = K << M, TOGETHER = 4;
  extern __shared__ __align__(16) float shared[];
  unsigned long long* barriers = reinterpret_cast<unsigned long long*>(shared + SLOTS * ORDER);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int slot = warp / PARTS, part = warp % PARTS;
  const SharedRow<PARTS> staged{shared_address(shared) + slot * 4 * ORDER, shared_address(barriers + slot), slot, part};
  long long row = static_cast<long long>(blockIdx.x) * SLOTS + slot;
  const long long step = static_cast<long long>(gridDim.x) * SLOTS;
  staged.init();
  __syncthreads();
  if (row < rows) staged.template start<4 * ORDER>(x + row * ORDER);
  const unsigned int from = staged.stage + 4 * ((g & 1) * 2 + t * 4 + (g >> 1) * 16);
  const int to = part * 128 + (g >> 2) * 64 + t * 16 + (g & 3) * 4;
  // Stage 1: the signs of two steps. Apart by what only `rows` tells: were some of them one value, it would be copied
  // before each product.
  const float p = __popc(g & t) & 1 ? -1.0f : 1.0f, q = g & 4 ? -p : p;
  float a[2][4] = {{p, p, p, -p}, {q, q, q, -q}};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    a[i / 4][i % 4] = qm_from_bits(qm_to_bits(a[i / 4][i % 4]) + (i + 1) * static_cast<unsigned int>(rows >> 62));
  }
  const unsigned int b0 = 0x3F800000u | (__popc(g & 2 * t) & 1u) << 31;
  const unsigned int b1 = 0x3F800000u | (__popc(g & (2 * t + 1)) & 1u) << 31;
  const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  unsigned int parity = 0;
#pragma unroll 1
  for (; row < rows; row += step) {
    staged.wait(parity);
    parity ^= 1;
    float v[4][K];
    load_columns<M, K, ROWS...>(v, from, part == 0 ? 1.0f : -1.0f);
    staged.release();
    if (row + step < rows) staged.template start<4 * ORDER>(x + (row + step) * ORDER);
    signed char* target = out + row * ORDER + to;
#pragma unroll
    for (int first = 0; first < K; first += TOGETHER) {
      // Small terms first; products of several k in turn, since each waits for the one before.
      float d[TOGETHER][4] = {}, sums[TOGETHER][4];
#pragma unroll
      for (int product = 0; product < 4; product++) {
        const int s6 = product % 2;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
          const float x0 = v[2 * s6][first + i], x1 = v[2 * s6 + 1][first + i];
          if (product < 2) {
            multiply_signs(d[i], a[s6], rest_of(x0), rest_of(x1), d[i]);
          } else {
            multiply_signs(d[i], a[s6], x0, x1, d[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        const float rest[4] = {rest_of(d[i][0]), rest_of(d[i][1]), rest_of(d[i][2]), rest_of(d[i][3])};
        multiply_tf32(sums[i], rest, b0, b1, zero);
      }
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) multiply_tf32(sums[i], d[i], b0, b1, sums[i]);
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) {
        const float neighbours[4] = {sums[i][0], sums[i][2], sums[i][1], sums[i][3]};
        *reinterpret_cast<unsigned int*>(target + ((first + i) << M)) = word<signed char>(neighbours, factor);
      }
    }
  }
}

#endif
