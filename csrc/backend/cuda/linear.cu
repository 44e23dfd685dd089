// linear: out = x W^T + bias + residual, for one row or thousands, one order over K.
//
//   out[r, n] = sum over k of x[r, k] W[n, k]  + bias[n]  + (accumulate ? out[r, n] : 0)
//
// Shapes    x [R, K] and W [N, K] bf16 | f16 | f32, bias [N] f32 or null, out [R, N] f32
// Order     as weight.h has it, a function of (N, K) alone. All below (tiles, who takes which
//           splits, the number of blocks, the device) moves work about and changes no bit.
// Tiles     W is the 16-row operand of the mma and rows of x are its 8 columns, so that few rows
//           waste little. Narrow: 128 outputs x 8, 16, 32 or 64 rows, 4 warps, two blocks to a
//           multiprocessor. Wide: 256 outputs x 64 rows, 8 warps, half the traffic of x. Deep: 192
//           outputs x 128 rows, for prompts and many trees. The host takes the one of least
//           estimated cycles; the choice changes no bit.
// Pipeline  a stage is 64 inputs of the tile, 16 | 32 KiB of W and 128 bytes of each row of x,
//           swizzled for ldmatrix, by cp.async; 3 to 5 stages, one barrier each. It runs on over
//           the units (outputs, split, rows) of a block. A block's first weights are on their way
//           before the kernel ahead has ended: they depend on nothing.
// Splits    where tiles alone occupy the chip a block walks through all splits and adds their
//           sums. Otherwise each split is a unit of its own; the block that comes last to a tile,
//           by ticket, adds the sums of all in ascending order, and resets the ticket: a captured
//           graph may run again.
// Traffic   2 N K bytes of W from memory, once for up to 64 rows. From the second-level cache also
//           x, R / 128 of the bytes of W (wide R / 256), and the sums of splits, written and read,
//           8 R N each split: 4096 x 4096, R=64: 34 MB of W, 17 of x, 4 + 4 of sums.
//           Flops 2 R N K: 64 rows at the floor need 43 % of the mma rate of 132 multiprocessors.
//           Deep: 77 flops a byte of the second-level cache, so 420 TFLOP/s at 5.5 TB/s
// Estimates for 132 multiprocessors at 1.7 GHz, calculated: floor at 4.3 TB/s, tile and units with
//           1 | 64 | 512 rows. A block keeps 64 | 48 KiB under way, a wide one 64 | 96; 4.3 TB/s at
//           0.8 us need 3.3 MiB.
//             12288 x 4096   2 splits   23.4 us   96 | 96 wide, split | 256 deep
//              4096 x 4096   4           7.8     128 split | 128 split | 128 wide
//             22016 x 4096   1          41.9     172 | 86 wide | 460 deep
//              4096 x 11008  4          21.0     128 split | 128 split | 128 wide
//             32000 x 4096   1          61.0     250 | 125 wide | 1000 wide
//           Units that do not fill their last round lose little as long as some 57 are left: they
//           share the bandwidth of memory, 75 GB/s each.
// f32       one thread sums one output of one row with fmaf: for tests and small models
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <limits>

#include "backend/cuda/columns.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/gpu.h"
#include "backend/cuda/linear_tile.h"
#include "backend/cuda/weight.h"

namespace medusa::cuda {
namespace {

template <int kTokens>
using Narrow = Tile<kTokens, 4, 1, 2>;
using Wide = Tile<64, 8, 1, 2>;
using Deep = Tile<128, 4, 2, 3>;

// Tiles too large for two sets of sums in registers keep the sum of earlier splits in memory, and
// serve only where a block takes all splits.
template <class Tile>
constexpr bool kSumsInMemory = Tile::kQuads > 16;

// The sums of a tile whose splits are units of their own: true in the block that came last, which
// then holds all of them. ticket: shared memory.
template <class Tile>
__device__ __forceinline__ bool gather_splits(const Product& product, const Unit& unit,
                                              uint32_t& ticket, typename Tile::Sums& total) {
  constexpr int kUnitQuads = Tile::kQuads * Tile::kThreads;
  const int tile = unit.tile * product.num_row_tiles + unit.row_tile;
  float4* parts = product.partials + int64_t{tile} * product.num_splits * kUnitQuads;
  store_sums<Tile>(parts + unit.split * kUnitQuads, total);
  __syncthreads();
  if (thread_index() == 0) ticket = take_ticket(product.tickets + tile);
  __syncthreads();
  if (ticket + 1 != static_cast<uint32_t>(product.num_splits)) return false;

  if (thread_index() == 0) product.tickets[tile] = 0;
  clear_sums<Tile>(total);
  add_stored_sums<Tile>(parts, product.num_splits, total);
  return true;
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    linear_kernel(const Product product) {
  constexpr int kAhead = Tile::kStages - 1;  // stages under way
  MEDUSA_DYNAMIC_SHARED(uint4, memory);
  uint32_t& ticket = memory[Tile::kStages * Tile::kStageChunks].x;
  const auto weights_of = [&](int stage) { return memory + stage * Tile::kStageChunks; };
  const auto rows_of = [&](int stage) { return weights_of(stage) + Tile::kWeightChunks; };

  // The first weights, then, once the kernel ahead has ended, the rows that go with them.
  Cursor load(product);
#pragma unroll 1
  for (int stage = 0; stage < kAhead; ++stage) {
    if (!load.done(product)) {
      stage_weights<Tile>(product, load, weights_of(stage));
      load.next(product);
    }
    cp_async_commit();
  }
  grid_dependency_wait();
  grid_launch_dependents();  // not before: the next kernel's weights would only compete with these
  uint4 held[kAhead][kRowsPerThread<Tile>];  // all loads, then all stores: one round trip
  Cursor first(product);
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    const bool is_there = !first.done(product);
#pragma unroll
    for (int i = 0; i < kRowsPerThread<Tile>; ++i) {
      held[stage][i] =
          is_there ? load_chunk(product, RowChunk<Tile>(first, i)) : make_uint4(0, 0, 0, 0);
    }
    if (is_there) first.next(product);
  }
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread<Tile>; ++i) {
      const RowChunk<Tile> chunk(first, i);
      if (chunk.in_tile()) rows_of(stage)[chunk.to()] = held[stage][i];
    }
  }

  int stage = 0;
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < product.num_units;
       index += static_cast<int>(gridDim.x)) {
    const Unit unit(product, index);
    const bool has_outputs = unit.tile * Tile::kStrips + warp_strip<Tile>() < product.num_strips;
    const int num_splits =
        product.num_splits / (kSumsInMemory<Tile> ? 1 : product.unit_splits);  // of this unit
    const int first_split = kSumsInMemory<Tile> ? 0 : unit.split * num_splits;
    typename Tile::Sums sums, total;
    clear_sums<Tile>(total);
#pragma unroll 1
    for (int split = first_split; split < first_split + num_splits; ++split) {
      const int last = split_begin(split + 1, product.num_splits, product.num_blocks);
      clear_sums<Tile>(sums);
#pragma unroll 1
      for (int block = split_begin(split, product.num_splits, product.num_blocks); block < last;
           ++block) {
        // After the barrier this stage is there, and all have done with the one before it.
        cp_async_wait<kAhead - 1>();
        __syncthreads();
        if (!load.done(product)) {
          const int free = stage == 0 ? Tile::kStages - 1 : stage - 1;
          stage_weights<Tile>(product, load, weights_of(free));
          stage_rows<Tile>(product, load, rows_of(free));
          load.next(product);
        }
        cp_async_commit();
        if (has_outputs) multiply_stage<T, Tile>(weights_of(stage), rows_of(stage), sums);
        stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
      }
      if constexpr (!kSumsInMemory<Tile>) {
        add_sums<Tile>(sums, total);
      } else {
        float4* kept = product.partials + int64_t{blockIdx.x} * Tile::kQuads * Tile::kThreads;
        add_sums<Tile>(total, sums);  // 0, as where sums stay in registers
        add_stored_sums<Tile>(kept, split > first_split ? 1 : 0, sums);
        if (split + 1 < first_split + num_splits) store_sums<Tile>(kept, sums);
      }
    }
    if constexpr (kSumsInMemory<Tile>) {
      store_outputs<Tile>(product, unit, sums);
    } else if (product.unit_splits == 1 || gather_splits<Tile>(product, unit, ticket, total)) {
      store_outputs<Tile>(product, unit, total);
    }
  }
}

// Estimates by which the host chooses a tile; they change no bit.
constexpr int64_t kMemoryBytes = 19;  // a cycle for a multiprocessor: 4.3 TB/s for 132 at 1.7 GHz
constexpr int64_t kGatherCycles = 2000, kGatherRowCycles = 32;  // to store sums, and to add them up

constexpr int kPlainRows = 8;

// Lanes are outputs, warps rows.
__global__ void __launch_bounds__(kPlainOutputs* kPlainRows)
    plain_linear_kernel(const float* x, const float* __restrict__ weight,
                        const float* __restrict__ bias, bool accumulate, int64_t num_rows,
                        int64_t num_inputs, int64_t num_outputs, float* out) {
  begin_overlapped();
  const int64_t tiles = (num_outputs + kPlainOutputs - 1) / kPlainOutputs;
  const int64_t output = blockIdx.x % tiles * kPlainOutputs + threadIdx.x % kPlainOutputs;
  const int64_t row = blockIdx.x / tiles * kPlainRows + threadIdx.x / kPlainOutputs;
  if (row >= num_rows || output >= num_outputs) return;

  const float* inputs = x + row * num_inputs;
  const float* column = weight + plain_index(output, 0, num_inputs);
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t k = 0; k < num_inputs; ++k) sum = fmaf(inputs[k], column[k * kPlainOutputs], sum);
  if (bias != nullptr) sum += bias[output];
  float* to = out + row * num_outputs + output;
  *to = accumulate ? sum + *to : sum;
}

// Shared memory that a block of this device may have.
int max_smem_bytes(int device) {
  int bytes = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

}  // namespace

void CudaBackend::do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                            TensorView out) {
  const int64_t R = x.size(0), K = weight.num_inputs(), N = weight.num_outputs();
  if (weight.dtype() == DType::f32) {
    const int64_t blocks = ceil_div(N, kPlainOutputs) * ceil_div(R, kPlainRows);
    launch_overlapped(plain_linear_kernel, dim3(static_cast<unsigned>(blocks)),
                      dim3(kPlainOutputs * kPlainRows), 0, stream_.get(), x.as<float>(),
                      static_cast<const float*>(packed(weight).data()), bias.as<float>(),
                      accumulate, R, K, N, out.as<float>());
    return;
  }

  Product product{};
  product.weight = static_cast<const uint4*>(packed(weight).data());
  product.x = x.as<uint16_t>();
  product.bias = bias.as<float>();
  product.out = out.as<float>();
  product.num_rows = static_cast<int>(R);
  product.num_inputs = static_cast<int>(K);
  product.num_outputs = static_cast<int>(N);
  product.num_strips = static_cast<int>(ceil_div(N, kStripOutputs));
  product.num_blocks = static_cast<int>(ceil_div(K, kBlockInputs));
  product.num_splits = num_splits(N, K);
  product.accumulate = accumulate;
  product.aligned = K % kChunk == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;

  const auto tiles_of = [&]<class Tile>() {
    return ceil_div(N, Tile::kOutputs) * ceil_div(R, Tile::kTokens);
  };
  // Cycles, about: rounds of blocks times their stages, or what memory takes; the sums of splits.
  const auto cycles = [&]<class Tile>(bool split) {
    const int64_t parts = split ? product.num_splits : 1;
    const int64_t units = tiles_of.template operator()<Tile>() * parts;
    const int64_t rounds = ceil_div(units, int64_t{num_sms_} * Tile::kBlocksPerSm);
    const int64_t stages = rounds * ceil_div(product.num_blocks, parts);
    return std::max(stages * Tile::stage_cycles(units <= num_sms_),
                    2 * N * K / (kMemoryBytes * num_sms_)) +
           (split ? kGatherCycles + kGatherRowCycles * Tile::kTokens : 0);
  };
  const auto splits_pay = [&]<class Tile>() {
    return product.num_splits > 1 && !kSumsInMemory<Tile> &&
           cycles.template operator()<Tile>(true) < cycles.template operator()<Tile>(false);
  };
  const auto run = [&]<class T, class Tile>() {
    const int64_t tiles = tiles_of.template operator()<Tile>();
    const bool split = splits_pay.template operator()<Tile>();
    product.num_row_tiles = static_cast<int>(ceil_div(R, Tile::kTokens));
    product.unit_splits = split ? product.num_splits : 1;
    product.num_units = static_cast<int>(tiles * product.unit_splits);
    const int blocks = std::min(product.num_units, num_sms_ * Tile::kBlocksPerSm);

    if (split || (kSumsInMemory<Tile> && product.num_splits > 1)) {
      const int64_t bytes = int64_t{Tile::kQuads} * Tile::kThreads * sizeof(float4);
      product.partials = static_cast<float4*>(
          linear_partials_.at_least((split ? product.num_units : blocks) * bytes, stream_.get()));
    }
    if (split) {
      product.tickets =
          static_cast<uint32_t*>(linear_tickets_.at_least(tiles * sizeof(uint32_t), stream_.get()));
    }
    launch_overlapped(linear_kernel<T, Tile>, dim3(static_cast<unsigned>(blocks)),
                      dim3(Tile::kThreads), Tile::kSmemBytes, stream_.get(), product);
  };
  const auto choose_tile = [&]<class T>() {
    if (R <= 8) return run.template operator()<T, Narrow<8>>();
    if (R <= 16) return run.template operator()<T, Narrow<16>>();
    if (R <= 32) return run.template operator()<T, Narrow<32>>();
    const int smem_bytes = max_smem_bytes(device_);
    const auto best = [&]<class Tile>() {
      if (Tile::kSmemBytes > smem_bytes) return std::numeric_limits<int64_t>::max();
      return cycles.template operator()<Tile>(splits_pay.template operator()<Tile>());
    };
    const int64_t narrow = best.template operator()<Narrow<64>>();
    const int64_t wide = best.template operator()<Wide>();
    if (R > 64 && best.template operator()<Deep>() <= std::min(narrow, wide)) {
      return run.template operator()<T, Deep>();
    }
    if (wide <= narrow) return run.template operator()<T, Wide>();
    return run.template operator()<T, Narrow<64>>();
  };
  if (weight.dtype() == DType::f16) {
    choose_tile.template operator()<__half>();
  } else {
    choose_tile.template operator()<__nv_bfloat16>();
  }
}

}  // namespace medusa::cuda
