// Where an element lies in the paged cache; host and device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "medusa/backend.h"
#include "medusa/noise.h"

namespace medusa::cuda {

// The cache as kernels see it: [layer][K|V][page][kv_head][64][D], D contiguous, both K and V.
struct CacheView {
  char* data = nullptr;
  const int32_t* page_table = nullptr;  // [num_sequences, max_pages]
  int num_layers = 0, num_pages = 0, num_kv_heads = 0, head_dim = 0;
  int num_sequences = 0, max_pages = 0;
  int element_bytes = 2;

  // Byte offset of the [64][D] block of one (layer, K = 0 | V = 1, page, kv head).
  MEDUSA_HD int64_t block(int layer, int kv, int page, int head) const {
    return (((int64_t{layer} * 2 + kv) * num_pages + page) * num_kv_heads + head) * kPageTokens *
           head_dim * element_bytes;
  }
  // The page of a slot; -1 where the table names none, so that a kernel can leave it alone.
  MEDUSA_HD int page_of(int sequence, int64_t slot) const {
    if (sequence < 0 || sequence >= num_sequences || slot < 0 || slot / kPageTokens >= max_pages) {
      return -1;
    }
    const int32_t page = page_table[int64_t{sequence} * max_pages + slot / kPageTokens];
    return page >= 0 && page < num_pages ? page : -1;
  }
};

inline CacheView view_of(const KvCache& cache) {
  const KvShape& shape = cache.shape;
  CacheView view;
  view.data = static_cast<char*>(cache.buffer->data());
  view.page_table = cache.page_table;
  view.num_layers = shape.num_layers;
  view.num_pages = shape.num_pages;
  view.num_kv_heads = shape.num_kv_heads;
  view.head_dim = shape.head_dim;
  view.num_sequences = cache.num_sequences;
  view.max_pages = cache.max_pages;
  view.element_bytes = static_cast<int>(dtype_bytes(shape.dtype));
  return view;
}

}  // namespace medusa::cuda
