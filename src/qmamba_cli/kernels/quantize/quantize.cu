// Floats to the int8 grid, from float32 or a half, and back to float32.
//
//   quantize            q = saturate(round_half_even(x * inv_scale)), one scale, or one a channel
//   dequantize          x = q * scale, likewise
//   quantize_per_token  scale[b,t] = max(max_c |x[b,c,t]|, 1e-5) / 127, then quantize by its reciprocal
//
// Shapes and layout. Elementwise: `rows` rows of `inner` contiguous elements, input rows `stride` elements apart,
// output rows dense; a dense tensor is one row, whatever its strides. Per token: x (b, d, l) with contiguous channels
// or contiguous time, any stride along the other; q is dense in x's order, scale (b, l).
//
//   elementwise           a thread takes 4 x 4 elements, a block's width apart; blocks x along a row, y over rows
//   a scale a channel     the same, a row being a token (scales along it) or a channel (one for it)
//   per token, channels   block = one token; its threads keep the first KEPT groups of four in registers between the
//                         maximum and the product, and read later ones again
//   per token, time       block = 32 tokens x 32 threads that share the channels; one reduction in shared memory
//
// Numerics. Exact: halves are widened, one rounding by qm_quantize, IEEE division and reciprocal, a maximum in any
// order. No fma.
// Limits: finite x. Offsets are 64 bits wide; rows beyond the grid are looped over.
//
// Source: quant/grid.py.
#include "numerics.cuh"
#include "half.cuh"

typedef unsigned int u32;
typedef signed char i8;
typedef long long i64;

constexpr int THREADS = 256;
// Groups of four elements that a thread has in flight.
constexpr int IN_FLIGHT = 4;
// Groups of four that a thread keeps between the maximum and the product: 5120 channels.
constexpr int KEPT = 5;
constexpr float QMAX = 127.0f;
constexpr float MIN_TOKEN_ABSMAX = 1e-5f;
constexpr int WARP = 32;

__device__ __forceinline__ u32 quantize_four(float4 x, float4 inv_scale) {
  return qm_four_bytes(x.x * inv_scale.x, x.y * inv_scale.y, x.z * inv_scale.z, x.w * inv_scale.w);
}

__device__ __forceinline__ float4 dequantize_four(u32 q, float4 scale) {
  return make_float4(qm_i8_to_f32(q) * scale.x, qm_i8_to_f32(q >> 8) * scale.y, qm_i8_to_f32(q >> 16) * scale.z,
                     qm_i8_to_f32(q >> 24) * scale.w);
}

// One element or four, in either direction. `factor`: inv_scale or scale.
template <typename In>
__device__ __forceinline__ void convert(const In* x, i8* q, float factor) { *q = qm_quantize(widen(*x), factor); }
__device__ __forceinline__ void convert(const i8* q, float* x, float factor) { *x = qm_dequantize(*q, factor); }
template <typename In>
__device__ __forceinline__ float4 read_four(const In* x) {
  struct alignas(4 * sizeof(In)) Four {
    In value[4];
  };
  const Four four = *reinterpret_cast<const Four*>(x);
  return make_float4(widen(four.value[0]), widen(four.value[1]), widen(four.value[2]), widen(four.value[3]));
}
__device__ __forceinline__ u32 read_four(const i8* q) { return *reinterpret_cast<const u32*>(q); }
__device__ __forceinline__ void write_four(float4 x, i8* q, float4 factor) {
  *reinterpret_cast<u32*>(q) = quantize_four(x, factor);
}
__device__ __forceinline__ void write_four(u32 q, float* x, float4 factor) {
  *reinterpret_cast<float4*>(x) = dequantize_four(q, factor);
}
template <typename In, typename Out>
__device__ __forceinline__ void write_four(In x, Out* to, float factor) {
  write_four(x, to, make_float4(factor, factor, factor, factor));
}

// x: (rows, inner), rows `stride` elements apart. out: (rows, inner), dense. vector: every row of both is aligned to
// four elements.
template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS)
    convert_rows(const In* __restrict__ x, Out* __restrict__ out, i64 rows, i64 inner, i64 stride, int vector,
                 float factor) {
  const i64 width = static_cast<i64>(THREADS) * 4;
  const i64 first = blockIdx.x * width * IN_FLIGHT + threadIdx.x * 4;
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const In* from = x + row * stride;
    Out* to = out + row * inner;
    if (vector && first + (IN_FLIGHT - 1) * width + 4 <= inner) {
      decltype(read_four(from)) four[IN_FLIGHT];
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; ++k) four[k] = read_four(from + first + k * width);
#pragma unroll
      for (int k = 0; k < IN_FLIGHT; ++k) write_four(four[k], to + first + k * width, factor);
      continue;
    }
#pragma unroll 1
    for (int k = 0; k < IN_FLIGHT; ++k) {
      const i64 at = first + k * width;
      if (vector && at + 4 <= inner) {
        write_four(read_four(from + at), to + at, factor);
      } else {
        for (i64 i = at; i < at + 4 && i < inner; ++i) convert(from + i, to + i, factor);
      }
    }
  }
}

// A scale a channel: what a value of the type is multiplied by.
template <typename In>
__device__ __forceinline__ float factor_of(const In*, float scale) { return __frcp_rn(scale); }
__device__ __forceinline__ float factor_of(const i8*, float scale) { return scale; }

// The same with scale[i] along a row of `inner` channels (`channels` is 0), or scale[row % channels] for a whole row.
template <typename In, typename Out>
__global__ void __launch_bounds__(THREADS)
    convert_channels(const In* __restrict__ x, Out* __restrict__ out, const float* __restrict__ scale, i64 rows,
                     i64 inner, i64 stride, int channels, int vector) {
  const i64 first = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) * 4;
  if (first >= inner) return;
  const bool whole = vector && first + 4 <= inner;
  float own[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) own[k] = factor_of(x, scale[channels == 0 && first + k < inner ? first + k : 0]);
#pragma unroll 4
  for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const In* from = x + row * stride + first;
    Out* to = out + row * inner + first;
    if (channels != 0) own[0] = own[1] = own[2] = own[3] = factor_of(x, scale[row % channels]);
    if (whole) {
      write_four(read_four(from), to, make_float4(own[0], own[1], own[2], own[3]));
    } else {
      for (int k = 0; k < 4 && first + k < inner; ++k) convert(from + k, to + k, own[k]);
    }
  }
}

__device__ __forceinline__ float largest(float4 x) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

__device__ __forceinline__ float token_scale(float absmax) { return __fdiv_rn(fmaxf(absmax, MIN_TOKEN_ABSMAX), QMAX); }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Channels contiguous. x: (b, l, d), `batch_stride` and `stride` elements apart. q: (b, l, d), scale: (b, l), dense.
template <typename In>
__global__ void __launch_bounds__(THREADS)
    quantize_token_channels(const In* __restrict__ x, i8* __restrict__ q, float* __restrict__ scale, int d, int l,
                            i64 batch_stride, i64 stride, int vector) {
  __shared__ float partial[THREADS / WARP];
  const i64 token = static_cast<i64>(blockIdx.y) * l + blockIdx.x;
  const In* from = x + blockIdx.y * batch_stride + blockIdx.x * stride;
  i8* to = q + token * d;
  const int fours = vector ? d / 4 : 0, t = threadIdx.x;
  float4 kept[KEPT];
  float absmax = 0.0f;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    kept[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (t + i * THREADS < fours) kept[i] = read_four(from + 4 * static_cast<i64>(t + i * THREADS));
  }
#pragma unroll
  for (int i = 0; i < KEPT; ++i) absmax = fmaxf(absmax, largest(kept[i]));
  for (int i = t + KEPT * THREADS; i < fours; i += THREADS) {
    absmax = fmaxf(absmax, largest(read_four(from + 4 * static_cast<i64>(i))));
  }
  for (int i = 4 * fours + t; i < d; i += THREADS) absmax = fmaxf(absmax, fabsf(widen(from[i])));
  absmax = warp_max(absmax);
  if (t % WARP == 0) partial[t / WARP] = absmax;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / WARP; ++i) absmax = fmaxf(absmax, partial[i]);

  const float step = token_scale(absmax), inv_scale = __frcp_rn(step);
  if (t == 0) scale[token] = step;
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    if (t + i * THREADS < fours) write_four(kept[i], to + 4 * static_cast<i64>(t + i * THREADS), inv_scale);
  }
  for (int i = t + KEPT * THREADS; i < fours; i += THREADS) {
    write_four(read_four(from + 4 * static_cast<i64>(i)), to + 4 * static_cast<i64>(i), inv_scale);
  }
  for (int i = 4 * fours + t; i < d; i += THREADS) to[i] = qm_quantize(widen(from[i]), inv_scale);
}

// Time contiguous. x: (b, d, l), `batch_stride` and `stride` elements apart. q: (b, d, l), scale: (b, l), dense.
template <typename In>
__global__ void __launch_bounds__(WARP* WARP)
    quantize_token_time(const In* __restrict__ x, i8* __restrict__ q, float* __restrict__ scale, int d, int l,
                        i64 batch_stride, i64 stride) {
  __shared__ float partial[WARP][WARP];
  const int t = blockIdx.x * WARP + threadIdx.x;
  const In* from = x + blockIdx.y * batch_stride + t;
  float absmax = 0.0f;
  if (t < l) {
#pragma unroll 4
    for (int c = threadIdx.y; c < d; c += WARP) absmax = fmaxf(absmax, fabsf(widen(from[c * stride])));
  }
  partial[threadIdx.y][threadIdx.x] = absmax;
  __syncthreads();
  if (t >= l) return;
#pragma unroll
  for (int i = 0; i < WARP; ++i) absmax = fmaxf(absmax, partial[i][threadIdx.x]);

  const float step = token_scale(absmax), inv_scale = __frcp_rn(step);
  if (threadIdx.y == 0) scale[static_cast<i64>(blockIdx.y) * l + t] = step;
  i8* to = q + static_cast<i64>(blockIdx.y) * d * l + t;
#pragma unroll 4
  for (int c = threadIdx.y; c < d; c += WARP) {
    to[static_cast<i64>(c) * l] = qm_quantize(widen(from[c * stride]), inv_scale);
  }
}
