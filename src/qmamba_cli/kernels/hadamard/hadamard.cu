// Orthonormal Hadamard transform of the rows of x, then the int8 grid where Out is signed char.
//
//   y[row]   = x[row] @ H_n.T / sqrt(n),   H_n = H_K (x) S_2 (x) ... (x) S_2,   n = K * S,   S = 2^m
//   out      = saturate(round_half_even(y * inv_scale))                          (Out = signed char)
//
// Shapes   x (rows, n) In, out (rows, n) Out, both row-major and 16-byte aligned. In: float, F16.
//          Element k * S + s of a row: k indexes H_K (slowest), s the Sylvester part.
// H_K      its rows are template arguments (bit j of a row: entry j is -1), so the matrix of matrix.py is the only
//          one and a product costs an addition. No rows: S_K. K = 0: order and matrix come at run time, for rare K.
//
// Mapping  a block owns `tile_rows` rows and keeps them in shared memory between three kinds of pass; one read and
//          one write of global memory an element:
//
//            s ->  0 1 | 2 3 | ...                 core pass   a thread owns K x 2 values: two columns s, all k
//          k   0  [t0 ] [t1 ] ...                  middle pass a thread owns 2 x 2^BITS values: s bits 4-7, or 8-9
//          |   1  [t0 ] [t1 ] ...                  low pass    a thread owns 16 neighbours: s bits 0-3, and stores
//          v  ..                                               them as 16-byte words
//
//          Segment k of a row starts at k * segment_stride floats; inside, 4 floats of padding follow every 32 and
//          16 every 256, which leaves every access of the three passes without bank conflicts for S >= 64.
//          `hadamard` reads global memory in its core pass; `hadamard_stream` has the next tile on the way meanwhile.
//          To int8 of the orders of models: hadamard_tensor.cuh (fp16) and hadamard_lanes.cuh (fp32).
// Numerics fp32 sums throughout; the finished sum is multiplied by 1/sqrt(n) once, for int8 by (1/sqrt(n)) * inv_scale
//          and then rounded. The order of the sums depends on n and the output's type alone, so a row's bits do not
//          depend on its neighbours. H_K sums four inputs first (8 sums up to sign), then K / 4
//          of those an output: K / 4 + 3 additions an element instead of K. Compiled with -fmad=false.
// Limits   S >= 2 unless K = 0; m <= 10; shared memory tile_rows * K * segment_stride * 4 bytes; the rows of a block
//          hold a multiple of 16 elements. Orders up to 16 of a power of two: `hadamard_small`, below.
// Source   the order of passes is ours; Sylvester butterflies as in any fast Walsh-Hadamard transform.
#include "numerics.cuh"
#include "half.cuh"
#include "barriers.cuh"
#include "hadamard.cuh"
#include "hadamard_tensor.cuh"
#include "hadamard_lanes.cuh"

// Four warps: more blocks fit than of five, and with K = 20 and S = 256 all of them own two columns of the core.
constexpr int MAX_THREADS = 128;

// Core pass with a matrix given at run time: core_t (order, order) is the transpose of H_K, ±1 in fp32.
template <typename In>
__device__ __forceinline__ void core_pass_any(const In* __restrict__ x, float* tile, int rows, int m,
                                              int segment_stride, int order, const float* __restrict__ core_t) {
  for (int c = threadIdx.x; c < rows << m; c += blockDim.x) {
    const int row = c >> m;
    const int s = c - (row << m);
    const In* source = x + ((row * order) << m) + s;
    float* target = tile + row * order * segment_stride + (m < 5 ? s : place(s));
    for (int i = 0; i < order; i += 4) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int k = 0; k < order; k++) {
        const float value = widen(source[k << m]);
        const float4 sign = *reinterpret_cast<const float4*>(core_t + k * order + i);
        // Products with ±1 are exact, so fused and separate rounding agree.
        sum.x = fmaf(value, sign.x, sum.x);
        sum.y = fmaf(value, sign.y, sum.y);
        sum.z = fmaf(value, sign.z, sum.z);
        sum.w = fmaf(value, sign.w, sum.w);
      }
      target[i * segment_stride] = sum.x;
      target[(i + 1) * segment_stride] = sum.y;
      target[(i + 2) * segment_stride] = sum.z;
      target[(i + 3) * segment_stride] = sum.w;
    }
  }
}

// Grid: ceil(rows / tile_rows) blocks of at most 128 threads.
template <typename In, typename Out, int K, unsigned... ROWS>
__global__ void __launch_bounds__(MAX_THREADS, K < 20 ? 8 : K == 20 ? 5 : 3)
    hadamard(const In* __restrict__ x,           // (rows, n)
             Out* __restrict__ out,              // (rows, n)
             long long rows,
             int tile_rows,                      // rows a block
             int m,                              // log2 of S
             int segment_stride,                 // floats between two segments of S, >= place(S - 1) + 1
             float norm,                         // 1 / sqrt(n)
             float inv_scale,                    // steps a real unit; unused for float outputs
             int order,                          // K where the template has 0
             const float* __restrict__ core_t) { // (order, order), or null where K > 0
  extern __shared__ __align__(16) float tile[];
  const int core_order = K > 0 ? K : order;
  const long long first_row = static_cast<long long>(blockIdx.x) * tile_rows;
  const long long rows_left = rows - first_row;
  const int rows_here = rows_left < tile_rows ? static_cast<int>(rows_left) : tile_rows;
  const long long start = first_row * (static_cast<long long>(core_order) << m);
  if constexpr (K > 0) {
    core_pass<In, K, ROWS...>(x + start, tile, rows_here, m, segment_stride);
  } else {
    core_pass_any(x + start, tile, rows_here, m, segment_stride, order, core_t);
  }
  __syncthreads();
  middle_passes(tile, rows_here * core_order, m, segment_stride);
  const float factor = unit_factor<Out>(norm, inv_scale);
  low_pass<false>(out + start, tile, (rows_here * core_order) << m, m, segment_stride, factor);
}

// Copies a tile into shared memory while the block works on another. From compute capability 9.0 on one thread asks the
// copy engine, and `barrier` counts the bytes; before, every thread copies a share.
struct Fetch {
  unsigned long long* barrier;

  __device__ __forceinline__ void init() const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      init_barrier(shared_address(barrier), 1);
      publish_barriers();
    }
    __syncthreads();
#endif
  }

  // bytes: a multiple of 16, as are both addresses. The block has finished with `to`.
  __device__ __forceinline__ void start(void* to, const void* from, int bytes) const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      arrive_expecting(shared_address(barrier), bytes);
      copy_bytes(shared_address(to), from, bytes, shared_address(barrier));
    }
#else
    for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(static_cast<char*>(to) + at)),
                   "l"(static_cast<const char*>(from) + at)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  // parity: 0 for the first copy, 1 for the second, and so on.
  __device__ __forceinline__ void wait(unsigned int parity) const {
#if __CUDA_ARCH__ >= 900
    wait_for(shared_address(barrier), parity);
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
#endif
  }
};

// The transform of float32 rows with a built-in core and S = 2^M, to int8, for long orders. Blocks stay on their
// multiprocessor: while one finishes a tile, its next tile is on the way into shared memory, so that memory never
// waits for arithmetic. n is a multiple of 4. Grid: as many blocks as are resident, or fewer.
template <int M, int K, unsigned... ROWS>
__global__ void __launch_bounds__(8 * K < 128 ? 128 : 8 * K, K <= 20 ? 5 : 2)
    hadamard_stream(const float* __restrict__ x, signed char* __restrict__ out, long long rows, int tile_rows,
                    int stage_bytes, float norm, float inv_scale) {
  extern __shared__ __align__(16) float shared[];
  __shared__ unsigned long long barrier;
  constexpr int ORDER = K << M;
  constexpr int STRIDE = segment_stride(M);
  const float* stage = shared;
  float* tile = shared + stage_bytes / 4;
  const Fetch fetch{&barrier};
  const long long tiles = (rows + tile_rows - 1) / tile_rows;
  const auto rows_of = [&](long long at) {
    const long long left = rows - at * tile_rows;
    return left < tile_rows ? static_cast<int>(left) : tile_rows;
  };
  const auto ask = [&](long long at) {
    fetch.start(shared, x + at * tile_rows * ORDER, rows_of(at) * ORDER * static_cast<int>(sizeof(float)));
  };
  fetch.init();
  ask(blockIdx.x);
  unsigned int parity = 0;
#pragma unroll 1
  for (long long at = blockIdx.x; at < tiles; at += gridDim.x) {
    const int rows_here = rows_of(at);
    fetch.wait(parity);
    parity ^= 1;
    core_pass<float, K, ROWS...>(stage, tile, rows_here, M, STRIDE);
    __syncthreads();
    if (at + gridDim.x < tiles) ask(at + gridDim.x);
    middle_passes(tile, rows_here * K, M, STRIDE);
    low_pass<true>(out + at * tile_rows * ORDER, tile, rows_here * ORDER, M, STRIDE, norm * inv_scale);
    __syncthreads();
  }
}

// Blocks of 2^bits <= 16 elements, the identity included: a thread owns 16 neighbours and needs no others.
template <typename In, typename Out>
__global__ void __launch_bounds__(MAX_THREADS)
    hadamard_small(const In* __restrict__ x,  // (elements,), 2^bits divides their number
                   Out* __restrict__ out,     // (elements,)
                   long long elements, int bits, float norm, float inv_scale) {
  const long long start = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * CHUNK;
  if (start >= elements) return;
  const int count = elements - start < CHUNK ? static_cast<int>(elements - start) : CHUNK;
  float v[CHUNK];
#pragma unroll
  for (int i = 0; i < CHUNK; i += 2) {
    if (i + 1 < count) {
      const float2 pair = load_pair(x + start + i);
      v[i] = pair.x;
      v[i + 1] = pair.y;
    } else {
      v[i] = i < count ? widen(x[start + i]) : 0.0f;
      v[i + 1] = 0.0f;
    }
  }
  sylvester_low(v, bits);
  store_chunk<false>(out + start, v, count, unit_factor<Out>(norm, inv_scale));
}
