// The convolution of many tokens: what both of its kernels share, and the one of a dynamic input; include
// decode_batch_scan.cuh first.
#ifndef QM_DECODE_BATCH_CONV_CUH
#define QM_DECODE_BATCH_CONV_CUH

constexpr int TAPS = 4;

__device__ __forceinline__ float fast_silu(float x) { return divide_approx(x, 1.0f + exp2_approx(-LOG2E * x)); }

// u from the convolution's sum a: the scan's value is returned, the code goes to `code`. `inverse`: of u's scale.
__device__ __forceinline__ float u_of(float a, float scale, float inverse, int true_u, signed char* code) {
  const float v = fast_silu(a);
  *code = qm_quantize(v, inverse);
  return true_u ? v : qm_dequantize(*code, scale);
}

// x_proj's weights of a block's channels, (hk / 4, x_rows) words of four channels, to shared memory in rows of x_pitch.
__device__ __forceinline__ int x_pitch(int x_rows) { return x_rows + 8; }
__device__ __forceinline__ void copy_x_weight(unsigned int* to, const uint4* weight, int x_rows, int hk) {
  const int pieces = x_rows / 4, all = hk / 4 * pieces;
  for (int i = threadIdx.x; i < all; i += blockDim.x) {
    copy16(to + i / pieces * x_pitch(x_rows) + i % pieces * 4, weight + static_cast<int>(blockIdx.x) * all + i);
  }
}

// This block's part of x_proj: the product of those weights and the codes (tokens, hk) of u, both in shared memory, is
// added to one of the copies x_sums (groups, X_COPIES, x_rows, tokens).
__device__ __forceinline__ void add_x(int* x_sums, const signed char* codes, const unsigned int* weight, int tokens,
                                      int hk, int x_rows) {
  constexpr int TILE = 16, STEPS = 2;  // tokens of a product, and the most products of 32 channels
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4, words = hk / 4;
  const int token_tiles = tokens / TILE, row_tiles = (x_rows + 7) / 8;
  const int token = warp % token_tiles * TILE + g;
  x_sums += (static_cast<int>(blockIdx.y) * X_COPIES + static_cast<int>(blockIdx.x) % X_COPIES) * x_rows * tokens;
  const unsigned int* of_token = reinterpret_cast<const unsigned int*>(codes) + token * words;
  unsigned int x[STEPS][4] = {};
#pragma unroll
  for (int i = 0; i < STEPS * 2; i++) {
    const int word = i * 4 + q;
    if (word >= words) break;
    x[i / 2][i % 2 * 2] = of_token[word];
    x[i / 2][i % 2 * 2 + 1] = of_token[8 * words + word];
  }
  for (int n = warp / token_tiles; n < row_tiles; n += blockDim.x / WARP / token_tiles) {
    // Blocks begin at different rows, so that fewer add to the same sum at once.
    const int first_row = (n + static_cast<int>(blockIdx.x)) % row_tiles * 8;
    int sums[4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int word = step * 8 + q;
      if (step * 8 >= words) break;
      const unsigned int* from = weight + word * x_pitch(x_rows) + first_row + g;
      const unsigned int low = word < words ? from[0] : 0u, high = word + 4 < words ? from[4 * x_pitch(x_rows)] : 0u;
      multiply_i8(sums, x[step][0], x[step][1], x[step][2], x[step][3], low, high);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int row = first_row + q * 2 + k % 2;
      if (row < x_rows) atomicAdd(x_sums + row * tokens + token + k / 2 * 8, sums[k]);
    }
  }
}

// Grid: x: 128 blocks, y: groups of tokens.
__global__ void __launch_bounds__(THREADS)
    batch_conv(const float* x,              // (groups, 128 hk, tokens)
               const float* x_absmax,       // (groups, 128, tokens)
               const uint4* constants,      // (128, 8, hk) words, as for decode_in
               unsigned int* history,       // (groups, 128 hk, tokens)
               const float* history_scale,  // (groups, tokens, 4): of the last three inputs, oldest first
               float* newest,               // (groups, tokens) out: the scale of this one
               const uint4* x_weight,       // (128, hk / 4, x_rows) words of four channels
               int* x_sums,                 // (groups, X_COPIES, x_rows, tokens), added to
               float* u,                    // (groups, 128 hk, tokens) out
               int true_u, int tokens, int hk, int x_rows) {
  extern __shared__ __align__(16) unsigned char shared[];
  release_dependents();
  const int block = blockIdx.x, group = blockIdx.y, slices = THREADS / tokens;
  Carver carver{shared};
  float* shared_constants = carver.take<float>(IN_CONSTANTS * hk);
  signed char* own_codes = carver.take<signed char>(tokens * hk);
  float* largest = carver.take<float>(THREADS);
  float* scales = carver.take<float>(TAPS * tokens);  // newest last
  unsigned int* shared_x_weight = carver.take<unsigned int>(hk / 4 * x_pitch(x_rows));
  copy_block(shared_constants, reinterpret_cast<const char*>(constants) + block * (IN_CONSTANTS * 4 * hk),
             IN_CONSTANTS * 4 * hk);
  copy_x_weight(shared_x_weight, x_weight, x_rows, hk);
  commit_copies();
  const int own = threadIdx.x % tokens, slice = threadIdx.x / tokens;
  wait_for_producers();
  float most = 0.0f;
#pragma unroll 16
  for (int j = slice; j < BLOCKS; j += slices) {
    most = fmaxf(most, load_fresh(x_absmax + (group * BLOCKS + j) * tokens + own));
  }
  largest[threadIdx.x] = most;
  __syncthreads();
  if (slice == 0) {
    for (int other = 1; other < slices; other++) most = fmaxf(most, largest[other * tokens + own]);
    const float scale = fmaxf(most, 1e-5f) / 127.0f;
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++) {
      scales[own * TAPS + k] = load_fresh(history_scale + (group * tokens + own) * TAPS + k);
    }
    scales[own * TAPS + TAPS - 1] = scale;
    if (block == 0) newest[group * tokens + own] = scale;
  }
  wait_for_copies();
  __syncthreads();
  const int* conv_taps = reinterpret_cast<const int*>(shared_constants + 4 * hk);
  const float *conv_scale = shared_constants + 5 * hk, *conv_bias = conv_scale + hk;
  const float* u_scale = conv_bias + hk;
  const float* scale = scales + own * TAPS;
  const float inv_scale = 1.0f / scale[TAPS - 1];
#pragma unroll 5
  for (int i = slice; i < hk; i += slices) {
    const int at = ((group * BLOCKS + block) * hk + i) * tokens + own;
    const unsigned int code = static_cast<unsigned char>(qm_quantize(load_fresh(x + at), inv_scale));
    const unsigned int word = load_fresh(history + at) | code << 24;
    history[at] = word >> 8;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < TAPS; k++) {
      const float tap = qm_i8_to_f32(static_cast<unsigned int>(conv_taps[i]) >> (8 * k));
      sum += (qm_i8_to_f32(word >> (8 * k)) * scale[k]) * tap;
    }
    u[at] = u_of(sum * conv_scale[i] + conv_bias[i], u_scale[i], __frcp_rn(u_scale[i]), true_u,
                 own_codes + own * hk + i);
  }
  __syncthreads();
  add_x(x_sums, own_codes, shared_x_weight, tokens, hk, x_rows);
}

#endif
