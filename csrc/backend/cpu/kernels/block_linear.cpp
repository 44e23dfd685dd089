// linear for weights in blocks: out [R, N] = (accumulate ? out : 0) + (x [R, K] W^T + bias).
//
//   sum = 0;  for each group g of 32 inputs, rising:
//     sum = fma(float(sum over k in g of q_w q_x), scale_w[g] scale_x[g], sum)
//     sum = fma(minimum_w[g], scale_x[g] (sum over k in g of q_x), sum)      (q4_1, q4_k)
//
// Shapes    W as block_layout.h says; x [R, K] f32, rounded to 8 bits a value with one scale for
//           each 32 of a row (x = scale q, |q| <= 127), each tile of rows interleaved:
//           [K / 32] of { i8 [M][32], f32 scale [M], aux [M] }
// Traffic   1.06 (q8_0), 0.56 (q4_0), 0.58 (q4_k), 0.625 (q4_1) N K bytes once for every 120 rows;
//           2 R N K operations in integers and 2 to 4 R N K / 32 in f32.
//           SmolLM2-135M as its GGUF has it, 1 row: 98 MB a pass
// Bits      integers are exact, so only the order of the groups counts: one order for every (row,
//           output), whatever M is. |sum over a group| <= 32 * 255 * 127 < 2^24 converts exactly.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kernels/block_layout.h"
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/outputs.h"
#include "backend/cpu/kernels/simd.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

// Rows of one register tile: a sum in integers and one in f32 for each, and both halves of the 32
// outputs at once while there is room.
#if defined(MEDUSA_SIMD_AVX512)
constexpr int kMaxRows = 12, kWideRows = 6;
#elif defined(MEDUSA_SIMD_AVX2)
constexpr int kMaxRows = 3, kWideRows = 0;
#else
constexpr int kMaxRows = 2, kWideRows = 0;
#endif
// How far ahead of its reads a pass of M rows fetches, and at what step. While memory sets the pace
// the hardware's own fetching has more requests in flight than a program can have, so the program
// only leads it on; where memory and arithmetic take turns, a longer way evens them out. Measured
// on Zen 4 with 1 and 2 threads, 0 to 50 KB ahead, steps of 64, 128 and 256 bytes.
template <DType kType, int M>
struct Reach {
  using Tile = BlockTile<kType>;
  static constexpr bool kNear = M <= kWideRows && M <= (Tile::kNibbles ? 1 : 4);
  static constexpr int kStep = kNear && (Tile::kNibbles || M > 1) ? 128 : 64;
  static constexpr int kPair = 2 * Tile::kShareBytes;
  static constexpr int kBytes = (kNear ? 2560 : 22000) / kPair * kPair;
};

// Scales and minima of one group for the outputs [column, column + 16) of a tile.
template <DType kType>
struct Scales {
  using Tile = BlockTile<kType>;
  const uint8_t* tile;
  int column;

  MEDUSA_INLINE V half(const uint8_t* p) { return load(reinterpret_cast<const F16*>(p)); }
  __attribute__((always_inline)) V scale(int group) const {
    if constexpr (kType == DType::q4_k) {
      return mul(half(tile + 2 * column),
                 widen_bytes(tile + 4 * kColumns + group * kColumns + column));
    } else {
      return half(tile + 2 * (group * kColumns + column));
    }
  }
  __attribute__((always_inline)) V minimum(int group) const {
    if constexpr (kType == DType::q4_k) {
      const uint8_t* minima = tile + 4 * kColumns + Tile::kGroups * kColumns;
      const V value = mul(half(tile + 2 * kColumns + 2 * column),
                          widen_bytes(minima + group * kColumns + column));
      return sub(zero(), value);
    } else {
      return half(tile + 2 * ((Tile::kGroups + group) * kColumns + column));
    }
  }
};

// What a row starts a group with, so that the product may take weights as unsigned bytes.
template <DType kType>
MEDUSA_INLINE int32_t start_of(int32_t sum_of_x) {
  if constexpr (kType == DType::q4_0) return -8 * sum_of_x;
  if constexpr (kType == DType::q8_0) return kDotTakesUnsigned ? -128 * sum_of_x : 0;
  return 0;
}

template <DType kType, bool kOdd>
MEDUSA_INLINE Bytes load_quads(const uint8_t* p) {
  if constexpr (!BlockTile<kType>::kNibbles) return load_bytes(p);
  return kOdd ? high_nibbles(load_bytes(p)) : low_nibbles(load_bytes(p));
}

template <DType kType>
MEDUSA_INLINE I dot_quads(I sum, Bytes w, Bytes x) {
  return kType == DType::q8_0 ? dot_offset_128(sum, w, x) : dot_small(sum, w, x);
}

// One group: q points to the first quad of the wanted outputs, x to the rows' group. The lines of a
// group that begins at `fetched`, or each second one, are asked for, a few with every quad, since
// many at once would hold up the products; null: none.
template <DType kType, int M, int C, bool kOdd>
MEDUSA_INLINE void add_group(const Scales<kType>& scales, int group, const uint8_t* q,
                             const uint8_t* x, const uint8_t* fetched, V (&sum)[M][C]) {
  const auto* x_scale = reinterpret_cast<const float*>(x + M * kGroup);
  const uint8_t* x_aux = x + M * (kGroup + 4);
  I dots[M][C];
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) {
      dots[m][c] = BlockTile<kType>::kHasMinimum ? zero_i() : splat_i(x_aux + 4 * m);
    }
  }
#pragma GCC unroll 8
  for (int quad = 0; quad < kQuads; ++quad) {
    if (fetched != nullptr) {
      constexpr int kStep = Reach<kType, M>::kStep;
      constexpr int kLines = (BlockTile<kType>::kShareBytes + kStep - 1) / kStep;
#pragma GCC unroll 3
      for (int line = quad * kLines / kQuads; line < (quad + 1) * kLines / kQuads; ++line) {
        __builtin_prefetch(fetched + kStep * line, 0, 2);
      }
    }
    Bytes w[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      w[c] = load_quads<kType, kOdd>(q + quad * kQuadBytes + c * 4 * kLanes);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Bytes value = splat_quad(x + m * kGroup + 4 * quad);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) dots[m][c] = dot_quads<kType>(dots[m][c], w[c], value);
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c) {
    const Scales<kType> own{scales.tile, scales.column + c * kLanes};
    const V scale = own.scale(group);
    const V minimum = BlockTile<kType>::kHasMinimum ? own.minimum(group) : zero();
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      V value = fma(to_float(dots[m][c]), mul(scale, splat(x_scale[m])), sum[m][c]);
      if constexpr (BlockTile<kType>::kHasMinimum) {
        float x_sum;
        __builtin_memcpy(&x_sum, x_aux + 4 * m, 4);
        value = fma(minimum, splat(x_sum), value);
      }
      sum[m][c] = value;
    }
  }
}

// Which pass over a block this is. Of several each fetches its share of the next block: of every
// `every` pairs of groups the one that is `turn`.
struct Pass {
  int every, turn;
};

// What lies `ahead` of `at`, where the end of this thread's weights is followed by its next ones.
MEDUSA_INLINE const uint8_t* ahead_of(const LinearTask& task, const uint8_t* at, int64_t ahead) {
  const int64_t beyond = at + ahead - static_cast<const uint8_t*>(task.fetch_end);
  if (beyond < 0) return at + ahead;
  if (task.fetch_next == nullptr) return at;  // what is there already costs little
  return static_cast<const uint8_t*>(task.fetch_next) + beyond;
}

template <DType kType, int M>
void rows_of_block(const LinearTask& task, const uint8_t* block, int64_t first_row,
                   int64_t first_output, Pass pass) {
  using Tile = BlockTile<kType>;
  constexpr int C = M <= kWideRows ? 2 : 1;
  constexpr int kParts = kColumns / (C * kLanes);
  const int64_t padded = (task.num_inputs + kRowPadding - 1) / kRowPadding * kRowPadding;
  const int64_t num_tiles = (task.num_inputs + Tile::kInputs - 1) / Tile::kInputs;
  const auto* rows =
      static_cast<const uint8_t*>(task.x) + first_row * padded / kGroup * kXGroupBytes;
  pass.every *= kParts;
  pass.turn *= kParts;
  const int64_t ahead = pass.every == 1 ? Reach<kType, M>::kBytes : num_tiles * Tile::kBytes;
  for (int part = 0; part < kParts; ++part, ++pass.turn) {
    const int column = part * C * kLanes;
    V sum[M][C];
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < C; ++c) sum[m][c] = zero();
    }
    const uint8_t* x = rows;
    const uint8_t* tile = block;
    int wait = pass.turn;  // pairs of groups until the next that is fetched
    for (int64_t t = 0; t < num_tiles; ++t, tile += Tile::kBytes) {
      const Scales<kType> scales{tile, column};
      for (int group = 0; group < Tile::kGroups; group += 2) {
        const uint8_t* q = tile + Tile::kScaleBytes + group * Tile::kGroupBytes;
        const uint8_t* fetched = nullptr;
        if (wait == 0) {
          fetched = ahead_of(task, tile + group * Tile::kShareBytes, ahead);
          wait = pass.every;
        }
        --wait;
        q += 4 * column;
        add_group<kType, M, C, false>(scales, group, q, x, fetched, sum);
        x += M * kXGroupBytes;
        if constexpr (!Tile::kNibbles) q += Tile::kGroupBytes;
        if (fetched != nullptr) fetched += Tile::kShareBytes;
        add_group<kType, M, C, true>(scales, group + 1, q, x, fetched, sum);
        x += M * kXGroupBytes;
      }
    }
    store_outputs(task, sum, first_row, first_output + column);
  }
}

template <DType kType>
void linear_of(const LinearTask& task) {
  using Tile = BlockTile<kType>;
  using RowsOfBlock = void (*)(const LinearTask&, const uint8_t*, int64_t, int64_t, Pass);
  static constexpr RowsOfBlock kByRows[] = {
      nullptr,
      rows_of_block<kType, 1>,
      rows_of_block<kType, 2>,
#if defined(MEDUSA_SIMD_AVX2)
      rows_of_block<kType, 3>,
#endif
#if defined(MEDUSA_SIMD_AVX512)
      rows_of_block<kType, 4>,
      rows_of_block<kType, 5>,
      rows_of_block<kType, 6>,
      rows_of_block<kType, 7>,
      rows_of_block<kType, 8>,
      rows_of_block<kType, 9>,
      rows_of_block<kType, 10>,
      rows_of_block<kType, 11>,
      rows_of_block<kType, 12>,
#endif
  };
  static_assert(sizeof(kByRows) / sizeof(kByRows[0]) == kMaxRows + 1);
  const int64_t block_bytes = (task.num_inputs + Tile::kInputs - 1) / Tile::kInputs * Tile::kBytes;
  const int64_t num_tiles = (task.num_rows + kMaxRows - 1) / kMaxRows;
  const auto* weight = static_cast<const uint8_t*>(task.weight);
  for (int64_t block = task.first_block; block < task.last_block; ++block) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {  // nearly equal: 13 rows are 6 and 7
      const int64_t first = task.num_rows * tile / num_tiles;
      const int64_t last = task.num_rows * (tile + 1) / num_tiles;
      const Pass pass{static_cast<int>(num_tiles), static_cast<int>(tile)};
      kByRows[last - first](task, weight + block * block_bytes, first, block * kColumns, pass);
    }
  }
}

// One group of row m of M: the 32 values at x (fewer where the row ends) as 8-bit integers, a scale
// and what the weight's type needs of their sum.
template <DType kType>
MEDUSA_INLINE void arrange_group(const float* x, int64_t valid, int64_t m, int64_t M, uint8_t* to) {
  constexpr float kTiny = 1e-35f;  // 127 / kTiny is finite; a group below it is zero
  const V a = load_some(x, valid < kLanes ? valid : kLanes);
  const V b = valid > kLanes ? load_some(x + kLanes, valid - kLanes) : zero();
  // Of bits, so that infinity and NaN come out and show in the scale.
  const float most = float_of(greatest_magnitude_bits(a, b));
  const bool tiny = most < kTiny;
  const V inverse = splat(tiny ? 0.0f : 127.0f / most), shift = splat(12582912.0f);  // 1.5 * 2^23
  const V low = add(mul(a, inverse), shift), high = add(mul(b, inverse), shift);
  store_low_bytes(to + m * kGroup, low);
  store_low_bytes(to + m * kGroup + kLanes, high);
  const float scale = tiny ? 0.0f : most / 127.0f;
  __builtin_memcpy(to + M * kGroup + 4 * m, &scale, 4);
  // Integers below 2^24: exact in any order.
  const float sum = sum_of(add(sub(low, shift), sub(high, shift)));
  uint8_t* aux = to + M * (kGroup + 4) + 4 * m;
  if constexpr (BlockTile<kType>::kHasMinimum) {
    const float value = scale * sum;
    __builtin_memcpy(aux, &value, 4);
  } else {
    // A sum that is no number has a scale that is none either.
    const int32_t start = start_of<kType>(sum == sum ? static_cast<int32_t>(sum) : 0);
    __builtin_memcpy(aux, &start, 4);
  }
}

template <DType kType>
void arrange_of(const float* x, int64_t M, int64_t num_inputs, Span k, uint8_t* out) {
  for (int64_t m = 0; m < M; ++m) {
    uint8_t* to = out + k.first / kGroup * M * kXGroupBytes;
    const int64_t end = (k.last + kRowPadding - 1) / kRowPadding * kRowPadding;
    for (int64_t at = k.first; at < end; at += kGroup, to += M * kXGroupBytes) {
      const int64_t valid = num_inputs - at < kGroup ? num_inputs - at : kGroup;
      arrange_group<kType>(x + m * num_inputs + at, valid > 0 ? valid : 0, m, M, to);
    }
  }
}

}  // namespace

int block_tile_rows() { return kMaxRows; }

int64_t arranged_block_bytes(int64_t num_inputs) {
  return (num_inputs + kRowPadding - 1) / kRowPadding * kRowPadding / kGroup * kXGroupBytes;
}

void arrange_block_rows(DType dtype, const float* x, int64_t num_rows, int64_t num_inputs, Span k,
                        void* out) {
  auto* bytes = static_cast<uint8_t*>(out);
  if (dtype == DType::q8_0) return arrange_of<DType::q8_0>(x, num_rows, num_inputs, k, bytes);
  if (dtype == DType::q4_0) return arrange_of<DType::q4_0>(x, num_rows, num_inputs, k, bytes);
  if (dtype == DType::q4_1) return arrange_of<DType::q4_1>(x, num_rows, num_inputs, k, bytes);
  arrange_of<DType::q4_k>(x, num_rows, num_inputs, k, bytes);
}

void block_linear(const LinearTask& task) {
  if (task.dtype == DType::q8_0) return linear_of<DType::q8_0>(task);
  if (task.dtype == DType::q4_0) return linear_of<DType::q4_0>(task);
  if (task.dtype == DType::q4_1) return linear_of<DType::q4_1>(task);
  linear_of<DType::q4_k>(task);
}

}  // namespace medusa::cpu::MEDUSA_ISA
