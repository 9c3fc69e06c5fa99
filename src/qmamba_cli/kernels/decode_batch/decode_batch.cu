// One token of one quantized block for many sequences, in five kernels (six for a dynamic conv input), chained by
// programmatic dependent launch.
//
//   batch_norm    residual += out_proj of the block before; RMSNorm -> int8
//   batch_in      in_proj -> x, z; causal conv + SiLU -> u; x_proj of the block's channels, added up over blocks
//   batch_conv    dynamic conv input only: the conv half of batch_in, after the scale of x is known
//   batch_scan    x_proj's sums -> int8 dt_low, B, C; dt_proj; scan step; gate; the H_HK half of the Hadamard transform
//   batch_rotate  the S_128 half -> int8
//   batch_out     out_proj, sums of parts of the channels
//
// Split    channels are numbered j hk + i for channel j + 128 i of the model, HK = hk = d_inner / 128; block j of the
//          weights' packs (decode/pack.py) owns the channels j hk ... j hk + hk - 1 and d_model / 128 rows of out_proj.
// Tokens   groups of `tokens` (32 or 64) rows; what follows from rows behind the last one is never read.
// int8     (groups, units of 64 columns, tokens, 64): decode_batch_product.cuh has the order of a unit's bytes.
// State    the kernels' own layouts, updated in place: the last three inputs of the convolution as the low bytes of a
//          word, oldest first, zeros before them, (groups, channels, tokens); scan state (groups, channels, tokens, 16)
//          int8 or float.
// Numerics int32 sums exact, int8 at the places of docs/numerics.md; other arithmetic fp32 with the reference's order
//          of rounding but for: the sum of squares, exp(x) = ex2.approx(x log2 e), SiLU's division (2 ulp), log1p as a
//          polynomial, the sum over 16 states, the rounding of an int8 state (one fma), and the Hadamard sums. Compiled
//          with -fmad=false. Same input, same bits: only integers are added atomically.
// Limits   those of decode.cu, but for the tokens.
// Source   ours; the block is Gu and Dao, "Mamba" (2023), figure 3.
#include "numerics.cuh"
#include "overlap.cuh"
#include "carver.cuh"
#include "decode_ptx.cuh"
#include "decode_turn.cuh"
#include "decode_weights.cuh"
#include "decode_parts.cuh"
#include "decode_wide_ptx.cuh"
#include "decode_batch_product.cuh"
#include "decode_batch_wide.cuh"
#include "decode_batch_scan.cuh"
#include "decode_batch_conv.cuh"

constexpr int NORM_THREADS = 512;
constexpr int NORM_VECTORS = 2;  // of four columns, a thread

// Grid: x: tokens. PARTS: the most parts that there are.
template <int PARTS>
__global__ void __launch_bounds__(NORM_THREADS)
    batch_norm(float* residual,         // (batch, d_model), added to
               const int* sums,         // (groups, parts, tokens, rows) of batch_out, or null
               const float* row_scale,  // (rows,) of out_proj of the block before
               const float* row_bias,   // (rows,)
               signed char* codes,      // (groups, spans, tokens, 64) out, or null
               float eps, float inv_scale, int tokens, int d_model, int spans, int rows, int parts) {
  extern __shared__ __align__(16) unsigned char shared[];
  float* partial = reinterpret_cast<float*>(shared);
  release_dependents();
  const int group = static_cast<int>(blockIdx.x) / tokens, token = static_cast<int>(blockIdx.x) % tokens;
  float4* row = reinterpret_cast<float4*>(residual + static_cast<int>(blockIdx.x) * d_model);
  const int4* from = reinterpret_cast<const int4*>(sums + (group * parts * tokens + token) * rows);
  const float4* scales = reinterpret_cast<const float4*>(row_scale);
  const float4* biases = reinterpret_cast<const float4*>(row_bias);
  float4 kept[NORM_VECTORS];
  float sum = 0.0f;
  wait_for_producers();
#pragma unroll
  for (int i = 0; i < NORM_VECTORS; i++) {
    const int at = threadIdx.x + i * NORM_THREADS;
    if (at < d_model / 4) kept[i] = load_fresh(row + at);
  }
#pragma unroll
  for (int i = 0; i < NORM_VECTORS; i++) {
    const int at = threadIdx.x + i * NORM_THREADS;
    if (at >= d_model / 4) break;
    float4& x = kept[i];
    if (sums != nullptr) {
      // All on their way before one is waited for.
      int4 of_part[PARTS];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        of_part[part] = part < parts ? load_fresh(from + part * tokens * (rows / 4) + at) : make_int4(0, 0, 0, 0);
      }
      const float4 scale = scales[at], bias = biases[at];
      int4 total = of_part[0];
#pragma unroll
      for (int part = 1; part < PARTS; part++) {
        total.x += of_part[part].x;
        total.y += of_part[part].y;
        total.z += of_part[part].z;
        total.w += of_part[part].w;
      }
      x.x = x.x + (static_cast<float>(total.x) * scale.x + bias.x);
      x.y = x.y + (static_cast<float>(total.y) * scale.y + bias.y);
      x.z = x.z + (static_cast<float>(total.z) * scale.z + bias.z);
      x.w = x.w + (static_cast<float>(total.w) * scale.w + bias.w);
      row[at] = x;
    }
    sum = add_square(sum, x);
  }
  if (codes == nullptr) return;
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = sum;
  __syncthreads();
  sum = warp_sum(static_cast<int>(threadIdx.x % WARP) < NORM_THREADS / WARP ? partial[threadIdx.x % WARP] : 0.0f);
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(d_model) + eps);
#pragma unroll
  for (int i = 0; i < NORM_VECTORS; i++) {
    const int column = 4 * (threadIdx.x + i * NORM_THREADS);
    if (column >= d_model) break;
    signed char* to = codes + ((group * spans + column / 64) * tokens + token) * 64 + place_of_column(column % 64);
    *reinterpret_cast<unsigned int*>(to) = quantized_four(kept[i], factor, inv_scale);
  }
}

// Grid: x: 128 blocks, y: groups of tokens. `tiles` of 16 rows at a time.
template <int BITS, int SHARES>
__global__ void __launch_bounds__(block_threads(SHARES), 1)
    batch_in(const signed char* codes,    // (groups, spans, tokens, 64)
             const uint4* weight,         // as for decode_in
             const uint4* multipliers,    // as for decode_in
             const uint4* constants,      // (128, 8, hk) words, as for decode_in
             const uint4* x_weight,       // (128, hk / 4, x_rows) words of four channels
             unsigned int* history,       // (groups, 128 hk, tokens)
             int* x_sums,                 // (groups, X_COPIES, x_rows, tokens), added to; not for a dynamic input
             float* u,                    // (groups, 128 hk, tokens) out
             float* gate,                 // (groups, 128 hk, tokens) out
             float* x_out,                // (groups, 128 hk, tokens) out; dynamic input only, else null
             float* x_absmax,             // (groups, 128, tokens) out; dynamic input only
             float inv_xz_scale, float z_scale, int true_u, int tokens, int hk, int x_rows,
             int units, int fine, int tiles, int room) {
  extern __shared__ __align__(16) unsigned char shared[];
  STAMP(0, 0)
  release_dependents();
  constexpr int SPANS = BITS == 8 ? 1 : 2, TOKENS = SHARES * WARP_TOKENS, FOURS = TOKENS / 4;
  constexpr int PARTS = THREADS / WARP / (SIDES * SHARES);
  const int rows = 2 * hk, all_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const int multiplier_bytes = all_tiles * units * (fine ? 4 : 1) * TILE_ROWS;
  const int block = blockIdx.x, group = blockIdx.y;
  const bool dynamic = x_out != nullptr;
  Carver carver{shared};
  float* shared_constants = carver.take<float>(IN_CONSTANTS * hk);
  unsigned int* past = carver.take<unsigned int>(hk * TOKENS);
  signed char* own_codes = carver.take<signed char>(TOKENS * hk);
  unsigned int* absmax = carver.take<unsigned int>(TOKENS);
  float* inverse = carver.take<float>(hk);  // of u's scales
  unsigned int* shared_x_weight = carver.take<unsigned int>(hk / 4 * x_pitch(x_rows));
  unsigned char* shared_multipliers = carver.take<unsigned char>(BITS == 4 ? multiplier_bytes : 0);

  const TiledRows of_block{rows, units};
  Factors factors = carve_factors<BITS, SHARES>(carver, tiles, room);
  int* partial = reinterpret_cast<int*>(factors.weights);
  factors.weight = weight + static_cast<long long>(block) * rows * units * ROW_PIECES;
  factors.codes = reinterpret_cast<const uint4*>(codes) + group * units * SPANS * TOKENS * ROW_PIECES;
  factors.multipliers = shared_multipliers;
  factors.spans = units * SPANS;
  factors.fine = fine;
  copy_block(shared_constants, reinterpret_cast<const char*>(constants) + block * (IN_CONSTANTS * 4 * hk),
             IN_CONSTANTS * 4 * hk);
  if (!dynamic) copy_x_weight(shared_x_weight, x_weight, x_rows, hk);
  if (BITS == 4) copy_line(shared_multipliers, multipliers, block, multiplier_bytes);
  commit_copies();
  for (int i = threadIdx.x; i < TOKENS; i += blockDim.x) absmax[i] = 0u;
  const float *row_scale = shared_constants, *row_bias = row_scale + rows, *conv_scale = row_bias + rows + hk;
  const float *conv_bias = conv_scale + hk, *u_scale = conv_bias + hk;
  const int* conv_taps = reinterpret_cast<const int*>(row_bias + rows);
  const int at = (group * BLOCKS + block) * hk * TOKENS;

  for (int first_tile = 0; first_tile < all_tiles; first_tile += tiles) {
    factors.first_row = first_tile * TILE_ROWS;
    factors.tiles = min(tiles, all_tiles - first_tile);
    run_product<BITS, SHARES, true>(factors, of_block, partial, [&] {
      if (first_tile == 0) {
        for (int i = threadIdx.x; i < hk; i += blockDim.x) inverse[i] = __frcp_rn(u_scale[i]);
        STAMP(0, 1)
        wait_for_producers();
        STAMP(0, 2)
        if (!dynamic) copy_block(past, history + at, hk * TOKENS * 4);
      }
    });
    STAMP(0, 3)
    for (int i = threadIdx.x; i < factors.tiles * TILE_ROWS * FOURS; i += blockDim.x) {
      const int row = factors.first_row + i / FOURS, token = i % FOURS * 4;
      if (row >= rows) break;
      const int4 sum = sums_of<shift_of(BITS, SHARES)>(partial + i / FOURS * pitch_of_rows(TOKENS) + token, PARTS,
                                                       factors.tiles * TILE_ROWS * pitch_of_rows(TOKENS));
      const float scale = row_scale[row], bias = row_bias[row];
      float value[4] = {static_cast<float>(sum.x) * scale + bias, static_cast<float>(sum.y) * scale + bias,
                        static_cast<float>(sum.z) * scale + bias, static_cast<float>(sum.w) * scale + bias};
      const int channel = row < hk ? row : row - hk;
      const int to = at + channel * TOKENS + token;
      if (row >= hk) {
#pragma unroll
        for (int k = 0; k < 4; k++) value[k] = fast_silu(qm_dequantize(qm_quantize(value[k], inv_xz_scale), z_scale));
        *reinterpret_cast<float4*>(gate + to) = make_float4(value[0], value[1], value[2], value[3]);
      } else if (dynamic) {
        *reinterpret_cast<float4*>(x_out + to) = make_float4(value[0], value[1], value[2], value[3]);
        // Of floats >= 0, the order of their bits.
#pragma unroll
        for (int k = 0; k < 4; k++) atomicMax(absmax + token + k, qm_to_bits(fabsf(value[k])));
      } else {
        const uint4 before = *reinterpret_cast<const uint4*>(past + channel * TOKENS + token);
        unsigned int word[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          word[k] |= static_cast<unsigned int>(static_cast<unsigned char>(qm_quantize(value[k], inv_xz_scale))) << 24;
          const float conv = static_cast<float>(__dp4a(static_cast<int>(word[k]), conv_taps[channel], 0));
          value[k] = u_of(conv * conv_scale[channel] + conv_bias[channel], u_scale[channel], inverse[channel], true_u,
                          own_codes + (token + k) * hk + channel);
        }
        *reinterpret_cast<uint4*>(history + to) = make_uint4(word[0] >> 8, word[1] >> 8, word[2] >> 8, word[3] >> 8);
        *reinterpret_cast<float4*>(u + to) = make_float4(value[0], value[1], value[2], value[3]);
      }
    }
    __syncthreads();
    STAMP(0, 4)
  }
  if (dynamic) {
    for (int i = threadIdx.x; i < TOKENS; i += blockDim.x) {
      x_absmax[(group * BLOCKS + block) * TOKENS + i] = qm_from_bits(absmax[i]);
    }
  } else {
    add_x(x_sums, own_codes, shared_x_weight, TOKENS, hk, x_rows);
  }
  STAMP(0, 5)
}

// Grid: x: hk by sixteens of tokens, y: groups of tokens; 128 threads.
__global__ void __launch_bounds__(BLOCKS)
    batch_rotate(const float* y,      // (groups, hk, 128, tokens)
                 signed char* codes,  // (groups, 2 hk units, tokens, 64) out
                 int* x_sums,         // cleared for the next block
                 float factor,        // steps a unit of the sum
                 int sums, int tokens, int sixteens, int hk) {
  extern __shared__ __align__(16) unsigned char shared[];
  release_dependents();
  float* scratch = reinterpret_cast<float*>(shared);  // (136, 16): 16 floats after every 16 rows
  const int i = static_cast<int>(blockIdx.x) / sixteens, group = blockIdx.y;
  const int token = threadIdx.x % SCAN_TOKENS, part = threadIdx.x / SCAN_TOKENS;
  const int own = static_cast<int>(blockIdx.x) % sixteens * SCAN_TOKENS + token;
  auto place = [](int j) { return (j + j / 16) * SCAN_TOKENS; };
  wait_for_producers();
  float v[16];
#pragma unroll
  for (int k = 0; k < 16; k++) v[k] = load_fresh(y + ((group * hk + i) * BLOCKS + part + 8 * k) * tokens + own);
  const int blocks = gridDim.x * gridDim.y;
  for (int at = (static_cast<int>(blockIdx.y) * gridDim.x + blockIdx.x) * BLOCKS + threadIdx.x; at < sums;
       at += blocks * BLOCKS) {
    x_sums[at] = 0;
  }
  sylvester<16>(v);
#pragma unroll
  for (int k = 0; k < 16; k++) scratch[place(part + 8 * k) + token] = v[k];
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int first = 8 * (2 * part + half);
    float eight[8];
#pragma unroll
    for (int k = 0; k < 8; k++) eight[k] = scratch[place(first + k) + token];
    sylvester<8>(eight);
    unsigned int words[2] = {};
#pragma unroll
    for (int k = 0; k < 8; k++) {
      words[k / 4] |= static_cast<unsigned int>(static_cast<unsigned char>(qm_round_saturate(eight[k] * factor)))
                      << (8 * (k % 4));
    }
    const int unit = (group * hk + i) * 2 + first / 64;
    *reinterpret_cast<uint2*>(codes + (unit * tokens + own) * 64 + place_of_column(first % 64)) =
        make_uint2(words[0], words[1]);
  }
}

// Grid: x: groups of `packs` blocks of rows by `parts` of the columns, y: groups of tokens.
// The bound on threads leaves registers for blocks of batch_norm beside a wide product's.
template <int BITS, int SHARES>
__global__ void __launch_bounds__(block_threads(SHARES) + (is_wide(SHARES) ? 128 : 0), 1)
    batch_out(const signed char* codes,  // (groups, spans, tokens, 64)
              const uint4* weight,       // as for decode_out
              const uint4* multipliers,  // as for decode_out
              int* sums,                 // (groups, parts, tokens, 128 rows) out
              int tokens, int rows, int units, int fine, int packs, int parts, int room) {
  extern __shared__ __align__(16) unsigned char shared[];
  STAMP(4, 0)
  release_dependents();
  constexpr int SPANS = BITS == 8 ? 1 : 2, TOKENS = SHARES * WARP_TOKENS;
  constexpr int COLUMN_PARTS = THREADS / WARP / (SIDES * SHARES);
  const int group = blockIdx.y, part = static_cast<int>(blockIdx.x) % parts;
  const int pack_group = static_cast<int>(blockIdx.x) / parts, all_rows = packs * rows;
  const int multiplier_bytes = packs * ((rows + TILE_ROWS - 1) / TILE_ROWS) * units * (fine ? 4 : 1) * TILE_ROWS;
  const int tiles = (all_rows + TILE_ROWS - 1) / TILE_ROWS;
  Carver carver{shared};
  unsigned char* shared_multipliers = carver.take<unsigned char>(BITS == 4 ? multiplier_bytes : 0);
  const int spans = units * SPANS;
  Factors factors = carve_factors<BITS, SHARES>(carver, tiles, room);
  int* partial = reinterpret_cast<int*>(factors.weights);
  factors.weight = weight + static_cast<long long>(pack_group) * all_rows * units * ROW_PIECES;
  factors.codes = reinterpret_cast<const uint4*>(codes) + group * spans * TOKENS * ROW_PIECES;
  factors.multipliers = shared_multipliers;
  // Whole units, which a wide product unpacks at a time.
  factors.first_span = part * units / parts * SPANS;
  factors.spans = (part + 1) * units / parts * SPANS - factors.first_span;
  factors.fine = fine;
  if (BITS == 4) copy_line(shared_multipliers, multipliers, pack_group, multiplier_bytes);
  commit_copies();
  run_product<BITS, SHARES, false>(factors, BlockRows{all_rows, units, rows}, partial, [&] {
    STAMP(4, 1)
    wait_for_producers();
    STAMP(4, 2)
  });
  STAMP(4, 3)
  const int fours = (all_rows + 3) / 4, pitch = pitch_of_tokens(tiles);
  for (int i = threadIdx.x; i < TOKENS * fours; i += blockDim.x) {
    const int token = i / fours, row = i % fours * 4;
    const int4 sum = sums_of<shift_of(BITS, SHARES)>(partial + token * pitch + row, COLUMN_PARTS, TOKENS * pitch);
    int* to = sums + ((group * parts + part) * TOKENS + token) * BLOCKS * rows + pack_group * all_rows + row;
    if (all_rows % 4 == 0) {
      *reinterpret_cast<int4*>(to) = sum;
    } else {
      const int each[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (row + k < all_rows) to[k] = each[k];
      }
    }
  }
  STAMP(4, 4)
}
