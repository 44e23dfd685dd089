// top_k: the k greatest of each row, falling, ties to the lower id; NaN counts as -infinity.
//
// Shapes    x [R, V] f32; ids [R, k] i32, values [R, k] f32; k <= 256
// Traffic   4 V bytes a row, read once: 4 x 131072 logits are 2 MB, 0.5 us at 4.3 TB/s; bound by
//           two launches and the sorts, about 5 us
// Launch    rounds of grid (R, pieces), 256 threads (fewer where a row is short). A block holds one
//           piece of 4096 in registers, 16 entries a thread, and leaves its best k; the next
//           round's row is these lists. V = 131072, k = 10: 32 pieces, then one. Pieces follow from
//           V and k
// Few       the k-th best of the threads' own best is no better than the k-th best of the piece,
//           and k threads at most hold anything that good: no more than 16 k entries are sorted,
//           as a rule about k
// Exact     a rank is an integer and no two are equal: nothing depends on the order of the atomics
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/choose.cuh"
#include "backend/cuda/cuda_backend.h"

namespace medusa::cuda {
namespace {

constexpr int kPerThread = 4 * kQuads;
constexpr int kMaxK = 256;

// Entries of a row: logits, or the lists of the round before.
struct Pieces {
  const float* x = nullptr;  // [R, size]; null: ranks
  const Rank* ranks = nullptr;
  int64_t size = 0;

  __device__ __forceinline__ void load(int64_t row, uint32_t start, Rank (&own)[kPerThread]) const {
    if (x) {
      const float* values = x + row * size;
      const ScoreRow scores{values, nullptr, 1.0f, static_cast<uint32_t>(size),
                            reinterpret_cast<uintptr_t>(values) % 16 == 0};
      float chunk[kQuads][4];
      scores.chunk(start, chunk);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const uint32_t id = quad_id(start, i / 4) + static_cast<uint32_t>(i % 4);
        own[i] = id < size ? rank_of(chunk[i / 4][i % 4], id) : kNoRank;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t at = int64_t{start} + static_cast<int64_t>(i) * blockDim.x + threadIdx.x;
      own[i] = at < size ? ranks[row * size + at] : kNoRank;
    }
  }
};

// best [R, pieces, k], filled up with kNoRank; in the last round, of one piece, ids and values.
__global__ void __launch_bounds__(kChunkThreads)
    top_k_kernel(Pieces pieces, int k, Rank* best, const float* x, int64_t vocab, int32_t* ids,
                 float* values) {
  __shared__ Rank list[kPerThread * kMaxK];
  __shared__ int list_size;
  begin_overlapped();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  Rank own[kPerThread];
  pieces.load(row, blockIdx.y * kPerThread * blockDim.x, own);

  // The bound: the k-th best of the threads' own best.
  Rank bound = kNoRank;
  if (threads > k) {
    const int padded = power_of_two(threads);
    Rank thread_best = own[0];
#pragma unroll
    for (int i = 1; i < kPerThread; ++i) thread_best = own[i] < thread_best ? own[i] : thread_best;
    list[thread] = thread_best;
    if (thread < padded - threads) list[threads + thread] = kNoRank;
    __syncthreads();
    block_sort(list, padded);
    bound = list[k - 1];
  }
  __syncthreads();  // all have read it

  if (thread == 0) list_size = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (own[i] <= bound && own[i] != kNoRank) list[atomicAdd(&list_size, 1)] = own[i];
  }
  __syncthreads();
  const int size = list_size;
  const int padded = power_of_two(max(size, k));
  for (int i = size + thread; i < padded; i += threads) list[i] = kNoRank;
  __syncthreads();
  block_sort(list, padded);

  for (int i = thread; i < k; i += threads) {
    if (best) {
      best[(row * gridDim.y + blockIdx.y) * k + i] = list[i];
      continue;
    }
    const uint32_t id = id_of(list[i]);
    const float value = x[row * vocab + id];  // a -0 is one
    ids[row * k + i] = static_cast<int32_t>(id);
    values[row * k + i] = value == value ? value : kLowest;
  }
}

}  // namespace

void CudaBackend::do_top_k(TensorView x, TensorView ids, TensorView values) {
  const cudaStream_t stream = stream_.get();
  const int64_t num_rows = x.size(0), k = ids.size(1);
  // Lists of one round are read by the next: two halves.
  const int64_t half = num_rows * num_chunks(x.size(1)) * k;
  Rank* lists[2] = {};
  if (num_chunks(x.size(1)) > 1) {
    lists[0] = static_cast<Rank*>(
        top_k_parts_.at_least(2 * half * static_cast<int64_t>(sizeof(Rank)), stream));
    lists[1] = lists[0] + half;
  }

  Pieces pieces{x.as<float>(), nullptr, x.size(1)};
  for (int round = 0;; ++round) {
    const int num_pieces = num_chunks(pieces.size);
    Rank* best = num_pieces > 1 ? lists[round % 2] : nullptr;
    launch_overlapped(
        top_k_kernel, dim3(static_cast<unsigned>(num_rows), static_cast<unsigned>(num_pieces)),
        dim3(static_cast<unsigned>(chunk_threads(pieces.size))), 0, stream, pieces,
        static_cast<int>(k), best, x.as<float>(), x.size(1), ids.as<int32_t>(), values.as<float>());
    if (num_pieces == 1) return;
    pieces = {nullptr, best, num_pieces * k};
  }
}

}  // namespace medusa::cuda
