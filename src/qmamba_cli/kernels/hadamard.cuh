// What the Hadamard kernels share: butterflies, the core, and the three passes over a tile in shared memory. Included
// after numerics.cuh and half.cuh; hadamard/hadamard.cu describes mapping and numerics.
#ifndef QM_HADAMARD_CUH
#define QM_HADAMARD_CUH

// Neighbouring values that a thread stores at the end; four Sylvester bits.
constexpr int CHUNK = 16;

// What a finished sum is multiplied with.
template <typename Out>
__device__ __forceinline__ float unit_factor(float norm, float inv_scale) {
  return sizeof(Out) == 1 ? norm * inv_scale : norm;
}

// The final sum as an output value.
template <typename Out>
__device__ __forceinline__ void finish(float sum, float factor, Out& out) { narrow(sum * factor, out); }
__device__ __forceinline__ void finish(float sum, float factor, signed char& out) {
  out = static_cast<signed char>(qm_two_bytes(sum * factor, 0.0f, 0));
}

// Four bytes of output, from 4 / sizeof(Out) values.
template <typename Out>
__device__ __forceinline__ unsigned int word(const float* v, float factor) {
  if constexpr (sizeof(Out) == 4) {
    return qm_to_bits(v[0] * factor);
  } else if constexpr (sizeof(Out) == 2) {
    Out a, b;
    finish(v[0], factor, a);
    finish(v[1], factor, b);
    return static_cast<unsigned int>(a.bits) | static_cast<unsigned int>(b.bits) << 16;
  } else {
    return qm_four_bytes(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
  }
}

// Writes the first `count` (1 to 16) values at a 16-byte boundary; WHOLE: all of them.
template <bool WHOLE, typename Out>
__device__ __forceinline__ void store_chunk(Out* out, const float (&v)[CHUNK], int count, float factor) {
  constexpr int PER_WORD = 4 / sizeof(Out);
  constexpr int PER_VECTOR = 4 * PER_WORD;
  if (WHOLE || count >= CHUNK) {
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
    if (i < count) finish(v[i], factor, out[i]);
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

// S_SIZE v, in place, or S_END of each END neighbours.
template <int SIZE, int DISTANCE = 1, int END = SIZE>
__device__ __forceinline__ void sylvester(float (&v)[SIZE]) {
  if constexpr (DISTANCE < END) {
    butterfly<SIZE, DISTANCE>(v);
    sylvester<SIZE, 2 * DISTANCE, END>(v);
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

// Floats between two segments of 2^m, 7 <= m: neighbours are half of the banks apart.
__device__ __forceinline__ constexpr int segment_stride(int m) {
  return m > 8 ? place(1 << m) : (place(1 << m) - 16 + 31) / 32 * 32 + 16;
}

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

// Low pass: bits 0 to 3, then from shared to global memory. WHOLE: elements is a multiple of 16.
template <bool WHOLE, typename Out>
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
    store_chunk<WHOLE>(out + chunk * CHUNK, v, elements - chunk * CHUNK, factor);
  }
}

#endif
