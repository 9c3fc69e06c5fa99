// What the causal_conv1d kernels share: sequences in either layout with their states, and four elements at a time.
// Included after numerics.cuh, half.cuh and causal_conv1d_silu.cuh; causal_conv1d/causal_conv1d.cu describes all of it.
#ifndef QM_CAUSAL_CONV1D_CUH
#define QM_CAUSAL_CONV1D_CUH

constexpr int THREADS = 128;
constexpr int HISTORY = 3;

__device__ __forceinline__ u32 pack_bytes(i8 a, i8 b, i8 c, i8 d) {
  return (a & 0xffu) | (b & 0xffu) << 8 | (c & 0xffu) << 16 | (d & 0xffu) << 24;
}

// One sequence of the batch: x (d, l) with either axis contiguous, and the states before and after.
template <typename In, bool CHANNELS>
struct Sequence {
  const In* x;
  i64 stride;      // elements between rows: channels, or steps if CHANNELS
  const In* state; // (d, w-1), or null for zeros
  In* state_out;   // (d, w-1)
  int d, l, w;

  __device__ __forceinline__ const In* at(int c, int t) const {
    return CHANNELS ? x + t * stride + c : x + c * stride + t;
  }

  // Any step: those before the call come from the state, those outside are 0.
  __device__ __forceinline__ In sample(int c, int t) const {
    if (c >= d || t >= l) return In{};
    if (t >= 0) return *at(c, t);
    const int i = t + w - 1;
    return state != nullptr && i >= 0 ? state[static_cast<i64>(c) * (w - 1) + i] : In{};
  }

  // The last w - 1 steps of channel c; all are read before one is written, which waits once.
  __device__ __forceinline__ void store_state(int c) const {
    if (c >= d) return;
    In last[HISTORY];
#pragma unroll
    for (int i = 0; i < HISTORY; ++i) last[i] = sample(c, l - HISTORY + i);
    store_state(c, last);
  }
  // The same from the last three steps, oldest first.
  __device__ __forceinline__ void store_state(int c, const In (&last)[HISTORY]) const {
#pragma unroll
    for (int i = 0; i < HISTORY; ++i) {
      const int held = i - (4 - w);
      if (held >= 0 && c < d) state_out[static_cast<i64>(c) * (w - 1) + held] = last[i];
    }
  }
};

template <bool CHANNELS, typename In>
__device__ __forceinline__ Sequence<In, CHANNELS> sequence(const In* x, i64 batch_stride, i64 stride,
                                                           const In* state, In* state_out, int d, int l, int w) {
  const i64 batch = blockIdx.z, held = batch * d * (w - 1);
  return {x + batch * batch_stride, stride, state == nullptr ? nullptr : state + held, state_out + held, d, l, w};
}

// Scales of the tokens of one sequence; all 1 where there are none.
struct TokenScales {
  const float* scale;  // (l), or null
  const float* state;  // (w-1), or null
  int l, w;

  __device__ __forceinline__ float at(int t) const {
    if (scale == nullptr || t >= l) return 1.0f;
    if (t >= 0) return scale[t];
    return state != nullptr && t + w - 1 >= 0 ? state[t + w - 1] : 1.0f;
  }
};

__device__ __forceinline__ TokenScales token_scales(const float* scale, const float* state, int l, int w) {
  const i64 batch = blockIdx.z;
  return {scale == nullptr ? nullptr : scale + batch * l, state == nullptr ? nullptr : state + batch * (w - 1), l, w};
}

// Once a sequence.
__device__ __forceinline__ void store_scales(const TokenScales& scales, float* scales_out) {
  if (scales_out == nullptr) return;
  const int held = scales.w - 1;
#pragma unroll 1
  for (int i = 0; i < held; ++i) {
    scales_out[static_cast<i64>(blockIdx.z) * held + i] = scales.at(scales.l - held + i);
  }
}

// Taps of channel c as bytes or one by one, padded to 4 with zeros in front. weight is aligned to 4 bytes.
__device__ __forceinline__ u32 packed_taps(const i8* weight, int c, int w) {
  if (w == 4) return reinterpret_cast<const u32*>(weight)[c];
  const i8* row = weight + static_cast<i64>(c) * w;
  return pack_bytes(0, w == 3 ? row[0] : 0, row[w - 2], row[w - 1]);
}

// Taps of int8 inputs are int8, of float inputs of any width float32.
template <typename In> struct Taps { typedef float type; };
template <> struct Taps<i8> { typedef i8 type; };

template <typename Weight>
__device__ __forceinline__ float tap(const Weight* weight, int c, int w, int k) {
  const int i = k - (4 - w);
  return i < 0 ? 0.0f : static_cast<float>(weight[static_cast<i64>(c) * w + i]);
}

__device__ __forceinline__ float or_else(const float* values, int c, float otherwise) {
  return values == nullptr ? otherwise : values[c];
}

// Four elements as they come from memory.
template <typename T> struct Raw;
template <> struct Raw<i8> {
  u32 bits;
  __device__ __forceinline__ void set(i8 a, i8 b, i8 c, i8 d) { bits = pack_bytes(a, b, c, d); }
  __device__ __forceinline__ void load(const i8* from) { bits = *reinterpret_cast<const u32*>(from); }
  __device__ __forceinline__ void store(i8* to) const { *reinterpret_cast<u32*>(to) = bits; }
  __device__ __forceinline__ float operator[](int k) const { return qm_i8_to_f32(bits >> (8 * k)); }
  __device__ __forceinline__ i8 element(int k) const { return static_cast<i8>(bits >> (8 * k)); }
};
template <typename Half> struct RawHalves {
  uint2 bits;
  __device__ __forceinline__ void set(Half a, Half b, Half c, Half d) {
    bits = make_uint2(a.bits | static_cast<u32>(b.bits) << 16, c.bits | static_cast<u32>(d.bits) << 16);
  }
  __device__ __forceinline__ void load(const Half* from) { bits = *reinterpret_cast<const uint2*>(from); }
  __device__ __forceinline__ void store(Half* to) const { *reinterpret_cast<uint2*>(to) = bits; }
  __device__ __forceinline__ Half element(int k) const {
    return {static_cast<unsigned short>((k < 2 ? bits.x : bits.y) >> (16 * (k % 2)))};
  }
  __device__ __forceinline__ float operator[](int k) const { return widen(element(k)); }
};
template <> struct Raw<F16> : RawHalves<F16> {};
template <> struct Raw<BF16> : RawHalves<BF16> {};
template <> struct Raw<float> {
  float4 four;
  __device__ __forceinline__ void set(float a, float b, float c, float d) { four = make_float4(a, b, c, d); }
  __device__ __forceinline__ void load(const float* from) { four = *reinterpret_cast<const float4*>(from); }
  __device__ __forceinline__ void store(float* to) const { *reinterpret_cast<float4*>(to) = four; }
  __device__ __forceinline__ float operator[](int k) const {
    return k == 0 ? four.x : k == 1 ? four.y : k == 2 ? four.z : four.w;
  }
  __device__ __forceinline__ float element(int k) const { return (*this)[k]; }
};

// Whether four words or floats from here, or from a multiple of four further, are one access.
__device__ __forceinline__ bool aligned_to_four(const void* from) {
  return reinterpret_cast<unsigned long long>(from) % 16 == 0;
}

// Four neighbours of a dense vector of d, the last one repeated; `otherwise` where there is none.
__device__ __forceinline__ Raw<float> four_or_else(const float* values, int c, int d, float otherwise) {
  Raw<float> four;
  if (values != nullptr && c + 4 <= d && aligned_to_four(values)) {
    four.load(values + c);
  } else {
    float each[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) each[j] = or_else(values, min(c + j, d - 1), otherwise);
    four.set(each[0], each[1], each[2], each[3]);
  }
  return four;
}

// Four elements along the contiguous axis, from (c, t); those outside are 0. PAST: t may lie before the call.
template <bool PAST, typename In, bool CHANNELS>
__device__ __forceinline__ Raw<In> load_four(const Sequence<In, CHANNELS>& x, int c, int t, bool vector) {
  Raw<In> four;
  const bool whole = (CHANNELS ? c + 4 <= x.d && t < x.l : t + 4 <= x.l) && (!PAST || t >= 0);
  if (vector && whole) {
    four.load(x.at(c, t));
    return four;
  }
  In each[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int ck = CHANNELS ? c + k : c, tk = CHANNELS ? t : t + k;
    each[k] = PAST ? x.sample(ck, tk) : ck < x.d && tk < x.l ? *x.at(ck, tk) : In{};
  }
  four.set(each[0], each[1], each[2], each[3]);
  return four;
}

// `left`: how many of the four exist.
template <typename Out>
__device__ __forceinline__ void store_four(const Raw<Out>& four, Out* to, int left, bool vector) {
  if (vector && left >= 4) {
    four.store(to);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < left) to[k] = four.element(k);
  }
}

// Four values in units of UNIT to four outputs.
template <bool EACH>
__device__ __forceinline__ void finish(const float (&v)[4], const InvScales<EACH>& inv_scales, Raw<i8>& out) {
  out.bits = quantize_four(v, inv_scales);
}
template <bool EACH>
__device__ __forceinline__ void finish(const float (&v)[4], const InvScales<EACH>&, Raw<float>& out) {
  out.set(v[0] * UNIT, v[1] * UNIT, v[2] * UNIT, v[3] * UNIT);
}

// The int8 of a float output, whose unit is that of the scales.
template <bool EACH>
__device__ __forceinline__ Raw<i8> codes_of(const Raw<float>& out, const InvScales<EACH>& inv_scales) {
  const float v[4] = {out[0], out[1], out[2], out[3]};
  return {quantize_four(v, inv_scales)};
}

// Four real sums to four outputs.
template <typename Out>
__device__ __forceinline__ void finish_real(const float (&sum)[4], const float (&scale)[4], const float (&bias)[4],
                                            Raw<Out>& out) {
  Out four[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) narrow(silu(fmaf(sum[k], scale[k], bias[k])), four[k]);
  out.set(four[0], four[1], four[2], four[3]);
}

#endif
