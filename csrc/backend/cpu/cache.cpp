// Moves inside the cache: compact_kv, copy_page. No arithmetic, so bits stay as they are.
// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/layout.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

// A row of V is contiguous; a row of K is one word in each of its block's D / pair lines.
void move_row(const KvCache& cache, int64_t layer, int64_t head, int64_t src_page, int64_t src,
              int64_t dst_page, int64_t dst) {
  const int64_t D = cache.shape.head_dim, bytes = dtype_bytes(cache.shape.dtype),
                pair = pair_of(cache.shape.dtype);
  const int64_t word = pair * bytes;
  const char* from = cache_block(cache, layer, 0, src_page, head) + src * word;
  char* to = cache_block(cache, layer, 0, dst_page, head) + dst * word;
  for (int64_t line = 0; line < D / pair; ++line, from += kPage * word, to += kPage * word) {
    std::memcpy(to, from, static_cast<size_t>(word));
  }
  std::memcpy(cache_block(cache, layer, 1, dst_page, head) + dst * D * bytes,
              cache_block(cache, layer, 1, src_page, head) + src * D * bytes,
              static_cast<size_t>(D * bytes));
}

}  // namespace

// Traffic   2 * 2 L n Hkv D bytes(cache) for every move; no flops
// In place  i walks upwards and path[i] >= i, so no row is overwritten before it is read.
void CpuBackend::do_compact_kv(KvCache& cache, std::span<const KvMove> moves) {
  const auto page_of = [&](const KvMove& move, int64_t slot) {
    return cache.page_table[int64_t{move.sequence} * cache.max_pages + slot / kPage];
  };
  int64_t num_rows = 0;
  for (const KvMove& move : moves) {
    for (int i = 0; i < move.n; ++i) {
      if (move.path[i] == i) continue;
      ++num_rows;
      for (const int64_t slot : {int64_t{move.len} + i, int64_t{move.len} + move.path[i]}) {
        MEDUSA_CHECK_ARG(page_of(move, slot) >= 0 && page_of(move, slot) < cache.shape.num_pages,
                         "compact_kv: slot ", slot, " of sequence ", move.sequence, " is on page ",
                         page_of(move, slot), "; the cache has ", cache.shape.num_pages);
      }
    }
  }
  if (num_rows == 0) return;
  const int64_t Hkv = cache.shape.num_kv_heads;
  split(cache.shape.num_layers * Hkv, num_rows * cache.shape.head_dim * 4,
        [&](int64_t first, int64_t last) {
          for (int64_t item = first; item < last; ++item) {
            for (const KvMove& move : moves) {
              for (int i = 0; i < move.n; ++i) {
                const int64_t src = int64_t{move.len} + move.path[i], dst = int64_t{move.len} + i;
                if (src == dst) continue;
                move_row(cache, item / Hkv, item % Hkv, page_of(move, src), src % kPage,
                         page_of(move, dst), dst % kPage);
              }
            }
          }
        });
}

void CpuBackend::do_copy_page(KvCache& cache, int src, int dst, int num_tokens) {
  const int64_t D = cache.shape.head_dim, bytes = dtype_bytes(cache.shape.dtype),
                pair = pair_of(cache.shape.dtype);
  const int64_t Hkv = cache.shape.num_kv_heads, line = kPage * pair * bytes;
  split(cache.shape.num_layers * Hkv, 2 * num_tokens * D, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t layer = item / Hkv, head = item % Hkv;
      const char* from = cache_block(cache, layer, 0, src, head);
      char* to = cache_block(cache, layer, 0, dst, head);
      for (int64_t i = 0; i < D / pair; ++i) {
        std::memcpy(to + i * line, from + i * line, static_cast<size_t>(num_tokens * pair * bytes));
      }
      std::memcpy(cache_block(cache, layer, 1, dst, head), cache_block(cache, layer, 1, src, head),
                  static_cast<size_t>(num_tokens * D * bytes));
    }
  });
}

void CpuBackend::do_read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k,
                            float* v) {
  const int64_t D = cache.shape.head_dim, bytes = dtype_bytes(cache.shape.dtype),
                pair = pair_of(cache.shape.dtype);
  const int32_t page = cache.page_table[int64_t{sequence} * cache.max_pages + slot / kPage];
  MEDUSA_CHECK_ARG(page >= 0 && page < cache.shape.num_pages, "read_kv: slot ", slot,
                   " of sequence ", sequence, " is on page ", page, "; the cache has ",
                   cache.shape.num_pages);
  for (int64_t head = 0; head < cache.shape.num_kv_heads; ++head) {
    const char* keys = cache_block(cache, layer, 0, page, head);
    for (int64_t d = 0; d < D; ++d) {
      kernels_.convert(keys + packed_index(d, slot % kPage, kPage, pair) * bytes, cache.shape.dtype,
                       k + head * D + d, DType::f32, 1);
    }
    kernels_.convert(cache_block(cache, layer, 1, page, head) + slot % kPage * D * bytes,
                     cache.shape.dtype, v + head * D, DType::f32, D);
  }
}

}  // namespace medusa::cpu
