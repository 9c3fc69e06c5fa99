// What the causal_conv1d kernels share: SiLU onto either output, and sequences in either layout with their states.
// Included after numerics.cuh. Formula, layouts and numerics are described in causal_conv1d/causal_conv1d.cu.
#ifndef QM_CAUSAL_CONV1D_CUH
#define QM_CAUSAL_CONV1D_CUH

typedef unsigned int u32;
typedef signed char i8;
typedef long long i64;

constexpr int THREADS = 128;
constexpr int HISTORY = 3;
constexpr float LOG2E = 1.44269504f;
// The bits of QM_MAGIC: integers added to them are added to the float.
constexpr int MAGIC_BITS = 0x4B400000;
// exp2 of more than this could overflow the product of two neighbours; SiLU is 0 long before.
constexpr float MAX_EXPONENT = 96.0f;
// While |a| stays below, -a * log2(e) cannot exceed MAX_EXPONENT.
constexpr float UNBOUNDED_SUM = 66.0f;
// |sum of 4 products of int8|.
constexpr float MAX_DOT = 65536.0f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Infinite exp2 gives the limit 0, so nothing is bounded here.
__device__ __forceinline__ float silu(float a) { return a * rcp_approx(1.0f + exp2_approx(-LOG2E * a)); }

// Four signed integers, saturated, the first in the lowest byte.
__device__ __forceinline__ u32 pack_saturated(const int (&q)[4]) {
  u32 upper, all;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(upper) : "r"(q[3]), "r"(q[2]), "r"(0));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(q[1]), "r"(q[0]), "r"(upper));
  return all;
}

// Four values of t = -a * log2(e) to silu(a) / out_scale as int8; step = out_scale * log2(e), so that
// -t * sigmoid / step is what is wanted and the scale costs nothing: step is a factor of p.
template <bool BOUNDED>
__device__ __forceinline__ u32 silu_quantized(const float (&exponents)[4], float step) {
  float t[4], p[4];
  int q[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    t[k] = BOUNDED ? fminf(exponents[k], MAX_EXPONENT) : exponents[k];
    p[k] = fmaf(exp2_approx(t[k]), step, step);
  }
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const float both = rcp_approx(p[k] * p[k + 1]);
    q[k] = __float_as_int(fmaf(-t[k], both * p[k + 1], QM_MAGIC)) - MAGIC_BITS;
    q[k + 1] = __float_as_int(fmaf(-t[k + 1], both * p[k], QM_MAGIC)) - MAGIC_BITS;
  }
  return pack_saturated(q);
}

// The exact dot product of four bytes with the taps.
__device__ __forceinline__ float dot(u32 window, u32 taps) {
  return __int_as_float(__dp4a(static_cast<int>(window), static_cast<int>(taps), MAGIC_BITS)) - QM_MAGIC;
}

// Output k of four from their bytes and the four before them.
__device__ __forceinline__ float window_dot(u32 before, u32 now, u32 taps, int k) {
  return dot(__byte_perm(before, now, 0x4321 + 0x1111 * k), taps);
}

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
    if (c >= d || t >= l) return In(0);
    if (t >= 0) return *at(c, t);
    const int i = t + w - 1;
    return state != nullptr && i >= 0 ? state[static_cast<i64>(c) * (w - 1) + i] : In(0);
  }

  __device__ __forceinline__ void store_state(int c) const {
    if (c >= d) return;
#pragma unroll 1
    for (int i = 0; i < w - 1; ++i) state_out[static_cast<i64>(c) * (w - 1) + i] = sample(c, l - (w - 1) + i);
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

template <typename In>
__device__ __forceinline__ float tap(const In* weight, int c, int w, int k) {
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

// Four neighbours of a dense vector of d, the last one repeated; `otherwise` where there is none.
__device__ __forceinline__ Raw<float> four_or_else(const float* values, int c, int d, float otherwise) {
  Raw<float> four;
  if (values != nullptr && c + 4 <= d && reinterpret_cast<unsigned long long>(values) % 16 == 0) {
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
    each[k] = PAST ? x.sample(ck, tk) : ck < x.d && tk < x.l ? *x.at(ck, tk) : In(0);
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

// Four sums to four outputs. scale and bias are those of a, or of t = -a * log2(e) for int8 (`for_output`).
template <bool BOUNDED>
__device__ __forceinline__ void finish(const float (&sum)[4], const float (&scale)[4], const float (&bias)[4],
                                       float step, Raw<i8>& out) {
  float t[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) t[k] = fmaf(sum[k], scale[k], bias[k]);
  out.bits = silu_quantized<BOUNDED>(t, step);
}

template <bool BOUNDED>
__device__ __forceinline__ void finish(const float (&sum)[4], const float (&scale)[4], const float (&bias)[4],
                                       float, Raw<float>& out) {
  out.set(silu(fmaf(sum[0], scale[0], bias[0])), silu(fmaf(sum[1], scale[1], bias[1])),
          silu(fmaf(sum[2], scale[2], bias[2])), silu(fmaf(sum[3], scale[3], bias[3])));
}

template <typename Out>
__device__ __forceinline__ float for_output(float value) {
  return sizeof(Out) == 1 ? -LOG2E * value : value;
}

#endif
