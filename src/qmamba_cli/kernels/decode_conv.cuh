// The convolution of a dynamic conv input; include decode_parts.cuh first.
#ifndef QM_DECODE_CONV_CUH
#define QM_DECODE_CONV_CUH

// Where a dynamic input is convolved: the history and constants of the block's channels, in decode_parts.cuh's order.
struct DynamicConv {
  const float* scales;  // (tokens, 4) of each token's taps, newest last
  const int* taps;      // (hk,) packed
  const float *scale, *bias;  // (hk,)
  int count;            // of taps
};

// The scales of a token's taps, by one warp: `newest` and those of its history.
__device__ __forceinline__ void store_scales(float* scales, float newest, float older, int taps) {
  const int lane = threadIdx.x % WARP;
  if (lane == 3) scales[3] = newest;
  if (lane < taps - 1) scales[4 - taps + lane] = older;
}

// SiLU's argument of channel i from its newest input; moves the history on.
__device__ __forceinline__ float convolved(const DynamicConv& conv, const History& past, signed char* history,
                                           float value, int token, int i) {
  const float* scale = conv.scales + token * 4;
  const unsigned int code = static_cast<unsigned char>(qm_quantize(value, 1.0f / scale[3]));
  const unsigned int word = word_of(past, conv.count) | code << 24;
  store_history(history, word, conv.count);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    if (k >= 4 - conv.count) {
      const float tap = qm_i8_to_f32(static_cast<unsigned int>(conv.taps[i]) >> (8 * k));
      sum += (qm_i8_to_f32(word >> (8 * k)) * scale[k]) * tap;
    }
  }
  return sum * conv.scale[i] + conv.bias[i];
}

// Grid: 128 blocks of 256 threads.
__global__ void __launch_bounds__(256)
    decode_conv(const float* x,              // (tokens, 128, hk)
                const float* x_absmax,       // (tokens, 128)
                const uint4* constants,      // (128, 8, hk) words, as for decode_in
                const uint4* x_weight,       // (128, hk / 4, x_rows) words
                signed char* history,        // (tokens, d_inner, taps - 1)
                const float* history_scale,  // (tokens, taps - 1)
                float* u_gate,               // (tokens, 128, 2, hk), u out
                int* x_sums,                 // (copies, tokens, x_rows), added to
                const int* before, int* mine,  // counters
                int true_u, int tokens, int hk, int taps, int x_rows, int copies,
                int full, int late) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Turn turn{before, full, mine, late};
  STAMP(1, 0)
  announce(turn);
  Carver carver{shared};
  unsigned int* shared_x_weight = carver.take<unsigned int>(hk / 4 * x_rows);
  float* shared_constants = carver.take<float>(IN_CONSTANTS * hk);
  signed char* u_codes = carver.take<signed char>(tokens * hk);
  float* scales = carver.take<float>(4 * tokens);  // of each token's taps, newest last
  copy_block(shared_x_weight, reinterpret_cast<const char*>(x_weight) + blockIdx.x * (hk * x_rows), hk * x_rows);
  copy_block(shared_constants, reinterpret_cast<const char*>(constants) + blockIdx.x * (IN_CONSTANTS * 4 * hk),
             IN_CONSTANTS * 4 * hk);
  commit_copies();
  auto history_of = [&](int token, int i) {
    return history + (static_cast<long long>(token) * hk * BLOCKS + blockIdx.x + BLOCKS * i) * (taps - 1);
  };
  const int own_token = threadIdx.x / hk, own_i = threadIdx.x - own_token * hk;
  const bool owns = own_token < tokens;

  await_turn(turn);
  STAMP(1, 1)
  float value = owns ? load_fresh(x + (own_token * BLOCKS + blockIdx.x) * hk + own_i) : 0.0f;
  History past = fetch_history(history_of(own_token, own_i), taps, owns);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int token = warp; token < tokens; token += blockDim.x / WARP) {
    const float older = lane < taps - 1 ? load_fresh(history_scale + token * (taps - 1) + lane) : 0.0f;
    store_scales(scales + token * 4, token_scale(x_absmax + token * BLOCKS), older, taps);
  }
  wait_for_copies();
  __syncthreads();
  const DynamicConv conv{scales, reinterpret_cast<const int*>(shared_constants + 4 * hk), shared_constants + 5 * hk,
                         shared_constants + 6 * hk, taps};
  const UGrid grid{shared_constants + 7 * hk, true_u};
  for (int item = threadIdx.x; item < tokens * hk; item += blockDim.x) {
    const int token = token_of(item, hk, tokens), i = item - token * hk;
    signed char* at = history_of(token, i);
    if (item != static_cast<int>(threadIdx.x)) {
      value = load_fresh(x + (token * BLOCKS + blockIdx.x) * hk + i);
      past = fetch_history(at, taps);
    }
    hand_on_u(convolved(conv, past, at, value, token, i), grid, u_codes, u_gate, token, i, hk);
  }
  __syncthreads();
  int* copy = x_sums + static_cast<int>(blockIdx.x) % copies * (tokens * x_rows);
  project(shared_x_weight, u_codes, copy, tokens, hk, x_rows);
  STAMP(1, 2)
  hand_on(turn);
  STAMP(1, 3)
  end_turn(turn);
}

#endif
