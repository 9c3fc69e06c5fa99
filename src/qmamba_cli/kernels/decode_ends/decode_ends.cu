// The two ends of a decode step of a model whose blocks are rotated and whose tables are not.
//
//   ends_begin   residual[t] = hadamard(table[id[t]] * scale[id[t]])                 embedding, hadamard
//   ends_turn    hidden[t]   = unrotate(rms_norm(residual[t]), gain)                 rms_norm, unrotate
//   ends_head    the same for one token, then logits = hidden . weight^T and the place of the largest
//
// Numerics  bit for bit those of the operators named on the right, `linear` (few float32 tokens) and `argmax`: every
//           value has the same terms in the same order. Compiled with -fmad=false.
// Overlap   launched with programmatic dependent launch: the head's first rows are on their way before its token is.
// Limits    H_n = H_K (x) S of order d, K = 12, 20, 28 or d a power of two, d a multiple of 128 up to 4096.
// Source    ours.
#include "numerics.cuh"
#include "half.cuh"
#include "argmax_key.cuh"
#include "hadamard.cuh"
#include "overlap.cuh"
#include "carver.cuh"
#include "decode_ptx.cuh"
#include "decode_ends_way.cuh"

__device__ __forceinline__ float widen(signed char q) { return qm_i8_to_f32(static_cast<unsigned char>(q)); }

// Grid: one block a token. K: 16 for powers of two.
template <typename T, int K, unsigned... ROWS>
__global__ void __launch_bounds__(256)
    ends_begin(const long long* ids,             // (tokens,)
               const T* __restrict__ table,      // (rows, K << m)
               const float* __restrict__ scale,  // (rows,) real units a step, or null
               float* residual,                  // (tokens, K << m) out
               int rows, int m,
               int stride,                       // floats between two segments of S, as hadamard's
               float norm) {
  extern __shared__ __align__(16) unsigned char shared[];
  release_dependents();
  const int width = K << m;
  Carver carver{shared};
  float* row = carver.take<float>(width);
  float* tile = carver.take<float>(K * stride);
  wait_for_producers();
  const long long id = ids[blockIdx.x];
  const bool known = id >= 0 && id < rows;
  const float factor = !known ? qm_from_bits(0x7fffffffu) : scale == nullptr ? 1.0f : scale[id];
  struct alignas(4 * sizeof(T)) Four {
    T values[4];
  };
  const Four* from = reinterpret_cast<const Four*>(table + (known ? id : 0) * width);
  for (int i = threadIdx.x; i < width / 4; i += blockDim.x) {
    const Four four = from[i];
    float4 value;
    value.x = widen(four.values[0]) * factor;
    value.y = widen(four.values[1]) * factor;
    value.z = widen(four.values[2]) * factor;
    value.w = widen(four.values[3]) * factor;
    reinterpret_cast<float4*>(row)[i] = value;
  }
  __syncthreads();
  core_pass<float, K, ROWS...>(row, tile, 1, m, stride);
  __syncthreads();
  middle_passes(tile, K, m, stride);
  low_pass<true>(residual + static_cast<long long>(blockIdx.x) * width, tile, width, m, stride, norm);
}

// Grid: one block a token.
template <int K>
__global__ void __launch_bounds__(256)
    ends_turn(const float* residual,           // (tokens, d)
              const float* __restrict__ gain,  // (d,) or null
              const float* __restrict__ core,  // (K, K) rows of H_K^T
              float* hidden,                   // (tokens, d) out
              int d, int bits, int norm_threads, float eps, float unit) {
  extern __shared__ __align__(16) unsigned char shared[];
  release_dependents();
  Carver carver{shared};
  const Way way = begin_way<K>(carver, gain, core, d, bits, norm_threads, eps, unit);
  wait_for_copies();
  wait_for_producers();
  const long long start = static_cast<long long>(blockIdx.x) * d;
  normalize_and_turn<K>(residual + start, way, [&](int column, float y) { hidden[start + column] = y; });
}

// Four neighbouring weights of the 16 bytes that a lane holds.
__device__ __forceinline__ void four_weights(const unsigned int (&words)[4], int piece, float (&w)[4], signed char) {
  const unsigned int biased = words[piece] ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = qm_from_bits(__byte_perm(biased, 0x4B000000u, 0x7440u | i)) - 8388736.0f;
}
template <typename T>
__device__ __forceinline__ void four_weights(const unsigned int (&words)[4], int piece, float (&w)[4], T) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    w[i] = widen(T{static_cast<unsigned short>(words[piece * 2 + i / 2] >> (16 * (i % 2)))});
  }
}

constexpr int HEAD_WARPS = 16;
constexpr int HEAD_ROWS = 4;   // of the weight that a warp multiplies at a time
constexpr int HEAD_SLOTS = 3;  // pieces of such rows, 512 bytes each, that are on their way
constexpr int HEAD_AHEAD = 2;  // further pieces that are asked for in the second-level cache

// Grid: a block a multiprocessor. Warps take groups of four rows in turn; a lane copies what it will use itself.
template <typename T, int K>
__global__ void __launch_bounds__(HEAD_WARPS* WARP, 2)
    ends_head(const float* residual,                     // (d,)
              const float* __restrict__ gain,            // (d,) or null
              const float* __restrict__ core,            // (K, K) rows of H_K^T
              const unsigned char* __restrict__ weight,  // (rows, d) of T
              const float* __restrict__ weight_scale,    // (rows,) or null
              const float* __restrict__ bias,            // (rows,) or null
              float* logits,                             // (rows,) out, or null
              unsigned long long* found,                 // (2,) zero: largest key, blocks that have told theirs
              long long* token,                          // (1,) out: the first of the largest logits below `limit`; or null
              int rows, int limit, int d, int bits, int norm_threads, float eps, float unit) {
  constexpr int COLUMNS = 16 / static_cast<int>(sizeof(T)), SPAN = WARP * COLUMNS, PIECES = COLUMNS / 4;
  constexpr int SLOT = HEAD_ROWS * WARP;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int spans = (d + SPAN - 1) / SPAN, pitch = d * static_cast<int>(sizeof(T));
  const int groups = (rows + HEAD_ROWS - 1) / HEAD_ROWS, stride = gridDim.x * HEAD_WARPS;
  Carver carver{shared};
  float* held = carver.take<float>(spans * SPAN);  // (spans, PIECES, 32, 4)
  uint4* slots = carver.take<uint4>(HEAD_WARPS * HEAD_SLOTS * SLOT) + warp * HEAD_SLOTS * SLOT + lane;
  unsigned long long* largest = carver.take<unsigned long long>(HEAD_WARPS);

  const Way way = begin_way<K>(carver, gain, core, d, bits, norm_threads, eps, unit);
  int group = blockIdx.x * HEAD_WARPS + warp;
  // What is asked for next: piece `span` of the rows of `wanted`.
  int wanted = group, span = 0;
  const unsigned char* from = weight + static_cast<long long>(group) * HEAD_ROWS * pitch;
  const auto move_on = [&](int& wanted, int& span, const unsigned char*& from) {
    if (++span == spans) {
      span = 0;
      wanted += stride;
      from += static_cast<long long>(stride) * HEAD_ROWS * pitch;
    }
  };
  const auto ask = [&](uint4* slot) {
    if (wanted < groups && span * SPAN + lane * COLUMNS < d) {
#pragma unroll
      for (int r = 0; r < HEAD_ROWS; r++) {
        if (wanted * HEAD_ROWS + r < rows) copy16(slot + r * WARP, from + r * pitch + span * 512 + lane * 16);
      }
    }
    commit_copies();
    move_on(wanted, span, from);
  };
#pragma unroll 1
  for (int i = 0; i < HEAD_SLOTS; i++) ask(slots + i * SLOT);
  const auto place_of = [&](int column) {
    const int c = column % SPAN;
    return ((column / SPAN * PIECES + c % COLUMNS / 4) * WARP + c / COLUMNS) * 4 + c % 4;
  };
  for (int i = d + threadIdx.x; i < spans * SPAN; i += blockDim.x) held[place_of(i)] = 0.0f;
  wait_for_all_but<HEAD_SLOTS>();
  __syncthreads();
  wait_for_producers();
  // Lines for the time that the memory would be idle.
  int next = wanted, its_span = span;
  const unsigned char* its_from = from;
#pragma unroll 1
  for (int i = 0; i < HEAD_AHEAD && next < groups; i++) {
    const int r = lane / 4, at = its_span * 512 + lane % 4 * 128;
    if (r < HEAD_ROWS && next * HEAD_ROWS + r < rows && at < pitch) prefetch_line(its_from + r * pitch + at);
    move_on(next, its_span, its_from);
  }
  normalize_and_turn<K>(residual, way, [&](int column, float y) { held[place_of(column)] = y; });
  __syncthreads();

  unsigned long long best = 0ull;
  int slot = 0;
#pragma unroll 1
  for (; group < groups; group += stride) {
    const int row = group * HEAD_ROWS + lane / 8;  // whose sum ends in this lane
    const float scale = weight_scale != nullptr && row < rows ? __ldg(weight_scale + row) : 1.0f;
    float acc[HEAD_ROWS] = {};
#pragma unroll 1
    for (int s = 0; s < spans; s++) {
      wait_for_all_but<HEAD_SLOTS - 1>();
      unsigned int words[HEAD_ROWS][4];
      uint4* place = slots + slot * SLOT;
#pragma unroll
      for (int r = 0; r < HEAD_ROWS; r++) {
        const uint4 read = place[r * WARP];
        words[r][0] = read.x;
        words[r][1] = read.y;
        words[r][2] = read.z;
        words[r][3] = read.w;
      }
      ask(place);
      slot = slot + 1 == HEAD_SLOTS ? 0 : slot + 1;
      if (s * SPAN + lane * COLUMNS < d) {
        const float4* columns = reinterpret_cast<const float4*>(held) + s * PIECES * WARP + lane;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
          const float4 v = columns[piece * WARP];
#pragma unroll
          for (int r = 0; r < HEAD_ROWS; r++) {
            float w[4];
            four_weights(words[r], piece, w, T());
            acc[r] = fmaf(v.x, w[0], acc[r]);
            acc[r] = fmaf(v.y, w[1], acc[r]);
            acc[r] = fmaf(v.z, w[2], acc[r]);
            acc[r] = fmaf(v.w, w[3], acc[r]);
          }
        }
      }
    }
    // Over the lanes, 16 apart first; lanes 8 r and on keep row r.
    const bool high = lane & 16, odd = lane & 8;
    const float sent_0 = high ? acc[0] : acc[2], sent_1 = high ? acc[1] : acc[3];
    const float two_0 = (high ? acc[2] : acc[0]) + __shfl_xor_sync(ALL_LANES, sent_0, 16);
    const float two_1 = (high ? acc[3] : acc[1]) + __shfl_xor_sync(ALL_LANES, sent_1, 16);
    float y = (odd ? two_1 : two_0) + __shfl_xor_sync(ALL_LANES, odd ? two_0 : two_1, 8);
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) y += __shfl_xor_sync(ALL_LANES, y, distance);
    if (weight_scale != nullptr) y *= scale;
    if (bias != nullptr && row < rows) y += bias[row];
    if (logits != nullptr && lane % 8 == 0 && row < rows) logits[row] = y;
    const unsigned long long key = row < limit ? key_of(y, row) : 0ull;
    best = key > best ? key : best;
  }
  if (token == nullptr) return;
  best = largest_of_warp(best);
  if (lane == 0) largest[warp] = best;
  __syncthreads();
  if (warp > 0) return;
  best = largest_of_warp(lane < HEAD_WARPS ? largest[lane] : 0ull);
  if (lane == 0) {
    atomicMax(found, best);
    __threadfence();
    if (atomicAdd(found + 1, 1ull) == gridDim.x - 1) {
      __threadfence();
      *token = index_of(atomicExch(found, 0ull));
      found[1] = 0ull;
    }
  }
}
