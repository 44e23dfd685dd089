// What the kernels of tree_attention are given, and what one row sees.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <climits>
#include <cstdint>

#include "backend/cuda/columns.h"
#include "backend/cuda/gpu.h"
#include "backend/cuda/layout.h"
#include "backend/cuda/tree_attention_plan.h"

namespace medusa::cuda {

constexpr int kNoPage = INT_MAX;

struct AttentionArgs {
  CacheView cache;
  const int32_t* sequence = nullptr;
  const int32_t* position = nullptr;
  const int32_t* prefix_len = nullptr;
  const uint64_t* ancestors = nullptr;  // [R, kAncestorWords]
  const void* q = nullptr;
  void* out = nullptr;
  AttentionPlan plan;
  // Of each part of a (row, head): part 0 is its tail, part 1 + s its split s. Blocks that walk
  // keep their sums here, [blocks, 64, 64 | 128 | 256].
  float* partial_o = nullptr;    // [parts, R, H, D]
  float2* partial_ml = nullptr;  // [parts, R, H]
  int num_rows = 0, num_heads = 0, group = 0;
  int layer = 0, window = 0;
  float scale_log2 = 0.0f;
  DType out_type = DType::f32;
  uint8_t rest[3] = {};  // no stray bytes: the emulator looks for host pointers among arguments

  MEDUSA_HD int64_t pair(int row, int head) const { return int64_t{row} * num_heads + head; }
  MEDUSA_HD int64_t partial(int part, int row, int head) const {
    return (int64_t{part} * num_rows + row) * num_heads + head;
  }
};

__device__ __forceinline__ int count_bits(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int lowest_bit(uint64_t bits) { return __ffsll(bits) - 1; }
__device__ __forceinline__ uint64_t bits_below(int n) {
  return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// A row as attention sees it: the positions [first, 64 * end_page) in whole blocks, then the tail:
// the slots [tail_begin, prefix_len) and those of the ancestors, in this order.
struct SeenRow {
  uint64_t ancestors[kAncestorWords] = {};  // those inside the window
  int row = 0, head = 0;
  int end_page = 0, first = 0;
  int tail_begin = 0, prefix_len = 0;
  int num_tail_keys = 0;
  uint32_t rest[3] = {};  // 72 bytes, so that lanes that read a field of many rows use many banks

  // The slots of the tail that lie on this page.
  __device__ uint64_t tail_mask(int page) const {
    const int slot = page * kPageTokens;
    const int low = max(tail_begin - slot, 0), high = min(prefix_len - slot, kPageTokens);
    uint64_t mask = low < high ? bits_below(high) & ~bits_below(low) : 0;
    const int shift = slot - prefix_len;  // of the ancestor on the page's first slot
    if (shift <= -kPageTokens || shift >= kMaxTreeNodes) return mask;
    if (shift < 0) return mask | ancestors[0] << -shift;
    const int word = shift / 64, bit = shift % 64;
    mask |= ancestors[word] >> bit;
    if (bit > 0 && word + 1 < kAncestorWords) mask |= ancestors[word + 1] << (64 - bit);
    return mask;
  }

  // The first page from `page` on that holds a slot of the tail.
  __device__ int next_tail_page(int page) const {
    if (tail_begin < prefix_len && page * kPageTokens < prefix_len) {
      return max(page, tail_begin / kPageTokens);
    }
    const int node = max(page * kPageTokens - prefix_len, 0);
    for (int word = node / 64; word < kAncestorWords; ++word) {
      const uint64_t bits =
          word == node / 64 ? ancestors[word] & ~bits_below(node % 64) : ancestors[word];
      if (bits != 0) return (prefix_len + 64 * word + lowest_bit(bits)) / kPageTokens;
    }
    return kNoPage;
  }
};

__device__ inline SeenRow read_row(const AttentionArgs& args, int row, int head) {
  SeenRow seen;
  seen.row = row;
  seen.head = head;
  const int position = max(args.position[row], 0);
  seen.prefix_len =
      min(max(args.prefix_len[row], 0), min(args.cache.max_pages, INT_MAX / 64 - 8) * kPageTokens);
  seen.end_page = tail_page(position, seen.prefix_len, args.cache.max_pages);
  seen.first = args.window > 0 ? max(position - args.window + 1, 0) : 0;
  seen.tail_begin = min(max(seen.end_page * kPageTokens, seen.first), seen.prefix_len);

  int hidden = max(seen.first - seen.prefix_len, 0);  // ancestors before the window
  int num_ancestors = 0;
  for (int word = 0; word < kAncestorWords; ++word) {
    uint64_t bits = args.ancestors[int64_t{row} * kAncestorWords + word];
    for (; hidden > 0 && bits != 0; --hidden) bits &= bits - 1;
    seen.ancestors[word] = bits;
    num_ancestors += count_bits(bits);
  }
  seen.num_tail_keys = min(seen.prefix_len - seen.tail_begin + num_ancestors, kTailKeys);
  return seen;
}

// The [64, D] block of keys (kv = 0) or values (kv = 1); null where the table names no page.
__device__ __forceinline__ const char* block_of(const CacheView& cache, int layer, int kv, int page,
                                                int kv_head) {
  return page < 0 ? nullptr : cache.data + cache.block(layer, kv, page, kv_head);
}

// Softmax over some of the keys: o = sum of 2^(s - m) v, l = sum of 2^(s - m); m = -inf: no keys.
// A merge takes the next keys in; where there are none it changes no bit.
struct MergeScale {
  float m, l, old_scale, new_scale;
  __device__ MergeScale(float m_old, float l_old, float m_new, float l_new) {
    m = fmaxf(m_old, m_new);
    old_scale = exp2_approx(m_old - m);
    new_scale = exp2_approx(m_new - m);
    l = fmaf(l_new, new_scale, l_old * old_scale);
  }
  __device__ float operator()(float o_old, float o_new) const {
    return fmaf(o_new, new_scale, o_old * old_scale);
  }
};

// Columns [column, column + kWidth) of o / l.
template <int kWidth>
__device__ __forceinline__ void store_result(const AttentionArgs& args, int row, int head,
                                             int column, const float (&o)[kWidth], float l) {
  if (column >= args.cache.head_dim) return;
  const float inverse = l > 0.0f ? 1.0f / l : l == l ? 0.0f : l;  // a row sees itself, so l > 0
  Columns<kWidth> columns;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) columns.value[i] = o[i] * inverse;
  const int64_t at = args.pair(row, head) * args.cache.head_dim + column;
  if (args.out_type == DType::f32) {
    store_columns(static_cast<float*>(args.out) + at, columns);
  } else if (args.out_type == DType::f16) {
    store_columns(static_cast<__half*>(args.out) + at, columns);
  } else {
    store_columns(static_cast<__nv_bfloat16*>(args.out) + at, columns);
  }
}

}  // namespace medusa::cuda
