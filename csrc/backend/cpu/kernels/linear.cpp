// linear: out [R, N] = (accumulate ? out : 0) + (x [R, K] W^T + bias), f32 sums.
//
// Shapes    W packed [N/32][K/2][32][2] bf16, or [N/32][K][32] f16 | f32, N padded with zeros
//           x [R, K] bf16 for bf16 weights, else f32; each tile of rows interleaved
// Traffic   N K bytes(W) once for every 120 rows; R (K + N) of activations. 2 R N K flops.
//           SmolLM2-135M, bf16, 1 row: 269 MB a pass
// Bits      a (row, output) is one lane that runs over K in one order (dot_block.h); rows are
//           taken M at a time, and M changes nothing but speed.
// Order     a block of 32 outputs for all rows, then the next, so that memory sees W once.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kernels/dot_block.h"
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/outputs.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

// Rows and vectors of one register tile; sums plus weights plus a broadcast must fit the registers.
#if defined(MEDUSA_SIMD_AVX512)
constexpr int kMaxRows = 12, kWideRows = 12;  // 24 sums of 32 registers
#elif defined(MEDUSA_SIMD_AVX2)
constexpr int kMaxRows = 4, kWideRows = 1;  // 8 sums of 16 registers
#else
constexpr int kMaxRows = 2, kWideRows = 1;  // 8 sums; x86-64 has 16 registers
#endif
// So few rows wait for memory, whose own fetching only needs to be led on: a little ahead, and in
// bf16 for more than one row every second line (measured as in block_linear.cpp).
constexpr int kNearRows = 4;
constexpr int64_t kNearBytes = 4096;

// What one pass over a block fetches: `bytes` from `ahead` of the block's begin on.
struct Share {
  int64_t ahead, bytes;
};

template <class W, int M>
void rows_of_block(const LinearTask& task, const W* w, int64_t first_row, int64_t first_output,
                   Share share) {
  using Op = Operand<W>;
  constexpr int C = M <= kWideRows ? 2 : 1;
  constexpr int kVector = kLanes * Op::kStep, kParts = kColumns / (C * kLanes);
  const auto* x = static_cast<const typename Op::X*>(task.x) + first_row * task.num_inputs;
  const auto* end = static_cast<const char*>(task.fetch_end);
  const auto* begin = reinterpret_cast<const char*>(w) + share.ahead;
  share.bytes /= kParts;
  for (int part = 0; part < kParts; ++part) {
    V sum[M][C];
    Fetch fetch{begin + part * share.bytes, share.bytes * Op::kStep / task.num_inputs};
    const int64_t left = end - fetch.at;
    // Where the next weights are not known: what is there already costs little.
    fetch.next = task.fetch_next ? static_cast<const char*>(task.fetch_next)
                                 : reinterpret_cast<const char*>(w);
    if (left <= 0) {
      fetch.at = fetch.next - left;
    } else if (fetch.step > 0) {
      fetch.turn = left / fetch.step;
    }
    constexpr int kLines = kParts == 1 && M > 1 && M <= kNearRows ? 1 : C;
    dot_block<W, M, C, kLines>(w + part * C * kVector, kColumns * Op::kStep, x, task.num_inputs,
                               sum, fetch);
    store_outputs(task, sum, first_row, first_output + part * C * kLanes);
  }
}

// Rows of a tile at most. Pairs of bf16 need twice the registers where they are widened.
template <class W>
constexpr int64_t max_tile_rows() {
#if defined(MEDUSA_SIMD_AVX2)
  return kMaxRows;
#else
  return Operand<W>::kStep == 2 ? 1 : kMaxRows;
#endif
}

template <class W>
void linear_of(const LinearTask& task) {
  using RowsOfBlock = void (*)(const LinearTask&, const W*, int64_t, int64_t, Share);
  static constexpr RowsOfBlock kByRows[] = {
      nullptr,
      rows_of_block<W, 1>,
      rows_of_block<W, 2>,
#if defined(MEDUSA_SIMD_AVX2)
      rows_of_block<W, 3>,
      rows_of_block<W, 4>,
#endif
#if defined(MEDUSA_SIMD_AVX512)
      rows_of_block<W, 5>,
      rows_of_block<W, 6>,
      rows_of_block<W, 7>,
      rows_of_block<W, 8>,
      rows_of_block<W, 9>,
      rows_of_block<W, 10>,
      rows_of_block<W, 11>,
      rows_of_block<W, 12>,
#endif
  };
  constexpr int64_t kTileRows = max_tile_rows<W>();
  const int64_t num_tiles = (task.num_rows + kTileRows - 1) / kTileRows;
  const int64_t block_elements = kColumns * task.num_inputs;
  const int64_t block_bytes = block_elements * static_cast<int64_t>(sizeof(W));
  const W* weight = static_cast<const W*>(task.weight);
  // Where several passes go over a block each fetches its share of the next one, so that memory and
  // arithmetic overlap evenly.
  const bool near =
      num_tiles == 1 && task.num_rows <= (kNearRows < kWideRows ? kNearRows : kWideRows);
  const int64_t ahead = near ? kNearBytes : block_bytes;
  for (int64_t block = task.first_block; block < task.last_block; ++block) {
    const W* w = weight + block * block_elements;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {  // nearly equal: 13 rows are 6 and 7
      const int64_t first = task.num_rows * tile / num_tiles;
      const int64_t last = task.num_rows * (tile + 1) / num_tiles;
      const Share share{ahead + block_bytes * tile / num_tiles, block_bytes / num_tiles};
      kByRows[last - first](task, w, first, block * kColumns, share);
    }
  }
}

template <class W>
void arrange_of(const void* x, int64_t num_rows, int64_t num_inputs, Span k, void* out) {
  using X = typename Operand<W>::X;
  const auto row_of = [&](int m) { return static_cast<const X*>(x) + m * num_inputs; };
  interleave<X, Operand<W>::kStep>(row_of, static_cast<int>(num_rows), k.first, k.last,
                                   static_cast<X*>(out));
}

}  // namespace

int block_tile_rows();
int64_t arranged_block_bytes(int64_t num_inputs);
void arrange_block_rows(DType dtype, const float* x, int64_t num_rows, int64_t num_inputs, Span k,
                        void* out);
void block_linear(const LinearTask& task);

int tile_rows(DType dtype) {
  if (dtype >= DType::q8_0) return block_tile_rows();
  return static_cast<int>(dtype == DType::bf16 ? max_tile_rows<Bf16>() : max_tile_rows<float>());
}

int64_t arranged_bytes(DType dtype, int64_t num_inputs) {
  if (dtype >= DType::q8_0) return arranged_block_bytes(num_inputs);
  return num_inputs * static_cast<int64_t>(dtype == DType::bf16 ? sizeof(Bf16) : sizeof(float));
}

void arrange_rows(DType dtype, const void* x, int64_t num_rows, int64_t num_inputs, Span k,
                  void* out) {
  if (dtype >= DType::q8_0) {
    return arrange_block_rows(dtype, static_cast<const float*>(x), num_rows, num_inputs, k, out);
  }
  if (dtype == DType::bf16) return arrange_of<Bf16>(x, num_rows, num_inputs, k, out);
  if (dtype == DType::f16) return arrange_of<F16>(x, num_rows, num_inputs, k, out);
  arrange_of<float>(x, num_rows, num_inputs, k, out);
}

void linear(const LinearTask& task) {
  if (task.dtype >= DType::q8_0) return block_linear(task);
  if (task.dtype == DType::bf16) return linear_of<Bf16>(task);
  if (task.dtype == DType::f16) return linear_of<F16>(task);
  linear_of<float>(task);
}

}  // namespace medusa::cpu::MEDUSA_ISA
