// One token of one quantized block for up to 8 sequences, in three kernels (four or five for dynamic conv input or
// several sequences), chained by programmatic dependent launch.
//
//   decode_in      (one token: residual + what decode_out_columns left;) RMSNorm -> int8, in_proj -> x, z; causal
//                  conv + SiLU -> u; x_proj, the part of these channels
//   decode_conv    dynamic conv input, where decode_in's blocks cannot meet: its conv and x_proj half
//   decode_scan    x_proj summed -> int8 dt_low, B, C; dt_proj; scan step; gate; the H_HK half of the Hadamard transform
//   decode_rotate  several tokens only: the S_128 half -> int8
//   decode_out     (one or two tokens: the S_128 half -> int8;) out_proj; residual +=
//   decode_out_columns  the same of one token, but for the last block of a model: out_proj's sums, which the next
//                  block's decode_in adds to what it reads of the residual, and its decode_scan to the residual
//
// Split    128 blocks; block j owns the channels j + 128 i, i < HK = d_inner / 128, in every kernel: 2 HK rows of
//          in_proj, HK columns of x_proj, HK rows of dt_proj, 16 HK states; and ceil(d_model / 128) rows of out_proj.
//          H_n = H_HK (x) S_128, so H_HK stays in a block. Only the sums of x_proj, y and the residual cross blocks.
//          decode_out_columns: a block owns the 128 channels of one i, which are one vector of S_128, so that none is
//          turned more often than rows are split; its products are added to out_proj's sums.
// Weights  packed by (block, unit, row): pack.py. Every kernel copies its weights to shared memory before it waits
//          for the kernels before it, so HBM streams while the chain of small steps runs.
// State    the references' own layouts, updated in place: conv history (tokens, d_inner, taps - 1) int8, scan state
//          (tokens, d_inner, 16) int8 or float.
// Turns    decode_turn.cuh: by the end of the kernel before or, sooner, by the count of its finished blocks.
// Numerics int32 sums exact, int8 at the places of docs/numerics.md; other arithmetic fp32 with the reference's
//          order of rounding but for: the sum of squares, expf and log1pf (CUDA's), exp(x) = ex2.approx(x log2 e),
//          the sum over 16 states, and the Hadamard sums. Compiled with -fmad=false. Same input, same bits:
//          only integers are added atomically.
// Limits   tokens <= 8, 16 states, HK a multiple of 4 up to 64, d_model a multiple of 64 up to 4096, dt_rank <= 256,
//          2 to 4 taps.
// Source   ours; the block is Gu and Dao, "Mamba" (2023), figure 3.
#include "numerics.cuh"
#include "overlap.cuh"
#include "carver.cuh"
#include "decode_ptx.cuh"
#include "decode_turn.cuh"
#include "decode_weights.cuh"
#include "decode_parts.cuh"
#include "decode_conv.cuh"
#include "decode_columns.cuh"
#include "decode_scan.cuh"
#include "decode_unpack.cuh"

// Two blocks a multiprocessor: decode_in's beside decode_out's of the layer before fits in its registers.
constexpr int IN_THREADS = 640;
constexpr int OUT_THREADS = 512;
// What becomes of x in decode_in. STATIC: its scale is given. Else it is the token's, which takes all blocks: HANDED_ON
// to decode_conv; or MET, the blocks wait for each other's largest values, for which all must run at the same time.
constexpr int STATIC = 0, HANDED_ON = 1, MET = 2;

// Grid: 128 blocks of tiles * splits warps at least, tiles = ceil(2 HK / 16): warp w multiplies the 16 rows of tile
// w / splits with part w % splits of the columns.
template <int BITS, int INPUT>
__global__ void __launch_bounds__(IN_THREADS, 2)
    decode_in(const float* residual,           // (tokens, d_model)
              const float* squares,            // (tokens, 128) of decode_out, or null
              const int* out_sums,             // (d_model,) of decode_out_columns, to be added to one token; or null
              const float* out_constants,      // (128, 2, out_rows) of the block before
              const uint4* weight,             // (128, tiles, units, 16 rows, 64 bytes)
              const uint4* multipliers,        // (128, tiles, units, 1 or 4, 16) bytes; null for W8
              const uint4* constants,          // (128, 8, hk) words
              const uint4* x_weight,           // (128, hk / 4, x_rows) words of 4 channels
              signed char* history,            // (tokens, d_inner, taps - 1)
              float* u_gate,                   // (tokens, 128, 2, hk) out
              int* x_sums,                     // (copies, tokens, x_rows), added to; static input only
              float* x_out,                    // (tokens, 128, hk) out; HANDED_ON only
              float* x_absmax,                 // (tokens, 128) out; dynamic input only, for MET UNTOLD before
              const float* history_scale,      // (tokens, taps - 1); MET only
              const int* before, int* mine,    // counters
              float eps, float inv_in_scale,   // of the norm's output
              float inv_xz_scale, float z_scale, int true_u, int tokens, int d_model,
              int hk, int taps, int x_rows, int copies, int units, int fine, int splits, int room, int slice, int under_way,
              int out_rows, int full, int late) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Turn turn{before, full, mine, late};
  STAMP(0, 0)
  announce(turn);
  const int warp = threadIdx.x / WARP;
  const int rows = 2 * hk, tiles = (rows + 15) / 16;
  constexpr int UNIT = BITS == 8 ? 64 : 128;
  const int stride = units * UNIT + 32, multiplier_bytes = tiles * units * (fine ? 4 : 1) * 16;
  Carver carver{shared};
  uint4* slots = carver.take<uint4>(tiles * splits * room * 64);
  unsigned char* shared_multipliers = carver.take<unsigned char>(BITS == 4 ? multiplier_bytes : 0);
  unsigned int* shared_x_weight = carver.take<unsigned int>(INPUT == HANDED_ON ? 0 : hk / 4 * x_rows);
  float* shared_constants = carver.take<float>(IN_CONSTANTS * hk);
  signed char* codes = carver.take<signed char>(tokens * stride);
  int* totals = carver.take<int>(tokens * rows);
  signed char* u_codes = carver.take<signed char>(tokens * hk);
  float* partial = carver.take<float>(WARP);
  unsigned int* absmax = carver.take<unsigned int>(8);
  float* scales = carver.take<float>(INPUT == MET ? 4 * tokens : 0);

  const int d_inner = hk * BLOCKS;
  auto history_of = [&](int token, int i) {
    return history + (static_cast<long long>(token) * d_inner + blockIdx.x + BLOCKS * i) * (taps - 1);
  };
  // Of a static input whole warps take x, others z; else a token's x and z follow each other.
  constexpr bool APART = INPUT == STATIC;
  const int own_token = threadIdx.x / (APART ? hk : rows), own_channel = threadIdx.x - own_token * (APART ? hk : rows);
  const bool owns_history = INPUT != HANDED_ON && own_token < tokens && own_channel < hk;
  // Before the weights, behind which it would queue.
  if (APART && owns_history) prefetch_line(history_of(own_token, own_channel));
  // Constants and weights, before anything of the kernels before is needed.
  if constexpr (BITS == 4) {
    copy_block(shared_multipliers, reinterpret_cast<const char*>(multipliers) + blockIdx.x * multiplier_bytes,
               multiplier_bytes);
  }
  if constexpr (INPUT != HANDED_ON) {
    copy_block(shared_x_weight, reinterpret_cast<const char*>(x_weight) + blockIdx.x * (hk * x_rows), hk * x_rows);
  }
  copy_block(shared_constants, reinterpret_cast<const char*>(constants) + blockIdx.x * (IN_CONSTANTS * 4 * hk),
             IN_CONSTANTS * 4 * hk);
  commit_copies();
  const int tile = warp / splits, split = warp - tile * splits;
  const int first_unit = split * units / splits;
  Stream stream;
  stream.pieces = min(16, rows - tile * 16) * 4;
  stream.count = tile < tiles ? (split + 1) * units / splits - first_unit : 0;
  stream.room = room;
  stream.slots = slots + warp * room * 64;
  stream.from = weight + (static_cast<long long>(blockIdx.x) * rows + tile * 16) * units * 4 +
                first_unit * stream.pieces;
  begin_stream<2>(stream, slice, under_way);
  for (int i = threadIdx.x; i < tokens * rows; i += blockDim.x) totals[i] = 0;
  if (threadIdx.x < 8) absmax[threadIdx.x] = 0u;
  // Columns behind the last one are zero in the weight and must be finite here.
  for (int i = threadIdx.x; i < tokens * (stride - d_model); i += blockDim.x) {
    const int token = i / (stride - d_model);
    codes[token * stride + d_model + i - token * (stride - d_model)] = 0;
  }
  if (!APART && owns_history) prefetch_line(history_of(own_token, own_channel));
  const NormShare share = norm_share(tokens, d_model);
  const float4* norm_row = reinterpret_cast<const float4*>(residual) + share.token * (d_model / 4);
  const Pending pending{out_sums, out_constants, out_rows};
  // Of one token a thread has one vector at most: plan.py.
  const bool settles = out_sums != nullptr && share.first < share.vectors;
  const FourConstants four = constants_of_four(pending, share.first, settles);

  await_turn(turn);
  STAMP(0, 1)
  Kept kept = fetch_residual(norm_row, share);
  if (settles) settle_four(kept.vectors[0], pending, share.first, four);
  normalize(norm_row, kept, squares, share, codes, partial, tokens, d_model, stride, eps, inv_in_scale);
  History past = fetch_history(history_of(own_token, own_channel), taps, owns_history);
  STAMP(0, 2)
  wait_for_copies();
  __syncthreads();
  STAMP(0, 3)
  if (tile < tiles) {
    const Multipliers groups{shared_multipliers + tile * units * (fine ? 4 : 1) * 16, units, fine};
    multiply_stream<BITS, 1>(stream, Activations{codes, stride, tokens}, groups, first_unit, totals + tile * 16, rows);
  }
  __syncthreads();
  STAMP(0, 4)

  const float *row_scale = shared_constants, *row_bias = row_scale + rows, *conv_scale = row_bias + rows + hk;
  const float* conv_bias = conv_scale + hk;
  const int* conv_taps = reinterpret_cast<const int*>(row_bias + rows);
  const UGrid grid{conv_bias + hk, true_u};
  unsigned int largest = 0u;  // of floats >= 0, the order of their bits
  const int channels = tokens * hk, first_z = (channels + WARP - 1) / WARP * WARP;
  for (int item = threadIdx.x; item < (APART ? first_z + channels : tokens * rows); item += blockDim.x) {
    const int index = APART && item >= first_z ? item - first_z : item;
    if (APART && index >= channels) continue;
    const int token = token_of(index, APART ? hk : rows, tokens);
    const int row = APART ? index - token * hk + (item >= first_z ? hk : 0) : index - token * rows;
    const float value = static_cast<float>(totals[token * rows + row]) * row_scale[row] + row_bias[row];
    if (row >= hk) {
      const float z = qm_dequantize(qm_quantize(value, inv_xz_scale), z_scale);
      u_gate[(token * BLOCKS + blockIdx.x) * 2 * hk + row] = qm_silu(z);
    } else if constexpr (INPUT != STATIC) {
      if constexpr (INPUT == MET) {
        totals[token * rows + row] = static_cast<int>(qm_to_bits(value));  // its own sum's place
      } else {
        x_out[(token * BLOCKS + blockIdx.x) * hk + row] = value;
      }
      const unsigned int size = qm_to_bits(fabsf(value));
      if (tokens == 1) {
        largest = max(largest, size);
      } else {
        atomicMax(absmax + token, size);
      }
    } else {
      if (item != static_cast<int>(threadIdx.x)) past = fetch_history(history_of(token, row), taps);
      const unsigned int code = static_cast<unsigned char>(qm_quantize(value, inv_xz_scale));
      const unsigned int word = word_of(past, taps) | code << 24;
      store_history(history_of(token, row), word, taps);
      const float sum = static_cast<float>(__dp4a(static_cast<int>(word), conv_taps[row], 0));
      hand_on_u(sum * conv_scale[row] + conv_bias[row], grid, u_codes, u_gate, token, row, hk);
    }
  }
  if (INPUT != STATIC && tokens == 1) {
    largest = __reduce_max_sync(ALL_LANES, largest);
    if (threadIdx.x % WARP == 0) atomicMax(absmax, largest);
  }
  __syncthreads();
  if constexpr (INPUT == MET) {
    const int lane = threadIdx.x % WARP;
    for (int token = warp; token < tokens; token += blockDim.x / WARP) {
      const float older = lane < taps - 1 ? load_fresh(history_scale + token * (taps - 1) + lane) : 0.0f;
      const float newest = met_scale(x_absmax + token * BLOCKS, qm_from_bits(absmax[token]));
      store_scales(scales + token * 4, newest, older, taps);
    }
    __syncthreads();
    const DynamicConv conv{scales, conv_taps, conv_scale, conv_bias, taps};
    for (int item = threadIdx.x; item < tokens * rows; item += blockDim.x) {
      const int token = token_of(item, rows, tokens), i = item - token * rows;
      if (i >= hk) continue;
      if (item != static_cast<int>(threadIdx.x)) past = fetch_history(history_of(token, i), taps);
      const float value = qm_from_bits(static_cast<unsigned int>(totals[token * rows + i]));
      hand_on_u(convolved(conv, past, history_of(token, i), value, token, i), grid, u_codes, u_gate, token, i, hk);
    }
    __syncthreads();
  }
  STAMP(0, 5)
  if constexpr (INPUT == HANDED_ON) {
    if (threadIdx.x < tokens) x_absmax[threadIdx.x * BLOCKS + blockIdx.x] = qm_from_bits(absmax[threadIdx.x]);
  } else {
    int* copy = x_sums + static_cast<int>(blockIdx.x) % copies * (tokens * x_rows);
    project(shared_x_weight, u_codes, copy, tokens, hk, x_rows);
  }
  STAMP(0, 6)
  hand_on(turn);
  STAMP(0, 7)
  end_turn(turn);
}

// Grid: x: groups of `width` channels a block, y: tokens; 128 threads.
__global__ void __launch_bounds__(BLOCKS)
    decode_rotate(const float* y,      // (tokens, hk, 128)
                  signed char* codes,  // (tokens, d_inner) out
                  const int* before, int* mine,  // counters
                  float factor,        // steps a unit of the sum
                  int hk, int width, int full, int late) {
  const Turn turn{before, full, mine, late};
  STAMP(3, 0)
  announce(turn);
  const int first = blockIdx.x * width, d_inner = hk * BLOCKS;
  await_turn(turn);
  STAMP(3, 1)
  rotate_vectors<2>(y + blockIdx.y * d_inner, codes + blockIdx.y * d_inner, first + threadIdx.x / WARP,
                    blockDim.x / WARP, min(first + width, hk), factor);
  STAMP(3, 2)
  hand_on(turn);
  STAMP(3, 3)
  end_turn(turn);
}

// Grid: 128 blocks; warp w multiplies all rows of the block with part w of the columns.
// ROTATE: y is turned here, by every block; else `codes` holds the turned tokens.
template <int BITS, bool ROTATE>
__global__ void __launch_bounds__(OUT_THREADS, 2)
    decode_out(const float* y,            // (tokens, hk, 128); ROTATE only
               const signed char* codes,  // (tokens, d_inner); not ROTATE
               const uint4* weight,       // (128, units, rows, 64 bytes)
               const uint4* multipliers,  // (128, tiles, units, 1 or 4, 16) bytes; null for W8
               const float* constants,    // (128, 2, rows): row scale, row bias
               float* residual,           // (tokens, d_model), added to
               float* squares,            // (tokens, 128) out: this block's share of the sum of squares; or null
               int* x_sums,               // cleared for the next layer
               float* x_absmax,           // (tokens, 128) to be UNTOLD for the next layer, or null
               const int* before, int* mine,  // counters
               int sums, float factor, int tokens, int d_model, int hk, int rows, int units, int fine, int room,
               int slice, int full, int late) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Turn turn{before, full, mine, late};
  STAMP(4, 0)
  announce(turn);
  const int warp = threadIdx.x / WARP, splits = blockDim.x / WARP;
  const int d_inner = hk * BLOCKS, stride = d_inner + 32, tiles = (rows + 15) / 16;
  const int multiplier_bytes = tiles * units * (fine ? 4 : 1) * 16;
  Carver carver{shared};
  uint4* slots = carver.take<uint4>(splits * room * rows * 4);
  unsigned char* shared_multipliers = carver.take<unsigned char>(BITS == 4 ? multiplier_bytes : 0);
  signed char* shared_codes = carver.take<signed char>(tokens * stride);
  int* totals = carver.take<int>(tokens * rows);

  if constexpr (BITS == 4) {
    copy_block(shared_multipliers, reinterpret_cast<const char*>(multipliers) + blockIdx.x * multiplier_bytes,
               multiplier_bytes);
  }
  const int first_unit = warp * units / splits;
  Stream stream;
  stream.pieces = rows * 4;
  stream.count = (warp + 1) * units / splits - first_unit;
  stream.room = room;
  stream.slots = slots + warp * room * stream.pieces;
  stream.from = weight + (static_cast<long long>(blockIdx.x) * units + first_unit) * stream.pieces;
  begin_stream<4>(stream, slice, 2);
  for (int i = threadIdx.x; i < tokens * rows; i += blockDim.x) totals[i] = 0;
  const int own_token = threadIdx.x / rows, own_row = threadIdx.x - own_token * rows;
  const int own_column = blockIdx.x * rows + own_row;
  const bool owns = own_token < tokens && own_column < d_model;
  const float own_scale = owns ? constants[blockIdx.x * 2 * rows + own_row] : 0.0f;
  const float own_bias = owns ? constants[(blockIdx.x * 2 + 1) * rows + own_row] : 0.0f;

  await_turn(turn);
  STAMP(4, 1)
  const float old = owns ? load_fresh(residual + own_token * d_model + own_column) : 0.0f;
  for (int token = 0; token < tokens; token++) {
    if constexpr (ROTATE) {
      rotate_vectors<3>(y + token * d_inner, shared_codes + token * stride, warp, splits, hk, factor);
    } else {
      copy_block(shared_codes + token * stride, codes + token * d_inner, d_inner);
    }
  }
  STAMP(4, 2)
  wait_for_copies();
  __syncthreads();
  STAMP(4, 3)
  const Multipliers groups{shared_multipliers, units, fine};
  multiply_stream<BITS, 2>(stream, Activations{shared_codes, stride, tokens}, groups, first_unit, totals, rows);
  __syncthreads();
  STAMP(4, 4)
  float value = 0.0f;
  if (owns) {
    value = old + (static_cast<float>(totals[threadIdx.x]) * own_scale + own_bias);
    residual[own_token * d_model + own_column] = value;
  }
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < sums; i += BLOCKS * blockDim.x) x_sums[i] = 0;
  if (x_absmax != nullptr && static_cast<int>(threadIdx.x) < tokens) {
    x_absmax[threadIdx.x * BLOCKS + blockIdx.x] = qm_from_bits(UNTOLD);
  }
  if (squares != nullptr) {
    float* of_rows = reinterpret_cast<float*>(totals);
    if (own_token < tokens) of_rows[threadIdx.x] = value * value;
    __syncthreads();
    if (threadIdx.x < tokens) {
      float sum = 0.0f;
#pragma unroll 4
      for (int row = 0; row < rows; row++) sum += of_rows[threadIdx.x * rows + row];
      squares[threadIdx.x * BLOCKS + blockIdx.x] = sum;
    }
  }
  STAMP(4, 5)
  hand_on(turn);
  STAMP(4, 6)
  end_turn(turn);
}
