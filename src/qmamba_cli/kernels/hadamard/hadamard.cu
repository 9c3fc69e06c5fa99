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
// Numerics fp32 sums throughout; the finished sum is multiplied by 1/sqrt(n) once, for int8 by (1/sqrt(n)) * inv_scale
//          and rounded in that one fma, whose addend is 1.5 * 2^23. The order of the sums depends on n alone, so
//          a row's bits do not depend on its neighbours. H_K sums four inputs first (8 sums up to sign), then K / 4
//          of those an output: K / 4 + 3 additions an element instead of K. Compiled with -fmad=false.
// Limits   S >= 2 unless K = 0; m <= 10; shared memory tile_rows * K * segment_stride * 4 bytes; the rows of a block
//          hold a multiple of 16 elements. Orders up to 16 of a power of two: `hadamard_small`, below.
// Source   the order of passes is ours; Sylvester butterflies as in any fast Walsh-Hadamard transform.
#include "numerics.cuh"

// Four warps: more blocks fit than of five, and with K = 20 and S = 256 all of them own two columns of the core.
constexpr int MAX_THREADS = 128;
// Neighbouring values that a thread stores at the end; four Sylvester bits.
constexpr int CHUNK = 16;

struct F16 {
  unsigned short bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// What a finished sum is multiplied with.
template <typename Out>
__device__ __forceinline__ float unit_factor(float norm, float inv_scale) {
  return sizeof(Out) == 1 ? norm * inv_scale : norm;
}

// sum * factor on the int8 grid, in the lowest byte: the fma rounds it half to even, once. NaN becomes 127.
__device__ __forceinline__ unsigned int quantized(float sum, float factor) {
  return qm_to_bits(fmaxf(fminf(fmaf(sum, factor, QM_MAGIC), QM_MAGIC + 127.0f), QM_MAGIC - 128.0f));
}

// The final sum as an output value.
__device__ __forceinline__ void narrow(float sum, float factor, float& out) { out = sum * factor; }
__device__ __forceinline__ void narrow(float sum, float factor, F16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(sum * factor));
}
__device__ __forceinline__ void narrow(float sum, float factor, signed char& out) {
  out = static_cast<signed char>(quantized(sum, factor));
}

// Four bytes of output, from 4 / sizeof(Out) values.
template <typename Out>
__device__ __forceinline__ unsigned int word(const float* v, float factor) {
  if constexpr (sizeof(Out) == 4) {
    return qm_to_bits(v[0] * factor);
  } else if constexpr (sizeof(Out) == 2) {
    Out a, b;
    narrow(v[0], factor, a);
    narrow(v[1], factor, b);
    return static_cast<unsigned int>(a.bits) | static_cast<unsigned int>(b.bits) << 16;
  } else {
    return __byte_perm(__byte_perm(quantized(v[0], factor), quantized(v[1], factor), 0x0040),
                       __byte_perm(quantized(v[2], factor), quantized(v[3], factor), 0x0040), 0x5410);
  }
}

// Writes the first `count` (1 to 16) values at a 16-byte boundary.
template <typename Out>
__device__ __forceinline__ void store_chunk(Out* out, const float (&v)[CHUNK], int count, float factor) {
  constexpr int PER_WORD = 4 / sizeof(Out);
  constexpr int PER_VECTOR = 4 * PER_WORD;
  if (count >= CHUNK) {
#pragma unroll
    for (int i = 0; i < CHUNK; i += PER_VECTOR) {
      uint4 vector;
      vector.x = word<Out>(v + i, factor);
      vector.y = word<Out>(v + i + PER_WORD, factor);
      vector.z = word<Out>(v + i + 2 * PER_WORD, factor);
      vector.w = word<Out>(v + i + 3 * PER_WORD, factor);
      *reinterpret_cast<uint4*>(out + i) = vector;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    if (i < count) narrow(v[i], factor, out[i]);
  }
}

// One butterfly level of distance DISTANCE over SIZE values.
template <int SIZE, int DISTANCE>
__device__ __forceinline__ void butterfly(float (&v)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; i++) {
    if ((i & DISTANCE) == 0) {
      const float low = v[i], high = v[i + DISTANCE];
      v[i] = low + high;
      v[i + DISTANCE] = low - high;
    }
  }
}

// S_SIZE v, in place.
template <int SIZE, int DISTANCE = 1>
__device__ __forceinline__ void sylvester(float (&v)[SIZE]) {
  if constexpr (DISTANCE < SIZE) {
    butterfly<SIZE, DISTANCE>(v);
    sylvester<SIZE, 2 * DISTANCE>(v);
  }
}

// The lowest `bits` (0 to 4) bits of the index of 16 values.
__device__ __forceinline__ void sylvester_low(float (&v)[CHUNK], int bits) {
  if (bits > 0) butterfly<CHUNK, 1>(v);
  if (bits > 1) butterfly<CHUNK, 2>(v);
  if (bits > 2) butterfly<CHUNK, 4>(v);
  if (bits > 3) butterfly<CHUNK, 8>(v);
}

// H_K v, in place. Four inputs have eight sums up to sign; every output takes one of them.
template <int K, unsigned... ROWS>
__device__ __forceinline__ void core(float (&v)[K]) {
  if constexpr (sizeof...(ROWS) == 0) {
    sylvester<K>(v);
  } else {
    static_assert(sizeof...(ROWS) == K && K % 4 == 0 && K <= 32, "one row an output, a bit an input");
    constexpr unsigned rows[K] = {ROWS...};
    float out[K];
#pragma unroll
    for (int j = 0; j < K; j += 4) {
      const float ab = v[j] + v[j + 1], a_b = v[j] - v[j + 1];
      const float cd = v[j + 2] + v[j + 3], c_d = v[j + 2] - v[j + 3];
      // Index: bit 0 the sign of b, bit 1 of c, bit 2 of d; a is positive.
      const float sums[8] = {ab + cd, a_b + cd, ab - c_d, a_b - c_d, ab + c_d, a_b + c_d, ab - cd, a_b - cd};
#pragma unroll
      for (int i = 0; i < K; i++) {
        const unsigned signs = (rows[i] >> j) & 15u;
        const bool negative = signs & 1u;
        const float sum = sums[(negative ? signs ^ 15u : signs) >> 1];
        if (j == 0) {
          out[i] = negative ? -sum : sum;
        } else {
          out[i] = negative ? out[i] - sum : out[i] + sum;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < K; i++) v[i] = out[i];
  }
}

// Place of element s of a segment, in floats. For bits that do not overlap: place(a + b) = place(a) + place(b).
__device__ __forceinline__ constexpr int place(int s) { return s + 4 * (s >> 5) + 16 * (s >> 8); }

// Two neighbours at an even index.
template <typename In>
__device__ __forceinline__ float2 load_pair(const In* x) {
  struct alignas(2 * sizeof(In)) Pair {
    In first, second;
  };
  const Pair pair = *reinterpret_cast<const Pair*>(x);
  return make_float2(widen(pair.first), widen(pair.second));
}

// Core pass: H_K over k, from global to shared memory.
template <typename In, int K, unsigned... ROWS>
__device__ __forceinline__ void core_pass(const In* __restrict__ x, float* tile, int rows, int m, int segment_stride) {
  const int pairs_log = m - 1;
  for (int c = threadIdx.x; c < rows << pairs_log; c += blockDim.x) {
    const int row = c >> pairs_log;
    const int s = (c - (row << pairs_log)) * 2;
    const In* source = x + ((row * K) << m) + s;
    float* target = tile + row * K * segment_stride + (m < 5 ? s : place(s));
    float first[K], second[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
      const float2 pair = load_pair(source + (k << m));
      first[k] = pair.x;
      second[k] = pair.y;
    }
    core<K, ROWS...>(first);
    core<K, ROWS...>(second);
#pragma unroll
    for (int k = 0; k < K; k++) {
      *reinterpret_cast<float2*>(target + k * segment_stride) = make_float2(first[k], second[k]);
    }
  }
}

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

// Middle pass: BITS Sylvester bits from bit FROM (4 or 8) up, in shared memory.
template <int FROM, int BITS>
__device__ __forceinline__ void middle_pass(float* tile, int segments, int m, int segment_stride) {
  constexpr int SIZE = 1 << BITS;
  const int other_log = m - 4 - BITS;
  for (int task = threadIdx.x; task < segments << (other_log + 3); task += blockDim.x) {
    const int rest = task >> 3;
    const int segment = rest >> other_log;
    const int other = rest - (segment << other_log);
    const int s = (task & 7) * 2 + (other << (FROM == 4 ? 8 : 4));
    float* base = tile + segment * segment_stride + place(s);
    float first[SIZE], second[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
      const float2 pair = *reinterpret_cast<const float2*>(base + place(i << FROM));
      first[i] = pair.x;
      second[i] = pair.y;
    }
    sylvester<SIZE>(first);
    sylvester<SIZE>(second);
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
      *reinterpret_cast<float2*>(base + place(i << FROM)) = make_float2(first[i], second[i]);
    }
  }
  __syncthreads();
}

// All Sylvester bits from 4 up.
__device__ __forceinline__ void middle_passes(float* tile, int segments, int m, int segment_stride) {
  switch (m) {
    case 5: middle_pass<4, 1>(tile, segments, m, segment_stride); break;
    case 6: middle_pass<4, 2>(tile, segments, m, segment_stride); break;
    case 7: middle_pass<4, 3>(tile, segments, m, segment_stride); break;
    case 8:
    case 9:
    case 10: middle_pass<4, 4>(tile, segments, m, segment_stride); break;
    default: break;
  }
  if (m == 9) middle_pass<8, 1>(tile, segments, m, segment_stride);
  if (m == 10) middle_pass<8, 2>(tile, segments, m, segment_stride);
}

// Low pass: bits 0 to 3, then from shared to global memory.
template <typename Out>
__device__ __forceinline__ void low_pass(Out* __restrict__ out, const float* tile, int elements, int m,
                                         int segment_stride, float factor) {
  for (int chunk = threadIdx.x; chunk * CHUNK < elements; chunk += blockDim.x) {
    int at = chunk * CHUNK;
    if (m > 3) {
      const int segment = chunk >> (m - 4);
      const int s = (chunk - (segment << (m - 4))) * CHUNK;
      at = segment * segment_stride + place(s);
    }
    float v[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(tile + at + i);
      v[i] = four.x;
      v[i + 1] = four.y;
      v[i + 2] = four.z;
      v[i + 3] = four.w;
    }
    sylvester_low(v, m < 4 ? m : 4);
    store_chunk(out + chunk * CHUNK, v, elements - chunk * CHUNK, factor);
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
  low_pass(out + start, tile, (rows_here * core_order) << m, m, segment_stride, unit_factor<Out>(norm, inv_scale));
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
  store_chunk(out + start, v, count, unit_factor<Out>(norm, inv_scale));
}
