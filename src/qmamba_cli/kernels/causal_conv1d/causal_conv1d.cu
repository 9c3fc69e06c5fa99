// Causal depthwise convolution, then SiLU.
//
//   acc[c,t] = sum_k x[c, t-w+1+k] * weight[c,k]
//   a[c,t]   = acc * s[c] + bias[c]              s = x_scale * weight_scale[c], weight_scale[c] or 1
//   out[c,t] = a / (1 + exp(-a))                 float32, or that divided by out_scale, rounded and saturated to int8
//
// Shapes and layout. x is (b, d, l); one of its last two axes is contiguous, the other has any stride. The output has
// the same axis contiguous and is dense. weight (d, w), bias (d), weight_scale (d), state (b, d, w-1) and the token
// scales (b, l), (b, w-1) are dense. Blocks along z are sequences of the batch.
//
//   time contiguous       block = (pieces of a row) x (rows). A thread owns one piece of 16 steps (int8 to int8) or
//                         4 steps (else), and walks `span` rows, the next row's loads in flight:
//                             row c    |piece 0|piece 1|..      each piece also reads the 3 steps before it
//                             row c+1  |piece 0|piece 1|..
//   channels contiguous   block = (quads of channels) x (runs). A thread owns 4 channels and walks a run of `span`
//                         steps, the window in registers and the next 4 steps' loads in flight:
//                             t     |quad 0|quad 1|..           one row is one coalesced access
//                             t+1   |quad 0|quad 1|..
//
// Widths 2 to 4 are one code: older taps are 0, so a width below 4 assumes finite x. The thread that owns the last
// step of a channel writes its new state, from a buffer that is never the old one.
//
// Numerics. int8 with one scale: dp4a on the accumulator 1.5 * 2^23 gives the exact sum as a float. Else: float32,
// oldest tap first, one fused rounding a tap. exp is ex2.approx (2 ulp) of t = -a * log2(e), the reciprocal is
// rcp.approx (1 ulp). A float output depends on its own window only: layout, position and the split into calls do not
// change its bits. For an int8 output two neighbours share a reciprocal, 1/p0 = p1 / (p0 p1), and the last fma rounds
// half to even by itself, since its addend is 1.5 * 2^23; all of it is within 1e-5 of a step of the reference.
//
// Limits: 1e-6 <= out_scale <= 1e4 (the caller rounds in a second pass elsewhere): below, the last fma could leave
// [0, inf), where bits order as integers; above, p0 p1 could overflow. b <= 65535. Offsets are 64 bits wide.
//
// Source: the reference beside this file. No kernel of another project was used.
#include "numerics.cuh"
#include "causal_conv1d.cuh"

// Steps whose loads are in flight at a time, channels contiguous.
constexpr int GROUP = 4;

// Four neighbours in time of one channel.
template <typename Out, bool BOUNDED>
__device__ __forceinline__ Raw<Out> dot_row(u32 before, u32 now, u32 taps, float scale, float bias, float step) {
  const float scales[4] = {scale, scale, scale, scale}, biases[4] = {bias, bias, bias, bias};
  float sum[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k] = window_dot(before, now, taps, k);
  Raw<Out> four;
  finish<BOUNDED>(sum, scales, biases, step, four);
  return four;
}

// A piece of one row, as loaded: the 4 steps before it, WORDS * 4 steps, and the channel's numbers.
template <int WORDS>
struct Row {
  u32 words[WORDS + 1];
  u32 taps;
  float scale, bias;
};

template <int WORDS>
__device__ __forceinline__ void load_row(Row<WORDS>& row, const Sequence<i8, false>& x, const i8* weight,
                                         const float* weight_scale, const float* bias, int c, int t, bool vector) {
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
  row.scale = weight_scale[c];
  row.bias = or_else(bias, c, 0.0f);
}

template <typename Out, bool BOUNDED, int WORDS>
__device__ __forceinline__ void finish_row(const Row<WORDS>& row, float x_scale, float step, Out* to, int left,
                                           bool vector) {
  const float scale = for_output<Out>(row.scale * x_scale), bias = for_output<Out>(row.bias);
  Raw<Out> four[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    four[i] = dot_row<Out, BOUNDED>(row.words[i], row.words[i + 1], row.taps, scale, bias, step);
  }
  if constexpr (WORDS == 4) {
    if (vector && left >= 16) {
      *reinterpret_cast<uint4*>(to) = make_uint4(four[0].bits, four[1].bits, four[2].bits, four[3].bits);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < WORDS; ++i) store_four(four[i], to + 4 * i, left - 4 * i, vector);
}

// int8 with one scale, time contiguous. x: (d, l) a sequence, int8 steps of x_scale. step: out_scale * log2(e), int8
// output only. span: rows a thread. load_vector, store_vector: all rows are aligned to the thread's access.
template <typename Out>
__global__ void __launch_bounds__(THREADS, 10)
    causal_conv1d_static(const i8* __restrict__ x, const i8* __restrict__ weight,
                         const float* __restrict__ weight_scale, const float* __restrict__ bias,
                         const i8* __restrict__ state, Out* __restrict__ out, i8* __restrict__ state_out, int d, int l,
                         int w, i64 batch_stride, i64 stride, int span, int load_vector, int store_vector, float step,
                         float x_scale) {
  constexpr int WORDS = sizeof(Out) == 1 ? 4 : 1;
  const int t = (blockIdx.y * blockDim.x + threadIdx.x) * (4 * WORDS);
  int c = blockIdx.x * blockDim.y * span + threadIdx.y;
  if (t >= l || c >= d) return;
  const auto seq = sequence<false>(x, batch_stride, stride, state, state_out, d, l, w);
  Row<WORDS> row, next;
  load_row(row, seq, weight, weight_scale, bias, c, t, load_vector);
  for (int k = 0; k < span; ++k) {
    const int after = c + blockDim.y;
    const bool more = k + 1 < span && after < d;
    if (more) load_row(next, seq, weight, weight_scale, bias, after, t, load_vector);
    Out* to = out + (static_cast<i64>(blockIdx.z) * d + c) * l + t;
    if (sizeof(Out) == 4 || fabsf(row.scale * x_scale) * MAX_DOT + fabsf(row.bias) < UNBOUNDED_SUM) {
      finish_row<Out, false>(row, x_scale, step, to, l - t, store_vector);
    } else {
      finish_row<Out, true>(row, x_scale, step, to, l - t, store_vector);
    }
    if (t + 4 * WORDS >= l) seq.store_state(c);
    if (!more) return;
    row = next;
    c = after;
  }
}

// What a thread of the channel-contiguous kernels knows about its four channels.
struct Quad {
  float scale[4], bias[4];

  __device__ __forceinline__ Quad(const float* weight_scale, const float* biases, float x_scale, int c, int d) {
    const Raw<float> scales = four_or_else(weight_scale, c, d, 1.0f), offsets = four_or_else(biases, c, d, 0.0f);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scale[j] = scales[j] * x_scale;
      bias[j] = offsets[j];
    }
  }

  // Whether exp2 could overflow for a sum of int8 products.
  __device__ __forceinline__ bool large() const {
    bool any = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) any |= !(fabsf(scale[j]) * MAX_DOT + fabsf(bias[j]) < UNBOUNDED_SUM);
    return any;
  }

  template <typename Out>
  __device__ __forceinline__ void convert() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scale[j] = for_output<Out>(scale[j]);
      bias[j] = for_output<Out>(bias[j]);
    }
  }
};

template <typename In>
__device__ __forceinline__ void load_rows(Raw<In> (&rows)[4], const Sequence<In, true>& x, int c, int t, bool vector) {
#pragma unroll
  for (int k = 0; k < 4; ++k) rows[k] = load_four<false>(x, c, t + k, vector);
}

// Windows of four channels: the latest step in the highest byte.
struct Windows {
  u32 four[4];

  // A row is one step of the four channels.
  __device__ __forceinline__ void push(u32 row) {
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = __byte_perm(four[j], row, 0x0321 + ((4 + j) << 12));
  }

  template <typename Out, bool BOUNDED>
  __device__ __forceinline__ Raw<Out> output(const u32 (&taps)[4], const Quad& quad, float step) const {
    float sum[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = dot(four[j], taps[j]);
    Raw<Out> out;
    finish<BOUNDED>(sum, quad.scale, quad.bias, step, out);
    return out;
  }

  // The last w - 1 steps are the new state.
  __device__ __forceinline__ void store_state(const Sequence<i8, true>& x, int c) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c + j >= x.d) return;
      i8* to = x.state_out + static_cast<i64>(c + j) * (x.w - 1);
#pragma unroll
      for (int i = 0; i < HISTORY; ++i) {
        if (i < x.w - 1) to[i] = static_cast<i8>(four[j] >> (8 * (5 - x.w + i)));
      }
    }
  }
};

// Steps t to end of four channels. whole: all four exist and are aligned in x and out.
template <typename Out, bool BOUNDED>
__device__ __forceinline__ void walk_static(const Sequence<i8, true>& x, Windows& windows, const u32 (&taps)[4],
                                            const Quad& quad, Out* out, int c, int t, int end, bool whole,
                                            float step) {
  Out* to = out + static_cast<i64>(t) * x.d + c;
  if (whole && t + GROUP <= end) {
    const i8* from = x.at(c, t);
    u32 rows[GROUP];
#pragma unroll
    for (int k = 0; k < GROUP; ++k, from += x.stride) rows[k] = *reinterpret_cast<const u32*>(from);
#pragma unroll 1
    for (; t + GROUP <= end; t += GROUP) {
      const bool more = t + 2 * GROUP <= end;
#pragma unroll
      for (int k = 0; k < GROUP; ++k, to += x.d, from += x.stride) {
        windows.push(rows[k]);
        // A step's register is loaded again as soon as it is free.
        if (more) rows[k] = *reinterpret_cast<const u32*>(from);
        windows.output<Out, BOUNDED>(taps, quad, step).store(to);
      }
    }
  }
#pragma unroll 1
  for (; t < end; ++t, to += x.d) {
    windows.push(load_four<false>(x, c, t, whole).bits);
    store_four(windows.output<Out, BOUNDED>(taps, quad, step), to, x.d - c, whole);
  }
}

// The same, channels contiguous. x: (l, d) a sequence. span: steps a thread, a multiple of 4.
template <typename Out>
__global__ void __launch_bounds__(THREADS, 8)
    causal_conv1d_static_channels(const i8* __restrict__ x, const i8* __restrict__ weight,
                                  const float* __restrict__ weight_scale, const float* __restrict__ bias,
                                  const i8* __restrict__ state, Out* __restrict__ out, i8* __restrict__ state_out,
                                  int d, int l, int w, i64 batch_stride, i64 stride, int span, int load_vector,
                                  int store_vector, float step, float x_scale) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  const i64 start = (static_cast<i64>(blockIdx.y) * blockDim.y + threadIdx.y) * span;
  if (c >= d || start >= l) return;
  const int t = static_cast<int>(start), end = min(start + span, static_cast<i64>(l));
  const auto seq = sequence<true>(x, batch_stride, stride, state, state_out, d, l, w);
  Out* rows_out = out + static_cast<i64>(blockIdx.z) * l * d;
  Windows windows = {};
#pragma unroll
  for (int i = -HISTORY; i < 0; ++i) windows.push(load_four<true>(seq, c, t + i, load_vector).bits);
  Quad quad(weight_scale, bias, x_scale, c, d);
  u32 taps[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) taps[j] = packed_taps(weight, min(c + j, d - 1), w);
  const bool whole = load_vector && store_vector && c + 4 <= d;
  const bool bounded = sizeof(Out) == 1 && __any_sync(__activemask(), quad.large());
  quad.convert<Out>();
  if (bounded) {
    walk_static<Out, true>(seq, windows, taps, quad, rows_out, c, t, end, whole, step);
  } else {
    walk_static<Out, false>(seq, windows, taps, quad, rows_out, c, t, end, whole, step);
  }
  if (end == l) windows.store_state(seq, c);
}

// Float32 (no scales) or int8 with one scale a token, time contiguous. weight_scale, scales, scale_state and scales_out
// are null for float32.
template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 8)
    causal_conv1d_real(const In* __restrict__ x, const In* __restrict__ weight, const float* __restrict__ weight_scale,
                       const float* __restrict__ bias, const In* __restrict__ state, Out* __restrict__ out,
                       In* __restrict__ state_out, int d, int l, int w, i64 batch_stride, i64 stride, int span,
                       int load_vector, int store_vector, float step, const float* __restrict__ scales,
                       const float* __restrict__ scale_state, float* __restrict__ scales_out) {
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
      scale[i] = for_output<Out>(or_else(weight_scale, c, 1.0f));
      biases[i] = for_output<Out>(or_else(bias, c, 0.0f));
    }
    Raw<Out> four;
    finish<true>(sum, scale, biases, step, four);
    store_four(four, out + (static_cast<i64>(blockIdx.z) * d + c) * l + t, l - t, store_vector);
    if (t + 4 >= l) seq.store_state(c);
  }
  if (first == 0 && t + 4 >= l) store_scales(tokens, scales_out);
}

// The same, channels contiguous.
template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 4)
    causal_conv1d_real_channels(const In* __restrict__ x, const In* __restrict__ weight,
                                const float* __restrict__ weight_scale, const float* __restrict__ bias,
                                const In* __restrict__ state, Out* __restrict__ out, In* __restrict__ state_out, int d,
                                int l, int w, i64 batch_stride, i64 stride, int span, int load_vector,
                                int store_vector, float step, const float* __restrict__ scales,
                                const float* __restrict__ scale_state, float* __restrict__ scales_out) {
  const int c = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  const i64 start = (static_cast<i64>(blockIdx.y) * blockDim.y + threadIdx.y) * span;
  if (c >= d || start >= l) return;
  const int end = min(start + span, static_cast<i64>(l));
  const auto seq = sequence<true>(x, batch_stride, stride, state, state_out, d, l, w);
  const TokenScales tokens = token_scales(scales, scale_state, l, w);
  Out* rows_out = out + static_cast<i64>(blockIdx.z) * l * d;
  Quad quad(weight_scale, bias, 1.0f, c, d);
  quad.convert<Out>();
  float taps[4][4], window[HISTORY + 1][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) taps[i][j] = tap(weight, min(c + j, d - 1), w, i);
  }
  int t = static_cast<int>(start);
#pragma unroll 1
  for (int i = -HISTORY; i < 0; ++i) {
    const Raw<In> row = load_four<true>(seq, c, t + i, load_vector);
    const float token = tokens.at(t + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      window[1][j] = window[2][j];
      window[2][j] = window[3][j];
      window[3][j] = row[j] * token;
    }
  }
  Raw<In> rows[4], next[4];
  load_rows(rows, seq, c, t, load_vector);
#pragma unroll 1
  for (; t < end; t += 4) {
    if (t + 4 < end) load_rows(next, seq, c, t + 4, load_vector);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float token = tokens.at(t + k);
      float sum[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        window[0][j] = window[1][j];
        window[1][j] = window[2][j];
        window[2][j] = window[3][j];
        window[3][j] = rows[k][j] * token;
        sum[j] = window[0][j] * taps[0][j];
        sum[j] = fmaf(window[1][j], taps[1][j], sum[j]);
        sum[j] = fmaf(window[2][j], taps[2][j], sum[j]);
        sum[j] = fmaf(window[3][j], taps[3][j], sum[j]);
      }
      Raw<Out> four;
      finish<true>(sum, quad.scale, quad.bias, step, four);
      if (t + k < end) store_four(four, rows_out + static_cast<i64>(t + k) * d + c, d - c, store_vector);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) rows[k] = next[k];
  }
  if (end == l) {
#pragma unroll 1
    for (int j = 0; j < 4; ++j) seq.store_state(c + j);
    if (c == 0) store_scales(tokens, scales_out);
  }
}
