// What the decode kernels are made of; include numerics.cuh, decode_ptx.cuh and decode_weights.cuh first.
#ifndef QM_DECODE_PARTS_CUH
#define QM_DECODE_PARTS_CUH

constexpr int BLOCKS = 128;  // block j owns the channels j, j + 128, j + 256, ...
constexpr int STATES = 16;   // of a channel
constexpr unsigned int ALL_LANES = 0xffffffffu;
// Words a channel in the constants of decode_in: 2 x row scale, 2 x row bias, taps, conv scale, conv bias, u's scale.
constexpr int IN_CONSTANTS = 8;
// Vectors that a thread keeps in registers between the sum of squares and the product.
constexpr int KEPT = 2;

// The token of an item among `tokens` times `each`; one token needs no division.
__device__ __forceinline__ int token_of(int item, int each, int tokens) { return tokens == 1 ? 0 : item / each; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

__device__ __forceinline__ float add_square(float sum, const float4& x) {
  return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}

__device__ __forceinline__ unsigned int quantized_four(const float4& x, float factor, float inv_scale) {
  const float v[4] = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
  unsigned int word = 0u;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    word |= static_cast<unsigned int>(static_cast<unsigned char>(qm_quantize(v[i], inv_scale))) << (8 * i);
  }
  return word;
}

// Which vectors of four of a token a thread takes, found before the wait for the residual.
struct NormShare {
  int token, first, step, vectors;  // no vectors behind the last token
  int warps;                        // of a token
};
__device__ __forceinline__ NormShare norm_share(int tokens, int d_model) {
  const int warps = blockDim.x / WARP / tokens, warp = threadIdx.x / WARP;
  const int token = warp / warps;
  return {token, (warp - token * warps) * WARP + static_cast<int>(threadIdx.x % WARP), warps * WARP,
          token < tokens ? d_model / 4 : 0, warps};
}
struct Kept {
  float4 vectors[KEPT];
};
__device__ __forceinline__ Kept fetch_residual(const float4* row, const NormShare& share) {
  Kept kept;
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int at = share.first + i * share.step;
    if (at < share.vectors) kept.vectors[i] = load_fresh(row + at);
  }
  return kept;
}

// RMSNorm of every token to int8 codes; `partial` holds one float a warp. Needs at least as many warps as tokens.
// `squares` (tokens, 128) are the blocks' shares of the sum of squares, or null where it is taken here.
__device__ __forceinline__ void normalize(const float4* row, const Kept& kept, const float* squares,
                                          const NormShare& share, signed char* codes, float* partial, int tokens,
                                          int d_model, int stride, float eps, float inv_scale) {
  const int lane = threadIdx.x % WARP;
  float sum = 0.0f;
  if (squares != nullptr) {
    if (share.token < tokens) {
      const float4 four = load_fresh(reinterpret_cast<const float4*>(squares) + share.token * (BLOCKS / 4) + lane);
      sum = (four.x + four.y) + (four.z + four.w);
    }
    sum = warp_sum(sum);
  } else {
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
      if (share.first + i * share.step < share.vectors) sum = add_square(sum, kept.vectors[i]);
    }
#pragma unroll 4
    for (int at = share.first + KEPT * share.step; at < share.vectors; at += share.step) {
      sum = add_square(sum, load_fresh(row + at));
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = warp_sum(share.token < tokens && lane < share.warps ? partial[share.token * share.warps + lane] : 0.0f);
  }
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(d_model) + eps);
  unsigned int* words = reinterpret_cast<unsigned int*>(codes + share.token * stride);
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int at = share.first + i * share.step;
    if (at < share.vectors) words[at] = quantized_four(kept.vectors[i], factor, inv_scale);
  }
#pragma unroll 4
  for (int at = share.first + KEPT * share.step; at < share.vectors; at += share.step) {
    words[at] = quantized_four(load_fresh(row + at), factor, inv_scale);
  }
}

// The last inputs of a channel's convolution, still apart, so that nothing waits for them yet.
struct History {
  signed char values[3];
};
__device__ __forceinline__ History fetch_history(const signed char* from, int taps, bool wanted = true) {
  History past;
#pragma unroll
  for (int k = 0; k < 3; k++) past.values[k] = wanted && k < taps - 1 ? load_fresh(from + k) : 0;
  return past;
}
// As the low bytes of a word, the place of the newest (byte 3) empty.
__device__ __forceinline__ unsigned int word_of(const History& past, int taps) {
  unsigned int word = 0u;
#pragma unroll
  for (int k = 0; k < 3; k++) {
    if (k < taps - 1) {
      word |= static_cast<unsigned int>(static_cast<unsigned char>(past.values[k])) << (8 * (4 - taps + k));
    }
  }
  return word;
}
__device__ __forceinline__ void store_history(signed char* to, unsigned int word, int taps) {
#pragma unroll
  for (int k = 0; k < 3; k++) {
    if (k < taps - 1) to[k] = static_cast<signed char>(word >> (8 * (5 - taps + k)));
  }
}

// Adds this block's columns of x_proj to sums (tokens, rows) in global memory. Weight (hk / 4, rows) words of four
// channels and codes (tokens, hk) lie in shared memory.
__device__ __forceinline__ void project(const unsigned int* weight, const signed char* codes, int* sums, int tokens,
                                        int hk, int rows) {
  for (int item = threadIdx.x; item < tokens * rows; item += blockDim.x) {
    const int token = token_of(item, rows, tokens), row = item - token * rows;
    const int* four = reinterpret_cast<const int*>(codes + token * hk);
    int sum = 0;
#pragma unroll 5
    for (int k = 0; k < hk / 4; k++) sum = __dp4a(static_cast<int>(weight[k * rows + row]), four[k], sum);
    atomicAdd(sums + item, sum);
  }
}

// How SiLU's output becomes u: q = quantize(v), and for the scan v itself (true_u) or q's value; a scale a channel.
struct UGrid {
  const float* scale;
  int true_u;
};

// u of channel i from the convolution's sum a. Codes (tokens, hk); u_gate (tokens, 128, 2, hk), u first.
__device__ __forceinline__ void hand_on_u(float a, const UGrid& grid, signed char* codes, float* u_gate, int token,
                                          int i, int hk) {
  const float v = qm_silu(a);
  const signed char code = qm_quantize(v, __frcp_rn(grid.scale[i]));
  codes[token * hk + i] = code;
  u_gate[(token * BLOCKS + blockIdx.x) * 2 * hk + i] = grid.true_u ? v : qm_dequantize(code, grid.scale[i]);
}

// The scale of a token's x from the 128 blocks' largest values, four a lane of one warp; the same in every lane.
__device__ __forceinline__ float scale_of(const float4& four) {
  float largest = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
  }
  return fmaxf(largest, 1e-5f) / 127.0f;
}
__device__ __forceinline__ float token_scale(const float* absmax) {
  return scale_of(load_fresh(reinterpret_cast<const float4*>(absmax) + threadIdx.x % WARP));
}

// The same while the blocks still tell their values, this one's first: what was not told yet is `UNTOLD`, which no
// float >= 0 is.
constexpr unsigned int UNTOLD = 0xffffffffu;
__device__ __forceinline__ float met_scale(float* absmax, float own) {
  if (threadIdx.x % WARP == 0) tell(absmax + blockIdx.x, own);
  return scale_of(wait_for_four(reinterpret_cast<const float4*>(absmax) + threadIdx.x % WARP, UNTOLD));
}

template <int SIZE>
__device__ __forceinline__ void sylvester(float (&v)[SIZE]) {
#pragma unroll
  for (int distance = 1; distance < SIZE; distance *= 2) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
      if ((i & distance) == 0) {
        const float low = v[i], high = v[i + distance];
        v[i] = low + high;
        v[i + distance] = low - high;
      }
    }
  }
}

// S_128 of a vector that lies four neighbours a lane, in place.
__device__ __forceinline__ void sylvester_128(float (&v)[4]) {
  sylvester<4>(v);
#pragma unroll
  for (int distance = 1; distance < WARP; distance *= 2) {
    const float sign = (threadIdx.x & distance) ? -1.0f : 1.0f;
    // The product is exact: a sum or a difference, rounded once.
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = fmaf(v[i], sign, __shfl_xor_sync(ALL_LANES, v[i], distance));
  }
}

// S_128 over the vectors first, first + step, ... below `end` of one token, then the int8 grid: y (hk, 128) to codes
// (hk, 128). A warp a vector; AHEAD of them are read at a time.
template <int AHEAD>
__device__ __forceinline__ void rotate_vectors(const float* y, signed char* codes, int first, int step, int end,
                                               float factor) {
  const int lane = threadIdx.x % WARP;
#pragma unroll 1
  for (int base = first; base < end; base += AHEAD * step) {
    float4 held[AHEAD];
#pragma unroll
    for (int r = 0; r < AHEAD; r++) {
      const int vector = base + r * step;
      if (vector < end) held[r] = load_fresh(reinterpret_cast<const float4*>(y) + vector * (BLOCKS / 4) + lane);
    }
#pragma unroll
    for (int r = 0; r < AHEAD; r++) {
      const int vector = base + r * step;
      if (vector >= end) break;
      float v[4] = {held[r].x, held[r].y, held[r].z, held[r].w};
      sylvester_128(v);
      reinterpret_cast<unsigned int*>(codes)[vector * (BLOCKS / 4) + lane] =
          pack_saturated(__float2int_rn(v[0] * factor), __float2int_rn(v[1] * factor),
                         __float2int_rn(v[2] * factor), __float2int_rn(v[3] * factor));
    }
  }
}

#endif
