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

// The codes of a block's channels, (tokens, hk), to their places for batch_x.
__device__ __forceinline__ void hand_on_codes(const signed char* from, signed char* to, int tokens, int hk) {
  const int fours = hk / 4;
  for (int item = threadIdx.x; item < tokens * fours; item += blockDim.x) {
    const int token = item / fours, i = item % fours * 4, channel = static_cast<int>(blockIdx.x) * hk + i;
    const int unit = static_cast<int>(blockIdx.y) * 2 * hk + channel / 64;
    *reinterpret_cast<unsigned int*>(to + (unit * tokens + token) * 64 + place_of_column(channel % 64)) =
        *reinterpret_cast<const unsigned int*>(from + token * hk + i);
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
               signed char* u_codes,        // (groups, 2 hk units, tokens, 64) out
               float* u,                    // (groups, 128 hk, tokens) out
               int true_u, int tokens, int hk) {
  extern __shared__ __align__(16) unsigned char shared[];
  release_dependents();
  const int block = blockIdx.x, group = blockIdx.y, slices = THREADS / tokens;
  Carver carver{shared};
  float* shared_constants = carver.take<float>(IN_CONSTANTS * hk);
  signed char* own_codes = carver.take<signed char>(tokens * hk);
  float* largest = carver.take<float>(THREADS);
  float* scales = carver.take<float>(TAPS * tokens);  // newest last
  copy_block(shared_constants, reinterpret_cast<const char*>(constants) + block * (IN_CONSTANTS * 4 * hk),
             IN_CONSTANTS * 4 * hk);
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
    u[at] = u_of(sum * conv_scale[i] + conv_bias[i], u_scale[i], __frcp_rn(u_scale[i]), true_u, own_codes + own * hk + i);
  }
  __syncthreads();
  hand_on_codes(own_codes, u_codes, tokens, hk);
}

#endif
