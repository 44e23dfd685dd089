// What the vectorised code offers, one table per instruction set. The files of this folder are
// compiled once for each, in namespace medusa::cpu::MEDUSA_ISA, and reached through these pointers
// only. They use no templates or inline functions from outside their namespace: the linker keeps
// one copy of such code for the whole program, and it could be the one that needs AVX-512.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "medusa/tensor.h"

namespace medusa::cpu {

constexpr int kColumns = 32;      // outputs of one block of a packed weight
constexpr int kTileQueries = 16;  // (row, head) pairs of one attention tile
constexpr int kPage = 64;         // tokens of a page of the cache
constexpr int kMaxAncestorWords = 4;
constexpr float kGreatestNoise = 22.89f;  // kMaxGumbel of noise.h
constexpr float kMassRange =
    23.0f;  // a score as far below the greatest has no mass: 2^32 e^-23 < 1/2

struct Span {  // [first, last)
  int64_t first, last;
};

// Blocks [first_block, last_block) of 32 outputs for rows [0, num_rows); see linear.cpp and
// block_linear.cpp.
struct LinearTask {
  DType dtype;         // of the weight
  const void* weight;  // packed, all N outputs
  const void* x;       // [num_rows, K], each tile of rows as arrange_rows left it
  const float* bias;   // [N] or null
  float* out;          // [num_rows, N]
  bool accumulate;
  int64_t num_rows, num_inputs, num_outputs;
  int64_t first_block, last_block;
  // What may be fetched ahead: the weights before `fetch_end`, then those at `fetch_next` (null:
  // unknown), which this thread reads after them.
  const void *fetch_end, *fetch_next;
};

// Up to kTileQueries queries of one sequence and one kv head; see attention.cpp.
struct AttentionTile {
  DType dtype;  // of the cache
  int num_queries, head_dim;
  float scale;
  const void* q[kTileQueries];  // [D] bf16 for a bf16 cache, else f32
  void* out[kTileQueries];      // [D]
  bool out_bf16;
  int first[kTileQueries];  // first visible logical position
  int prefix_len[kTileQueries];
  int position[kTileQueries];               // the query's own, and last visible, logical position
  const uint64_t* ancestors[kTileQueries];  // [kMaxAncestorWords]
  const void* const* k_pages;  // [num_pages] block of this head; null where no query sees a slot
  const void* const* v_pages;
  int num_pages;
  float* scores;         // scratch [num_queries][score_stride]
  int64_t score_stride;  // >= num_pages * 64
  float* totals;         // scratch [num_queries]: sums of the weights
  float* values;         // scratch [num_queries][D rounded up to 16]
  void* queries;         // scratch [num_queries][D] of q's type
};

// A row of logits whose choice has noise, and the next of its ids that could win; see choose.cpp.
struct NoisyRow {
  const float* logits;  // [n]
  int64_t n;
  float temperature;
  float floor;  // of logit / temperature: what is below cannot win; -infinity: none
  uint64_t seed;
  uint32_t sample_index, position;
};
struct NoisyBlock {
  static constexpr int kIds = 64;
  int64_t first;         // id of the first bit and word
  uint64_t possible;     // bit i: id first + i could win
  uint32_t words[kIds];  // random bits of the ids
};

struct Kernels {
  const char* name;
  // The rows of a LinearTask are taken in ceil(num_rows / tile_rows) nearly equal tiles, each laid
  // out by arrange_rows: x [num_rows, K] bf16 for bf16 weights, else f32, to arranged_bytes a row.
  // One call reads and lays out the inputs `k` of all rows of a tile; k begins at a multiple of 64
  // and ends at one or at K.
  int (*tile_rows)(DType weight_dtype);
  int64_t (*arranged_bytes)(DType weight_dtype, int64_t num_inputs);
  void (*arrange_rows)(DType weight_dtype, const void* x, int64_t num_rows, int64_t num_inputs,
                       Span k, void* out);
  void (*linear)(const LinearTask& task);
  // Attention of a tile, in this order: queries laid out, scores of pages, weights from all the
  // scores, and columns of the output from all the weights. Columns are cut at multiples of 16.
  void (*attention_arrange)(const AttentionTile& tile);
  void (*attention_scores)(const AttentionTile& tile, int first_page, int last_page);
  void (*attention_softmax)(const AttentionTile& tile);
  void (*attention_values)(const AttentionTile& tile, int first_column, int last_column);
  // One row each. out is bf16 if out_bf16, else f32.
  void (*rms_norm)(const float* x, const float* gain, float eps, int64_t d, void* out,
                   bool out_bf16);
  void (*silu_gate)(const float* gate, const float* up, int64_t n, void* out, bool out_bf16);
  void (*gelu_gate)(const float* gate, const float* up, int64_t n, void* out, bool out_bf16);
  void (*gelu_tanh_gate)(const float* gate, const float* up, int64_t n, void* out, bool out_bf16);
  void (*residual_silu)(const float* y, float* u, int64_t n, void* copy, bool copy_bf16);
  // In place: the pairs (i, i + half) of x turn by the angles of cos, sin [half].
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
  void (*top_k)(const float* x, int64_t n, int k, int32_t* ids, float* values);
  // Lowest id of the greatest of n values; NaN never wins; 0 if none is above -infinity.
  int64_t (*greatest)(const float* values, int64_t n);
  // The first block from id `start` on, a multiple of 64, with an id that could reach `best`; first
  // is n if there is none.
  void (*noisy_block)(const NoisyRow& row, int64_t start, float best, NoisyBlock& block);
  // Rising ids with logit / temperature >= floor, and these scores; room for n + 16 of each.
  int64_t (*gather)(const float* logits, int64_t n, float temperature, float floor, int32_t* ids,
                    float* scores);
  // round(2^32 exp(score - greatest)), as exp_f32 of noise.h has it; none above greatest.
  void (*masses)(const float* scores, int64_t n, float greatest, uint64_t* out);
  // The sum of the masses of all logit / temperature.
  uint64_t (*total_mass)(const float* logits, int64_t n, float temperature, float greatest);
  // Between float types, to nearest even, NaN kept.
  void (*convert)(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n);
};

const Kernels& kernels_generic();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace medusa::cpu
