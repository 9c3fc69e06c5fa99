// What the causal_conv1d kernels share: SiLU onto either output, sequences in either layout with their states, and four
// channels side by side. Included after numerics.cuh and half.cuh; causal_conv1d/causal_conv1d.cu describes all of it.
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
// Steps that are loaded together, and groups of them that are in flight, channels contiguous.
constexpr int GROUP = 4;
constexpr int FLIGHT = 2;

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

// The one SiLU of all kernels here: an int8 output is exactly what the float output would be quantized to. Infinite
// exp2 gives the limit 0, so nothing is bounded.
__device__ __forceinline__ float silu(float a) { return a * rcp_approx(1.0f + exp2_approx(-LOG2E * a)); }

// 1 / out_scale of four channels: EACH its own, or one for all, in one register.
template <bool EACH>
struct InvScales {
  float value[EACH ? 4 : 1];
  __device__ __forceinline__ float operator[](int j) const { return value[EACH ? j : 0]; }
};

// Four values to int8 as qm_quantize has it.
template <bool EACH>
__device__ __forceinline__ u32 quantize_four(const float (&v)[4], const InvScales<EACH>& inv_scales) {
  return qm_four_bytes(v[0] * inv_scales[0], v[1] * inv_scales[1], v[2] * inv_scales[2], v[3] * inv_scales[3]);
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

// Four sums to four outputs.
template <bool EACH>
__device__ __forceinline__ void finish(const float (&sum)[4], const float (&scale)[4], const float (&bias)[4],
                                       const InvScales<EACH>& inv_scales, Raw<i8>& out) {
  float v[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) v[k] = silu(fmaf(sum[k], scale[k], bias[k]));
  out.bits = quantize_four(v, inv_scales);
}

template <bool EACH, typename Out>
__device__ __forceinline__ void finish(const float (&sum)[4], const float (&scale)[4], const float (&bias)[4],
                                       const InvScales<EACH>&, Raw<Out>& out) {
  Out four[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) narrow(silu(fmaf(sum[k], scale[k], bias[k])), four[k]);
  out.set(four[0], four[1], four[2], four[3]);
}

// What a thread of the channel-contiguous kernels knows about four of its channels.
struct Quad {
  float scale[4], bias[4];

  __device__ __forceinline__ void load(const float* weight_scale, const float* biases, float x_scale, int c, int d) {
    const Raw<float> scales = four_or_else(weight_scale, c, d, 1.0f), offsets = four_or_else(biases, c, d, 0.0f);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scale[j] = scales[j] * x_scale;
      bias[j] = offsets[j];
    }
  }
};

// Windows of four channels: the latest step in the highest byte.
struct Windows {
  u32 four[4];

  // A row is one step of the four channels.
  __device__ __forceinline__ void push(u32 row) {
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = __byte_perm(four[j], row, 0x0321 + ((4 + j) << 12));
  }

  template <typename Out, bool EACH>
  __device__ __forceinline__ Raw<Out> output(const u32 (&taps)[4], const Quad& quad,
                                             const InvScales<EACH>& inv_scales) const {
    float sum[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = dot(four[j], taps[j]);
    Raw<Out> out;
    finish(sum, quad.scale, quad.bias, inv_scales, out);
    return out;
  }

  // The last w - 1 steps are the new state.
  __device__ __forceinline__ void store_state(const Sequence<i8, true>& x, int c) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const i8 last[HISTORY] = {static_cast<i8>(four[j] >> 8), static_cast<i8>(four[j] >> 16),
                                static_cast<i8>(four[j] >> 24)};
      x.store_state(c + j, last);
    }
  }
};

// `rows` rows further, in one instruction; written out, since the compiler would make many of it.
template <typename T>
__device__ __forceinline__ T* rows_ahead(T* from, u32 stride_bytes, u32 rows) {
  T* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(stride_bytes), "r"(rows), "l"(from));
  __builtin_assume(__isGlobal(to));
  return to;
}

// One step of a thread's channels, as it lies in memory. Volatile: the compiler would read a step just before its use.
template <int QUADS> struct Step;
template <> struct Step<1> {
  u32 word[1];
  __device__ __forceinline__ void load(const i8* from) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word[0]) : "l"(from));
  }
  __device__ __forceinline__ void load_shared(u32 from) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(from) : "memory");
  }
};
template <> struct Step<2> {
  u32 word[2];
  __device__ __forceinline__ void load(const i8* from) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from));
  }
  __device__ __forceinline__ void load_shared(u32 from) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(from) : "memory");
  }
};

// Steps of a thread's channels on their way through shared memory: many are in flight, and none holds a register. A
// thread reads only what it has copied itself, so it waits for its own copies and for no other thread.
template <int QUADS>
struct Ring {
  static constexpr int BYTES = 4 * QUADS;
  static constexpr u32 STEP_BYTES = THREADS * BYTES, GROUP_BYTES = GROUP * STEP_BYTES;
  // One more than are in flight: the slot that is filled is not the one that was just read.
  static constexpr int SLOTS = FLIGHT + 1;
  u32 base;        // of the thread's place in the first slot
  const i8* from;  // step that is asked for next
  u32 stride;      // bytes between steps
  int left;        // groups not asked for yet
  int slot;        // filled next

  __device__ __forceinline__ Ring(void* shared, const i8* first, u32 stride_bytes, int groups)
      : base(static_cast<u32>(__cvta_generic_to_shared(shared)) + (threadIdx.y * blockDim.x + threadIdx.x) * BYTES),
        from(first), stride(stride_bytes), left(groups), slot(0) {}

  // Asks for one more group of steps, if there is one; it counts as a group in any case.
  __device__ __forceinline__ void ask() {
    if (left > 0) {
      const u32 to = base + slot * GROUP_BYTES;
#pragma unroll
      for (u32 k = 0; k < GROUP; ++k) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to + k * STEP_BYTES),
                     "l"(rows_ahead(from, stride, k)), "n"(BYTES)
                     : "memory");
      }
      from = rows_ahead(from, stride, GROUP);
      --left;
    }
    slot = slot == SLOTS - 1 ? 0 : slot + 1;
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  __device__ __forceinline__ void fill() {
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) ask();
  }

  // The oldest group; as many stay in flight after it.
  __device__ __forceinline__ void take(Step<QUADS> (&steps)[GROUP]) {
    asm volatile("cp.async.wait_group %0;" ::"n"(FLIGHT - 1) : "memory");
    const u32 at = base + (slot == SLOTS - 1 ? 0 : slot + 1) * GROUP_BYTES;
    ask();
#pragma unroll
    for (u32 k = 0; k < GROUP; ++k) steps[k].load_shared(at + k * STEP_BYTES);
  }
};

template <typename Out>
__device__ __forceinline__ void store_step(const Raw<Out> (&fours)[1], Out* to) { fours[0].store(to); }
__device__ __forceinline__ void store_step(const Raw<i8> (&fours)[2], i8* to) {
  *reinterpret_cast<uint2*>(to) = make_uint2(fours[0].bits, fours[1].bits);
}

#endif
