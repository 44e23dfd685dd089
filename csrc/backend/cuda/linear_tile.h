// The parts of a tile of linear (linear.cu): which work a block does, how a stage gets into shared
// memory and how the tensor cores take it from there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cuda/gpu.h"
#include "backend/cuda/reduce.h"
#include "backend/cuda/weight.h"

namespace medusa::cuda {

constexpr int kChunk = 8;  // 16-bit elements in 16 bytes
constexpr int kRowChunks = kBlockInputs / kChunk;
constexpr int kStripChunks = kBlockSteps * kWarp;  // of one block

struct Product {
  const uint4* weight;                    // as packed; a lane's fragment is one uint4
  const uint16_t* x;                      // [R, K], bits
  const float* bias;                      // [N] or null
  float* out;                             // [R, N]
  float4* partials;                       // sums that leave a block or a thread's registers
  uint32_t* tickets;                      // [tiles], zero between launches
  int num_rows, num_inputs, num_outputs;  // R, K, N
  int num_strips, num_blocks;
  int num_splits;   // of the order
  int unit_splits;  // units that a tile is cut into: num_splits, or 1
  int num_row_tiles, num_units;
  bool accumulate;
  bool aligned;  // every row of x starts at a multiple of 16 bytes
};

// kOutputWarps x kTokenWarps warps, each with kWarpStrips strips of 16 outputs and an equal share
// of the rows.
template <int kTokenCount, int kOutputWarpCount, int kTokenWarpCount, int kWarpStripCount>
struct Tile {
  static constexpr int kTokens = kTokenCount;
  static constexpr int kOutputWarps = kOutputWarpCount, kTokenWarps = kTokenWarpCount;
  static constexpr int kWarpStrips = kWarpStripCount;
  static constexpr int kThreads = kOutputWarps * kTokenWarps * kWarp;
  static constexpr int kBlocksPerSm = kThreads == 128 ? 2 : 1;
  static constexpr int kStrips = kOutputWarps * kWarpStrips;
  static constexpr int kOutputs = kStrips * kStripOutputs;
  static constexpr int kColumnTiles = kTokens / kTokenWarps / 8;  // of a warp
  static constexpr int kQuads = kWarpStrips * kColumnTiles;       // of a thread's sums
  static constexpr int kStages = kTokens <= 16 ? 5 : kTokens <= 64 ? 4 : 3;
  static constexpr int kWeightChunks = kStrips * kStripChunks;  // of a stage
  static constexpr int kRowsChunks = kTokens * kRowChunks;
  static constexpr int kStageChunks = kWeightChunks + kRowsChunks;
  static constexpr int kSmemBytes = (kStages * kStageChunks + 1) * 16;  // and the ticket
  // Calculated cycles of a stage where blocks share a multiprocessor and where one has it alone:
  // what the tensor cores (1024 products a cycle) or shared memory (128 bytes a cycle) need, and
  // no less than the latency of memory, 1 us, over the stages under way.
  static constexpr int64_t kMmaCycles = int64_t{kOutputs} * kTokens * kBlockInputs / 1024;
  static constexpr int64_t kSharedCycles =
      (2 * kTokenWarps * kWeightChunks + (1 + kOutputWarps) * kRowsChunks) * 16 / 128;
  static constexpr int64_t kBusyCycles = kMmaCycles > kSharedCycles ? kMmaCycles : kSharedCycles;
  static constexpr int64_t kLatencyCycles = 1700 / (kStages - 1);
  static constexpr int64_t stage_cycles(bool alone) {
    const int64_t busy =
        alone && kBlocksPerSm > 1 ? kBusyCycles * 5 / 4 : kBusyCycles * kBlocksPerSm;
    return busy > kLatencyCycles ? busy : kLatencyCycles;
  }

  // Accumulators as the mma has them: [..][..][i] is output lane / 4 + 8 (i / 2), row
  // lane % 4 * 2 + i % 2 of a strip and a column tile.
  using Sums = float[kWarpStrips][kColumnTiles][4];
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return thread_index() % kWarp; }

// First of this warp's strips, and of its rows, in the tile.
template <class Tile>
__device__ __forceinline__ int warp_strip() {
  return thread_index() / kWarp % Tile::kOutputWarps * Tile::kWarpStrips;
}
template <class Tile>
__device__ __forceinline__ int warp_row() {
  return thread_index() / kWarp / Tile::kOutputWarps * Tile::kColumnTiles * 8;
}

// One stretch of work: a tile of outputs, a tile of rows, one split or all. Rows vary fastest, so
// that blocks that run together share weights.
struct Unit {
  int index, row_tile, split, tile;

  __device__ Unit(const Product& product, int unit)
      : index(unit),
        row_tile(unit % product.num_row_tiles),
        split(unit / product.num_row_tiles % product.unit_splits),
        tile(unit / product.num_row_tiles / product.unit_splits) {}
};

// Walks over all stages of a thread block, unit after unit.
struct Cursor {
  Unit unit;
  int block, last;

  __device__ explicit Cursor(const Product& product)
      : Cursor(product, static_cast<int>(blockIdx.x)) {}
  __device__ bool done(const Product& product) const { return unit.index >= product.num_units; }
  __device__ void next(const Product& product) {
    if (++block == last) *this = Cursor(product, unit.index + static_cast<int>(gridDim.x));
  }

 private:
  __device__ Cursor(const Product& product, int index)
      : unit(product, index),
        block(split_begin(unit.split, product.unit_splits, product.num_blocks)),
        last(split_begin(unit.split + 1, product.unit_splits, product.num_blocks)) {}
};

// Starts copies of a stage's weights: whole 2 KiB blocks of strips, one after the other. Strips
// beyond the last are zeros.
template <class Tile>
__device__ __forceinline__ void stage_weights(const Product& product, const Cursor& at,
                                              uint4* weights) {
  constexpr int kStripsAtOnce = Tile::kThreads / kStripChunks;
  static_assert(Tile::kThreads % kStripChunks == 0);
  const int first = at.unit.tile * Tile::kStrips + thread_index() / kStripChunks;
  const int64_t strip_stride = int64_t{product.num_blocks} * kStripChunks;
  const uint4* from = product.weight + first * strip_stride + int64_t{at.block} * kStripChunks +
                      thread_index() % kStripChunks;
#pragma unroll
  for (int i = 0; i < Tile::kStrips; i += kStripsAtOnce) {
    cp_async16(weights + i * kStripChunks + thread_index(), from + i * strip_stride,
               first + i < product.num_strips);
  }
}

// Where a chunk of a row lies in a stage: the same chunk of 8 rows in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kRowChunks + (chunk ^ row % kRowChunks);
}

// A thread's i-th chunk of a stage's rows of x.
template <class Tile>
struct RowChunk {
  int local, chunk, row, input;
  __device__ __forceinline__ RowChunk(const Cursor& at, int i) {
    const int index = i * Tile::kThreads + thread_index();
    local = index / kRowChunks, chunk = index % kRowChunks;
    row = at.unit.row_tile * Tile::kTokens + local;
    input = at.block * kBlockInputs + chunk * kChunk;
  }
  __device__ __forceinline__ bool in_tile() const { return local < Tile::kTokens; }
  __device__ __forceinline__ int to() const { return swizzled(local, chunk); }
};
template <class Tile>
constexpr int kRowsPerThread = (Tile::kRowsChunks + Tile::kThreads - 1) / Tile::kThreads;

// Rows beyond R and inputs beyond K are zeros.
template <class Tile>
__device__ __forceinline__ uint4 load_chunk(const Product& product, const RowChunk<Tile>& chunk) {
  const uint16_t* from = product.x + int64_t{chunk.row} * product.num_inputs + chunk.input;
  const int count =
      chunk.in_tile() && chunk.row < product.num_rows ? product.num_inputs - chunk.input : 0;
  if (product.aligned) {
    return count > 0 ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  }
  const auto pair = [&](int k) {
    const uint32_t low = k < count ? from[k] : 0, high = k + 1 < count ? from[k + 1] : 0;
    return low | high << 16;
  };
  return make_uint4(pair(0), pair(2), pair(4), pair(6));
}

// Starts copies of a stage's rows of x; where they are not aligned, copies them at once.
template <class Tile>
__device__ __forceinline__ void stage_rows(const Product& product, const Cursor& at, uint4* rows) {
#pragma unroll
  for (int i = 0; i < kRowsPerThread<Tile>; ++i) {
    const RowChunk<Tile> chunk(at, i);
    if (!chunk.in_tile()) break;
    if (product.aligned) {
      const bool valid = chunk.row < product.num_rows && chunk.input < product.num_inputs;
      cp_async16(rows + chunk.to(),
                 product.x + int64_t{chunk.row} * product.num_inputs + chunk.input, valid);
    } else {
      rows[chunk.to()] = load_chunk(product, chunk);
    }
  }
}

// sums += one stage.
template <class T, class Tile>
__device__ __forceinline__ void multiply_stage(const uint4* weights, const uint4* rows,
                                               typename Tile::Sums& sums) {
  const int lane = lane_index();
  const uint4* fragments = weights + warp_strip<Tile>() * kStripChunks + lane;
  uint32_t b[4];
#pragma unroll
  for (int step = 0; step < kBlockSteps; ++step) {
    uint32_t a[Tile::kWarpStrips][4];
#pragma unroll
    for (int m = 0; m < Tile::kWarpStrips; ++m) {
      const uint4 fragment = fragments[m * kStripChunks + step * kWarp];
      a[m][0] = fragment.x, a[m][1] = fragment.y, a[m][2] = fragment.z, a[m][3] = fragment.w;
    }
    if constexpr (Tile::kColumnTiles == 1) {
      // Four matrices: 8 rows by the inputs of this step and the next.
      if (step % 2 == 0) ldmatrix_x4<false>(b, rows + swizzled(lane % 8, step * 2 + lane / 8));
#pragma unroll
      for (int m = 0; m < Tile::kWarpStrips; ++m) {
        mma_16816<T>(sums[m][0], a[m], b[step % 2 * 2], b[step % 2 * 2 + 1]);
      }
    } else {
#pragma unroll
      for (int c = 0; c < Tile::kColumnTiles; c += 2) {
        // Four matrices: 16 rows by the 16 inputs of this step.
        const int row = warp_row<Tile>() + c * 8 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4<false>(b, rows + swizzled(row, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < Tile::kWarpStrips; ++m) {
          mma_16816<T>(sums[m][c], a[m], b[0], b[1]);
          mma_16816<T>(sums[m][c + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// A thread's sums in global memory: quad q of thread t at [q][t].
template <class Tile>
__device__ __forceinline__ void store_sums(float4* to, const typename Tile::Sums& sums) {
#pragma unroll
  for (int quad = 0; quad < Tile::kQuads; ++quad) {
    const float(&sum)[4] = sums[quad / Tile::kColumnTiles][quad % Tile::kColumnTiles];
    to[quad * Tile::kThreads + thread_index()] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
}

// sums += stored sums 0 .. count - 1, one after the other, many loads at once. count is even where
// two are loaded together. Past the first-level cache: another block may have stored them.
template <class Tile>
__device__ __forceinline__ void add_stored_sums(const float4* from, int count,
                                                typename Tile::Sums& sums) {
  constexpr int kAtOnce = Tile::kQuads > 16 ? 8 : Tile::kQuads;  // quads of one store
  constexpr int kStores = Tile::kQuads > 16 ? 1 : Tile::kQuads > 4 ? 2 : 4;
  const auto is_there = [&](int store) { return kStores <= 2 || store < count; };
  float4 loaded[kStores][kAtOnce];
#pragma unroll 1
  for (int store = 0; store < count; store += kStores) {
#pragma unroll
    for (int first = 0; first < Tile::kQuads; first += kAtOnce) {
      __syncwarp();  // or the compiler loads all quads at once, and spills
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        const float4* quads = from + (store + i) * Tile::kQuads * Tile::kThreads;
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
          if (is_there(store + i)) {
            loaded[i][q] = __ldcg(quads + (first + q) * Tile::kThreads + thread_index());
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
          float(&sum)[4] = sums[(first + q) / Tile::kColumnTiles][(first + q) % Tile::kColumnTiles];
          const float4& add = loaded[i][q];
          if (is_there(store + i)) {
            sum[0] += add.x, sum[1] += add.y, sum[2] += add.z, sum[3] += add.w;
          }
        }
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ void clear_sums(typename Tile::Sums& sums) {
#pragma unroll
  for (int i = 0; i < Tile::kQuads * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
}

template <class Tile>
__device__ __forceinline__ void add_sums(const typename Tile::Sums& addend,
                                         typename Tile::Sums& sums) {
#pragma unroll
  for (int i = 0; i < Tile::kQuads * 4; ++i) (&sums[0][0][0])[i] += (&addend[0][0][0])[i];
}

// out = sums + bias + residual, where there are such outputs and rows.
template <class Tile>
__device__ __forceinline__ void store_outputs(const Product& product, const Unit& unit,
                                              const typename Tile::Sums& sums) {
  // Column tiles whose residuals are loaded at once, before stores that later loads wait for.
  constexpr int kGroup = Tile::kColumnTiles < 4 || Tile::kQuads <= 16 ? Tile::kColumnTiles : 4;
  const int64_t N = product.num_outputs;
#pragma unroll
  for (int m = 0; m < Tile::kWarpStrips; ++m) {
    const int strip = unit.tile * Tile::kStrips + warp_strip<Tile>() + m;
    const int first_output = strip * kStripOutputs + lane_index() / 4;
    float bias[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = first_output + half * 8;
      if (product.bias != nullptr && output < N) bias[half] = product.bias[output];
    }
#pragma unroll
    for (int c = 0; c < Tile::kColumnTiles; c += kGroup) {
      const int first_row =
          unit.row_tile * Tile::kTokens + warp_row<Tile>() + c * 8 + lane_index() % 4 * 2;
      const auto for_each = [&](auto&& function) {
#pragma unroll
        for (int i = 0; i < kGroup * 4; ++i) {
          const int row = first_row + i / 4 * 8 + i % 2, output = first_output + i / 2 % 2 * 8;
          if (row < product.num_rows && output < N) function(i, product.out + row * N + output);
        }
      };
      float residual[kGroup * 4] = {};
      if (product.accumulate) for_each([&](int i, const float* out) { residual[i] = *out; });
      for_each([&](int i, float* out) {
        *out = sums[m][c + i / 4][i % 4] + bias[i / 2 % 2] + residual[i];
      });
    }
  }
}

}  // namespace medusa::cuda
