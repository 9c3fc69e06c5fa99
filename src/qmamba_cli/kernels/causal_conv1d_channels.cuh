// Channels side by side in one thread of a causal_conv1d kernel, and steps on their way to it. Included after
// causal_conv1d.cuh; causal_conv1d/causal_conv1d.cu describes all of it.
#ifndef QM_CAUSAL_CONV1D_CHANNELS_CUH
#define QM_CAUSAL_CONV1D_CHANNELS_CUH

// Steps that are loaded together.
constexpr int GROUP = 4;

// What a thread of the channel-contiguous kernels knows about four of its channels; 0 for those that do not exist.
struct Quad {
  float scale[4], bias[4];

  __device__ __forceinline__ void set(const Raw<float>& scales, const Raw<float>& biases, float x_scale) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scale[j] = scales[j] * x_scale;
      bias[j] = biases[j];
    }
  }

  __device__ __forceinline__ void load(const float* weight_scale, const float* biases, float x_scale, int c, int d) {
    set(four_or_else(weight_scale, c, d, 1.0f), four_or_else(biases, c, d, 0.0f), x_scale);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c + j >= d) scale[j] = bias[j] = 0.0f;
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

  // One step: the output, and the int8 of a float one if BOTH.
  template <bool BOTH, typename Out, bool EACH>
  __device__ __forceinline__ void output(const u32 (&taps)[4], const Quad& quad, const InvScales<EACH>& inv_scales,
                                         Raw<Out>& out, Raw<i8>& codes) const {
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = fmaf(dot(four[j], taps[j]), quad.scale[j], quad.bias[j]);
    silu_pair(v[0], v[1]);
    silu_pair(v[2], v[3]);
    finish(v, inv_scales, out);
    if (BOTH) finish(v, inv_scales, codes);
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
  // Groups in flight: fewer where steps are wider, since shared memory is also the first-level cache of the stores.
  static constexpr int FLIGHT = QUADS == 1 ? 6 : 2;
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

// What turns sums into outputs, as the kernel gets it. aligned: four of each can be loaded at once.
struct Constants {
  const i8* weight;
  const float *weight_scale, *bias, *out_scale;
  float x_scale, inv_scale;
  bool aligned;
};

// The windows of 4 * QUADS channels and what turns them into outputs. EACH: every channel has its own scale.
template <int QUADS, bool EACH>
struct Channels {
  Windows windows[QUADS];
  u32 taps[QUADS][4];
  Quad quads[QUADS];
  InvScales<EACH> inv_scales[QUADS];

  // Channels c and on, from step t.
  __device__ __forceinline__ void load(const Sequence<i8, true>& x, const Constants& from, int c, int t, bool whole) {
    const bool dense = whole && from.aligned && (t > 0 || x.state == nullptr);
    if (dense) {
      // All loads before the first use: their latencies overlap.
      Step<QUADS> past[HISTORY];
      uint4 four_taps[QUADS];
      Raw<float> scales[QUADS], biases[QUADS], steps[QUADS];
#pragma unroll
      for (int k = 0; k < HISTORY; ++k) past[k].load(x.at(c, max(t - HISTORY + k, 0)));
#pragma unroll
      for (int i = 0; i < QUADS; ++i) {
        four_taps[i] = reinterpret_cast<const uint4*>(from.weight)[c / 4 + i];
        scales[i].load(from.weight_scale + c + 4 * i);
        biases[i].load(from.bias + c + 4 * i);
        if constexpr (EACH) steps[i].load(from.out_scale + c + 4 * i);
      }
#pragma unroll
      for (int i = 0; i < QUADS; ++i) {
#pragma unroll
        for (int k = 0; k < HISTORY; ++k) windows[i].push(t > 0 ? past[k].word[i] : 0);
        const u32 each[4] = {four_taps[i].x, four_taps[i].y, four_taps[i].z, four_taps[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) taps[i][j] = each[j];
        quads[i].set(scales[i], biases[i], from.x_scale);
        inv_scales[i].set(steps[i], from.inv_scale);
      }
      return;
    }
#pragma unroll 1
    for (int k = -HISTORY; k < 0; ++k) {
#pragma unroll
      for (int i = 0; i < QUADS; ++i) windows[i].push(load_four<true>(x, c + 4 * i, t + k, whole).bits);
    }
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int first = c + 4 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) taps[i][j] = packed_taps(from.weight, min(first + j, x.d - 1), x.w);
      quads[i].load(from.weight_scale, from.bias, from.x_scale, first, x.d);
      inv_scales[i].set(EACH ? four_or_else(from.out_scale, first, x.d, 1.0f) : Raw<float>{}, from.inv_scale);
    }
  }

  template <bool BOTH, typename Out>
  __device__ __forceinline__ void output(Raw<Out> (&fours)[QUADS], Raw<i8> (&codes)[QUADS]) const {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      windows[i].template output<BOTH>(taps[i], quads[i], inv_scales[i], fours[i], codes[i]);
    }
  }
};

#endif
