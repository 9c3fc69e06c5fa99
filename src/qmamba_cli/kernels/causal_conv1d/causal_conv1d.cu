// Causal depthwise convolution, then SiLU.
//
//   acc[c,t] = sum_k x[c, t-w+1+k] * weight[c,k]
//   a[c,t]   = acc * s[c] + bias[c]              s = x_scale * weight_scale[c], weight_scale[c] or 1
//   out[c,t] = a / (1 + exp(-a))                 float32, rounded once to x's dtype if that is a half; or divided by
//                                                out_scale or out_scale[c], rounded and saturated to int8
//
// Shapes and layout. x is (b, d, l); one of its last two axes is contiguous, the other has any stride. The output has
// the same axis contiguous and is dense. weight (d, w), bias (d), weight_scale (d), state (b, d, w-1) and the token
// scales (b, l), (b, w-1) are dense. Blocks along z are sequences of the batch.
//
//   time contiguous       block = (pieces of a row) x (rows). A thread owns one piece of 16 steps (int8 to int8) or
//                         4 steps (else), and walks `span` rows (pairs of rows of int8 with one scale):
//                             row c    |piece 0|piece 1|..      each piece also reads the 3 steps before it
//                             row c+1  |piece 0|piece 1|..
//   channels contiguous   block = (quads of channels) x (runs). A thread owns 4 channels, or 8 of aligned int8 to int8,
//                         and walks a run of `span` steps, the window in registers:
//                             t     |quad 0|quad 1|..           one row is one coalesced access
//                             t+1   |quad 0|quad 1|..
//
// Widths 2 to 4 are one code: older taps are 0, so a width below 4 assumes finite x. The thread that owns the last
// step of a channel writes its new state, from a buffer that is never the old one.
//
// Numerics. int8 with one scale: dp4a on the accumulator 1.5 * 2^23 gives the exact sum as a float. Else: float32,
// oldest tap first, one fused rounding a tap. exp is ex2.approx (2 ulp) of -a * log2(e), the reciprocal is
// rcp.approx (1 ulp). int8 with one scale: channels 2k and 2k + 1 share one reciprocal, since the special-function unit
// is what limits; a last channel without a partner has one of zeros. So a value depends on its own window and its
// partner's only: layout, position and the split into calls do not change its bits. An int8 output is that value,
// quantized as everywhere: the float output and a quantization after it give the same int8. All of it is within 1e-5
// of a step of the reference.
//
// Limits: 1e-6 <= out_scale <= 1e4 (the caller rounds in a second pass elsewhere), so that UNIT / out_scale and its
// products stay normal numbers. b <= 65535. Offsets are 64 bits wide.
//
// Source: the reference beside this file. No kernel of another project was used.
#include "numerics.cuh"
#include "half.cuh"
#include "causal_conv1d_silu.cuh"
#include "overlap.cuh"
#include "causal_conv1d.cuh"
#include "causal_conv1d_channels.cuh"

// A piece of one row, as loaded: the 4 steps before it, WORDS * 4 steps, and the channel's numbers.
template <int WORDS>
struct Row {
  u32 words[WORDS + 1];
  u32 taps;
  float scale, bias;

  // Steps 4i to 4i + 3 before SiLU.
  __device__ __forceinline__ void sums(int i, float (&four)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) four[k] = fmaf(window_dot(words[i], words[i + 1], taps, k), scale, bias);
  }
};

template <int WORDS>
__device__ __forceinline__ void load_row(Row<WORDS>& row, const Sequence<i8, false>& x, const i8* weight,
                                         const float* weight_scale, const float* bias, float x_scale, int c, int t,
                                         bool vector) {
  if (c >= x.d) {
    row = {};
    return;
  }
  row.words[0] = load_four<true>(x, c, t - 4, vector).bits;
  bool loaded = false;
  if constexpr (WORDS == 4) {
    loaded = vector && t + 16 <= x.l;
    if (loaded) {
      const uint4 all = *reinterpret_cast<const uint4*>(x.at(c, t));
      row.words[1] = all.x;
      row.words[2] = all.y;
      row.words[3] = all.z;
      row.words[4] = all.w;
    }
  }
  if (!loaded) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) row.words[i + 1] = load_four<false>(x, c, t + 4 * i, vector).bits;
  }
  row.taps = packed_taps(weight, c, x.w);
  row.scale = weight_scale[c] * x_scale;
  row.bias = or_else(bias, c, 0.0f);
}

template <typename Out, int WORDS>
__device__ __forceinline__ void store_row(const Raw<Out> (&four)[WORDS], Out* to, int left, bool vector) {
  if constexpr (WORDS == 4) {
    if (vector && left >= 16) {
      *reinterpret_cast<uint4*>(to) = make_uint4(four[0].bits, four[1].bits, four[2].bits, four[3].bits);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < WORDS; ++i) store_four(four[i], to + 4 * i, left - 4 * i, vector);
}

// int8 with one scale, time contiguous. x: (d, l) a sequence, int8 steps of x_scale. inv_scale: steps of the output a
// real unit, or 1 / out_scale[c]; int8 output only. span: pairs of rows a thread. load_vector, store_vector: all rows
// are aligned to the thread's access.
template <typename Out>
__global__ void __launch_bounds__(THREADS, 8)
    causal_conv1d_static(const i8* __restrict__ x, const i8* __restrict__ weight,
                         const float* __restrict__ weight_scale, const float* __restrict__ bias,
                         const i8* __restrict__ state, Out* __restrict__ out, i8* __restrict__ state_out, int d, int l,
                         int w, i64 batch_stride, i64 stride, int span, int load_vector, int store_vector,
                         float inv_scale, float x_scale, const float* __restrict__ out_scale) {
  constexpr int WORDS = sizeof(Out) == 1 ? 4 : 1;
  const int t = (blockIdx.y * blockDim.x + threadIdx.x) * (4 * WORDS);
  if (t >= l) return;
  const auto seq = sequence<false>(x, batch_stride, stride, state, state_out, d, l, w);
  const int first = blockIdx.x * blockDim.y * span + threadIdx.y;
  for (int k = 0, c = 2 * first; k < span && c < d; ++k, c += 2 * blockDim.y) {
    Row<WORDS> rows[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_row(rows[j], seq, weight, weight_scale, bias, x_scale, c + j, t, load_vector);
    }
    Raw<Out> fours[2][WORDS];
    InvScales<false> inv_scales[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool each = sizeof(Out) == 1 && out_scale != nullptr && c + j < d;
      inv_scales[j].value[0] = (each ? __frcp_rn(out_scale[c + j]) : inv_scale) * UNIT;
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      float v[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) rows[j].sums(i, v[j]);
#pragma unroll
      for (int at = 0; at < 4; ++at) silu_pair(v[0][at], v[1][at]);
#pragma unroll
      for (int j = 0; j < 2; ++j) finish(v[j], inv_scales[j], fours[j][i]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (c + j >= d) break;
      store_row(fours[j], out + (static_cast<i64>(blockIdx.z) * d + c + j) * l + t, l - t, store_vector);
      if (t + 4 * WORDS >= l) seq.store_state(c + j);
    }
  }
}

// Steps t to end of a thread's channels. whole: all of them exist and are aligned in x and out, and the ring brings
// all groups of steps.
template <bool BOTH, typename Out, int QUADS, bool EACH>
__device__ __forceinline__ void walk_static(const Sequence<i8, true>& x, Channels<QUADS, EACH>& own, Ring<QUADS>& ring,
                                            Out* out, i8* codes, int c, int t, int end, bool whole) {
  Out* to = out + static_cast<i64>(t) * x.d + c;
  if (BOTH) codes += static_cast<i64>(t) * x.d + c;
  Raw<Out> fours[QUADS];
  Raw<i8> also[QUADS];
  if (whole) {
    const u32 out_stride = x.d * sizeof(Out);
#pragma unroll 1
    for (; t + GROUP <= end; t += GROUP) {
      Step<QUADS> rows[GROUP];
      ring.take(rows);
#pragma unroll
      for (u32 k = 0; k < GROUP; ++k) {
#pragma unroll
        for (int i = 0; i < QUADS; ++i) own.windows[i].push(rows[k].word[i]);
        own.template output<BOTH>(fours, also);
        store_step(fours, rows_ahead(to, out_stride, k));
        if (BOTH) store_step(also, rows_ahead(codes, x.d, k));
      }
      to = rows_ahead(to, out_stride, GROUP);
      if (BOTH) codes = rows_ahead(codes, x.d, GROUP);
    }
  }
#pragma unroll 1
  for (; t < end; ++t, to += x.d) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) own.windows[i].push(load_four<false>(x, c + 4 * i, t, whole).bits);
    own.template output<BOTH>(fours, also);
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      store_four(fours[i], to + 4 * i, x.d - c - 4 * i, whole);
      if (BOTH) store_four(also[i], codes + 4 * i, x.d - c - 4 * i, whole);
    }
    if (BOTH) codes += x.d;
  }
}

// The same, channels contiguous. x: (l, d) a sequence. span: steps a thread, a multiple of 4. load_vector,
// store_vector: rows are aligned to 4 * QUADS elements, and less than 2^32 bytes apart. BOTH: the float output, and its
// int8 in `codes`.
template <typename Out, int QUADS, bool EACH, bool BOTH = false>
__global__ void __launch_bounds__(THREADS, QUADS == 1 ? 8 : 5)
    causal_conv1d_static_channels(const i8* __restrict__ x, const i8* __restrict__ weight,
                                  const float* __restrict__ weight_scale, const float* __restrict__ bias,
                                  const i8* __restrict__ state, Out* __restrict__ out, i8* __restrict__ state_out,
                                  int d, int l, int w, i64 batch_stride, i64 stride, int span, int load_vector,
                                  int store_vector, float inv_scale, float x_scale,
                                  const float* __restrict__ out_scale, i8* __restrict__ codes) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * (4 * QUADS);
  const i64 start = (static_cast<i64>(blockIdx.y) * blockDim.y + threadIdx.y) * span;
  if (c >= d || start >= l) return;
  const int t = static_cast<int>(start), end = min(start + span, static_cast<i64>(l));
  const auto seq = sequence<true>(x, batch_stride, stride, state, state_out, d, l, w);
  const bool whole = load_vector && store_vector && c + 4 * QUADS <= d;
  const i64 batch = static_cast<i64>(blockIdx.z) * l * d;
  __shared__ u32 staged[Ring<QUADS>::SLOTS * Ring<QUADS>::GROUP_BYTES / 4];
  Ring<QUADS> ring(staged, seq.at(c, t), static_cast<u32>(stride), whole ? (end - t) / GROUP : 0);
  ring.fill();
  Channels<QUADS, EACH> own = {};
  const bool aligned = w == 4 && bias != nullptr && aligned_to_four(weight) && aligned_to_four(weight_scale) &&
                       aligned_to_four(bias) && aligned_to_four(out_scale);
  own.load(seq, {weight, weight_scale, bias, out_scale, x_scale, inv_scale, aligned}, c, t, whole);
  walk_static<BOTH>(seq, own, ring, out + batch, codes + batch, c, t, end, whole);
  if (end != l) return;
#pragma unroll
  for (int i = 0; i < QUADS; ++i) own.windows[i].store_state(seq, c + 4 * i);
}

// Floats (no scales) or int8 with one scale a token, time contiguous. weight_scale, scales, scale_state and scales_out
// are null for floats.
template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 8)
    causal_conv1d_real(const In* __restrict__ x, const typename Taps<In>::type* __restrict__ weight,
                       const float* __restrict__ weight_scale, const float* __restrict__ bias,
                       const In* __restrict__ state, Out* __restrict__ out, In* __restrict__ state_out, int d, int l,
                       int w, i64 batch_stride, i64 stride, int span, int load_vector, int store_vector, float,
                       const float* __restrict__ scales, const float* __restrict__ scale_state,
                       float* __restrict__ scales_out) {
  const int t = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
  const int first = blockIdx.x * blockDim.y * span + threadIdx.y;
  if (t >= l || first >= d) return;
  const auto seq = sequence<false>(x, batch_stride, stride, state, state_out, d, l, w);
  const TokenScales tokens = token_scales(scales, scale_state, l, w);
  float token[HISTORY + 4];
#pragma unroll
  for (int i = 0; i < HISTORY + 4; ++i) token[i] = tokens.at(t - HISTORY + i);
  for (int k = 0, c = first; k < span && c < d; ++k, c += blockDim.y) {
    const Raw<In> before = load_four<true>(seq, c, t - 4, load_vector);
    const Raw<In> now = load_four<false>(seq, c, t, load_vector);
    float window[HISTORY + 4], taps[4], sum[4], scale[4], biases[4];
#pragma unroll
    for (int i = 0; i < HISTORY + 4; ++i) window[i] = (i < HISTORY ? before[i + 1] : now[i - HISTORY]) * token[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) taps[i] = tap(weight, c, w, i);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] = window[i] * taps[0];
      sum[i] = fmaf(window[i + 1], taps[1], sum[i]);
      sum[i] = fmaf(window[i + 2], taps[2], sum[i]);
      sum[i] = fmaf(window[i + 3], taps[3], sum[i]);
      scale[i] = or_else(weight_scale, c, 1.0f);
      biases[i] = or_else(bias, c, 0.0f);
    }
    Raw<Out> four;
    finish_real(sum, scale, biases, four);
    store_four(four, out + (static_cast<i64>(blockIdx.z) * d + c) * l + t, l - t, store_vector);
    if (t + 4 >= l) seq.store_state(c);
  }
  if (first == 0 && t + 4 >= l) store_scales(tokens, scales_out);
}

// Four channels whose inputs are floats, or become floats by the scale of their token.
template <typename In>
struct RealChannels {
  float window[4][4], taps[4][4];  // [step or tap, oldest first][channel]
  Quad quad;

  // Step k of four overwrites the oldest step, which is at k: after four steps they are in order again.
  __device__ __forceinline__ void push(int k, const Raw<In>& row, float token) {
#pragma unroll
    for (int j = 0; j < 4; ++j) window[k][j] = sizeof(In) == 1 ? row[j] * token : row[j];
  }

  template <typename Out>
  __device__ __forceinline__ Raw<Out> output(int k) const {
    float sum[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] = window[(k + 1) % 4][j] * taps[0][j];
      sum[j] = fmaf(window[(k + 2) % 4][j], taps[1][j], sum[j]);
      sum[j] = fmaf(window[(k + 3) % 4][j], taps[2][j], sum[j]);
      sum[j] = fmaf(window[k][j], taps[3][j], sum[j]);
    }
    Raw<Out> out;
    finish_real(sum, quad.scale, quad.bias, out);
    return out;
  }

  // One step, the others moved up.
  template <typename Out>
  __device__ __forceinline__ Raw<Out> shift(const Raw<In>& row, float token) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) window[i][j] = window[i + 1][j];
    }
    push(3, row, token);
    return output<Out>(3);
  }
};

// The same, channels contiguous. span is a multiple of 4. BOTH: the float output, and its int8 in `codes`.
template <typename In, typename Out, bool EACH = false, bool BOTH = false>
__global__ void __launch_bounds__(THREADS, 4)
    causal_conv1d_real_channels(const In* __restrict__ x, const typename Taps<In>::type* __restrict__ weight,
                                const float* __restrict__ weight_scale, const float* __restrict__ bias,
                                const In* __restrict__ state, Out* __restrict__ out, In* __restrict__ state_out, int d,
                                int l, int w, i64 batch_stride, i64 stride, int span, int load_vector,
                                int store_vector, float inv_scale, const float* __restrict__ scales,
                                const float* __restrict__ scale_state, float* __restrict__ scales_out,
                                const float* __restrict__ out_scale, i8* __restrict__ codes) {
  release_dependents();
  wait_for_producers();
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  const i64 start = (static_cast<i64>(blockIdx.y) * blockDim.y + threadIdx.y) * span;
  if (c >= d || start >= l) return;
  int t = static_cast<int>(start);
  const int end = min(start + span, static_cast<i64>(l));
  const auto seq = sequence<true>(x, batch_stride, stride, state, state_out, d, l, w);
  const TokenScales tokens = token_scales(scales, scale_state, l, w);
  const bool whole = load_vector && store_vector && c + 4 <= d;
  InvScales<EACH> inv_scales = {};
  if (BOTH) inv_scales.set(EACH ? four_or_else(out_scale, c, d, 1.0f) : Raw<float>{}, inv_scale, 1.0f);
  RealChannels<In> own = {};
  own.quad.load(weight_scale, bias, 1.0f, c, d);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own.taps[i][j] = tap(weight, min(c + j, d - 1), w, i);
  }
  Raw<In> past[HISTORY];
#pragma unroll
  for (int i = 0; i < HISTORY; ++i) past[i] = load_four<true>(seq, c, t - HISTORY + i, load_vector);
#pragma unroll
  for (int i = 0; i < HISTORY; ++i) own.push(i + 1, past[i], tokens.at(t - HISTORY + i));

  const i64 first = (static_cast<i64>(blockIdx.z) * l + t) * d + c;
  Out* to = out + first;
  if (BOTH) codes += first;
  if (whole && t + GROUP <= end) {
    const u32 stride_bytes = static_cast<u32>(stride * sizeof(In)), out_stride = d * sizeof(Out);
    const In* from = seq.at(c, t);
    Raw<In> rows[GROUP];
#pragma unroll
    for (u32 k = 0; k < GROUP; ++k) rows[k].load(rows_ahead(from, stride_bytes, k));
#pragma unroll 1
    for (; t + GROUP <= end; t += GROUP) {
      const bool more = t + 2 * GROUP <= end;
      from = rows_ahead(from, stride_bytes, GROUP);
#pragma unroll
      for (u32 k = 0; k < GROUP; ++k) {
        own.push(k, rows[k], sizeof(In) == 1 ? tokens.scale[t + k] : 1.0f);
        if (more) rows[k].load(rows_ahead(from, stride_bytes, k));
        const Raw<Out> four = own.template output<Out>(k);
        four.store(rows_ahead(to, out_stride, k));
        if constexpr (BOTH) codes_of(four, inv_scales).store(rows_ahead(codes, d, k));
      }
      to = rows_ahead(to, out_stride, GROUP);
      if (BOTH) codes = rows_ahead(codes, d, GROUP);
    }
  }
#pragma unroll 1
  for (; t < end; ++t, to += d) {
    const Raw<In> row = load_four<false>(seq, c, t, load_vector);
    const Raw<Out> four = own.template shift<Out>(row, tokens.at(t));
    store_four(four, to, d - c, whole);
    if constexpr (BOTH) {
      store_four(codes_of(four, inv_scales), codes, d - c, whole);
      codes += d;
    }
  }
  if (end != l) return;
  Raw<In> last[HISTORY];
#pragma unroll
  for (int i = 0; i < HISTORY; ++i) last[i] = load_four<true>(seq, c, l - HISTORY + i, load_vector);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const In held[HISTORY] = {last[0].element(j), last[1].element(j), last[2].element(j)};
    seq.store_state(c + j, held);
  }
  if (c == 0) store_scales(tokens, scales_out);
}
