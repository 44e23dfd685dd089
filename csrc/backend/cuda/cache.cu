// Moves inside the cache: compact_kv, copy_page; and read_kv, which tests use. No arithmetic, so
// bits stay as they are.
//
//   compact_kv   row(len + i) = row(len + path[i]), i in [0, n), every layer, K and V, B lines
//   copy_page    slots [0, num_tokens) of page src to page dst, every layer, K and V
//
// Shapes    cache [L, 2, pages, Hkv, 64, D] f32 | f16 | bf16; sequence, len, n [B], path [B,
//           max_path] and the page table in device memory
// Requires  path strictly increasing, so path[i] >= i; one line per sequence
// Traffic   compact_kv 4 L n Hkv D bytes(cache) bytes at most, read and written; L=32, Hkv D=4096,
//           bf16, n=4: 4.2 MB, 1 us at 4.3 TB/s; bound by three dependent loads and the launch.
//           copy_page 4 L Hkv 64 D bytes(cache): 67 MB, 16 us
// Launch    compact_kv: a thread for each 16-byte column of a (layer, K|V, head), grid (columns,
//           B). copy_page: a block for each (layer, K|V, head). 4-byte words where D bytes(cache)
//           is no multiple of 16.
// In place  a thread owns its column of all rows. It reads eight rows before it writes them, and
//           every row it writes later than it read others lies below what it has still to read:
//           path[j] >= j > i for all j in later groups. No barrier.
// Source    cache update step of Medusa, arXiv:2401.10774
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "backend/cuda/cache_ops.h"
#include "backend/cuda/columns.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/gpu.h"
#include "backend/cuda/reduce.h"
#include "medusa/error.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 8;            // rows in flight
constexpr int kMaxGridLines = 1024;  // more lines than these share blocks

template <class Word>
__global__ void __launch_bounds__(kThreads)
    compact_kv_kernel(const __grid_constant__ CacheView cache,
                      const __grid_constant__ DeviceMoves moves) {
  begin_overlapped();
  constexpr auto kWordBytes = static_cast<int64_t>(sizeof(Word));
  const int64_t row_bytes = int64_t{cache.head_dim} * cache.element_bytes;
  const int64_t row_words = row_bytes / kWordBytes;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t block = index / row_words;
  const int head = static_cast<int>(block % cache.num_kv_heads);
  const int plane = static_cast<int>(block / cache.num_kv_heads);  // 2 layer + (K|V)
  const bool owns = plane < 2 * cache.num_layers;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto word_at = [&](int page, int64_t slot) {
    return reinterpret_cast<Word*>(cache.data + cache.block(plane / 2, plane % 2, page, head) +
                                   slot % kPageTokens * row_bytes + index % row_words * kWordBytes);
  };

  for (int line = static_cast<int>(blockIdx.y); line < moves.num_lines;
       line += static_cast<int>(gridDim.y)) {
    const int32_t* path = moves.path + int64_t{line} * moves.max_path;
    const int32_t sequence = moves.sequence[line];
    const int64_t len = moves.len[line];
    const int n = min(moves.n[int64_t{line} * moves.n_stride], moves.max_path);
    for (int first = 0; first < n; first += kGroup) {
      // Lane i looks up row first + i, so that the rows' lookups do not wait for one another.
      const int at = first + lane;
      const int source = lane < kGroup && at < n ? path[at] : at;
      int from_page = -1, to_page = -1;
      if (source != at) {
        from_page = cache.page_of(sequence, len + source);
        to_page = cache.page_of(sequence, len + at);
      }
      if (to_page < 0) from_page = -1;

      Word rows[kGroup];
      uint32_t moved = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int page = __shfl_sync(kAllLanes, from_page, i);
        const int from = __shfl_sync(kAllLanes, source, i);
        if (page < 0 || !owns) continue;
        rows[i] = *word_at(page, len + from);
        moved |= 1u << i;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int page = __shfl_sync(kAllLanes, to_page, i);
        if (moved >> i & 1) *word_at(page, len + first + i) = rows[i];
      }
    }
  }
}

template <class Word>
__global__ void __launch_bounds__(kThreads)
    copy_page_kernel(const __grid_constant__ CacheView cache, int src, int dst, int64_t num_words) {
  const int head = static_cast<int>(blockIdx.x) % cache.num_kv_heads;
  const int plane = static_cast<int>(blockIdx.x) / cache.num_kv_heads;
  const auto words_of = [&](int page) {
    return reinterpret_cast<Word*>(cache.data + cache.block(plane / 2, plane % 2, page, head));
  };
  const Word* from = words_of(src);
  Word* to = words_of(dst);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < num_words; i += kThreads) to[i] = from[i];
}

// out: K and V [2, Hkv, D] as f32, then the page's index.
template <class T>
__global__ void __launch_bounds__(kThreads)
    read_kv_kernel(const __grid_constant__ CacheView cache, int layer, int sequence, int slot,
                   float* __restrict__ out) {
  const int D = cache.head_dim, Hkv = cache.num_kv_heads;
  const int page = cache.page_of(sequence, slot);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = int64_t{2} * Hkv * D;
  if (index == 0) reinterpret_cast<int32_t*>(out)[size] = page;
  if (index >= size || page < 0) return;
  const int64_t block = index / D;
  const T* row =
      reinterpret_cast<const T*>(cache.data + cache.block(layer, static_cast<int>(block / Hkv),
                                                          page, static_cast<int>(block % Hkv))) +
      slot % kPageTokens * D;
  out[index] = to_f32(row[index % D]);
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

void compact_kv(const CacheView& cache, const DeviceMoves& moves, cudaStream_t stream) {
  const int64_t row_bytes = int64_t{cache.head_dim} * cache.element_bytes;
  const bool wide = row_bytes % 16 == 0;  // else of 4, since head_dim is even
  const int64_t words =
      int64_t{2} * cache.num_layers * cache.num_kv_heads * row_bytes / (wide ? 16 : 4);
  const dim3 grid(blocks_for(words),
                  static_cast<unsigned>(std::min(moves.num_lines, kMaxGridLines)));
  launch_overlapped(wide ? compact_kv_kernel<uint4> : compact_kv_kernel<uint32_t>, grid,
                    dim3(kThreads), 0, stream, cache, moves);
}

// The moves travel in one upload: sequence, len, n [B], path [B, max_path].
void CudaBackend::do_compact_kv(KvCache& cache, std::span<const KvMove> moves) {
  std::vector<KvMove> real;  // those that move a row
  int max_path = 0;
  for (const KvMove& move : moves) {
    if (move.n == 0 || move.path[move.n - 1] == move.n - 1) continue;
    real.push_back(move);
    max_path = std::max(max_path, move.n);
  }
  if (real.empty()) return;

  const size_t lines = real.size();
  std::vector<int32_t> packed(lines * (3 + static_cast<size_t>(max_path)));
  for (size_t i = 0; i < lines; ++i) {
    packed[i] = real[i].sequence;
    packed[lines + i] = real[i].len;
    packed[2 * lines + i] = real[i].n;
    std::copy(real[i].path, real[i].path + real[i].n,
              packed.data() + 3 * lines + i * static_cast<size_t>(max_path));
  }
  const auto num_bytes = static_cast<int64_t>(packed.size() * sizeof(int32_t));
  auto* memory = static_cast<int32_t*>(moves_.at_least(num_bytes, stream_.get()));
  staging_.upload(memory, packed.data(), num_bytes, stream_.get());
  DeviceMoves device;
  device.num_lines = static_cast<int>(lines);
  device.max_path = max_path;
  device.sequence = memory;
  device.len = memory + lines;
  device.n = memory + 2 * lines;
  device.path = memory + 3 * lines;
  cuda::compact_kv(view_of(cache), device, stream_.get());
}

void CudaBackend::do_copy_page(KvCache& cache, int src, int dst, int num_tokens) {
  const CacheView view = view_of(cache);
  const int64_t num_bytes = int64_t{num_tokens} * view.head_dim * view.element_bytes;
  const bool wide = num_bytes % 16 == 0;
  const dim3 grid(static_cast<unsigned>(2 * view.num_layers * view.num_kv_heads));
  launch(wide ? copy_page_kernel<uint4> : copy_page_kernel<uint32_t>, grid, dim3(kThreads), 0,
         stream_.get(), view, src, dst, num_bytes / (wide ? 16 : 4));
}

void CudaBackend::do_read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k,
                             float* v) {
  const int64_t size = int64_t{cache.shape.num_kv_heads} * cache.shape.head_dim;
  const int64_t num_bytes = (2 * size + 1) * static_cast<int64_t>(sizeof(float));
  auto* memory = static_cast<float*>(moves_.at_least(num_bytes, stream_.get()));
  dispatch_float(cache.shape.dtype, "read_kv", [&]<class T>() {
    launch(read_kv_kernel<T>, dim3(blocks_for(2 * size)), dim3(kThreads), 0, stream_.get(),
           view_of(cache), layer, sequence, slot, memory);
  });
  std::vector<float> row(static_cast<size_t>(2 * size + 1));
  do_download(row.data(), memory, num_bytes);
  int32_t page;
  std::memcpy(&page, row.data() + 2 * size, sizeof(page));
  MEDUSA_CHECK_ARG(page >= 0, "read_kv: slot ", slot, " of sequence ", sequence,
                   " is on no page of the cache's ", cache.shape.num_pages);
  std::copy(row.data(), row.data() + size, k);
  std::copy(row.data() + size, row.data() + 2 * size, v);
}

}  // namespace medusa::cuda
