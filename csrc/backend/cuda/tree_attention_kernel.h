// The kernel of tree_attention for f16 and bf16; tree_attention.cu says what it computes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "backend/cuda/tree_attention.h"
#include "backend/cuda/tree_attention_tail.h"
#include "medusa/error.h"

namespace medusa::cuda {

// Shared memory and launch bounds. kWalk: a block walks all splits and the tails of its tile; else
// it takes one item, a split of a tile or 16 tails.
template <int kD, bool kWalk>
struct AttentionLayout {
  static constexpr int kBlockBytes = Block<kD>::kBytes;
  static constexpr int kValueSlots = kD <= 128 ? 2 : 1;
  static constexpr int kPrefixBytes = (2 + kValueSlots) * kBlockBytes;
  static constexpr int kTailWarpPairs = kWalk ? 16 : 4;
  static constexpr int kTailSlots = kWalk ? 2 : 3;
  static constexpr int kTailPairs = kTailWarpPairs * kAttentionWarps;
  static constexpr int kTailBytes = kTailSlots * kBlockBytes + kTailPairs * kTailKeys * 4;
  static constexpr int kStreamBytes = kPrefixBytes > kTailBytes ? kPrefixBytes : kTailBytes;
  static constexpr int kQueryBytes = Queries<kD>::kKept ? 0 : kBlockBytes;
  static constexpr int kWeightBytes = kTailPairs * kPageTokens / 2 * 4;
  static constexpr int kBytes =
      kStreamBytes + kQueryBytes + kWeightBytes +
      kTilePairs * static_cast<int>(2 * sizeof(float2) + sizeof(SeenRow)) +
      static_cast<int>(sizeof(AttentionItem));
  static_assert(kD > 128 || kBytes <= 99 * 1024, "what the smallest GPUs have");
  static constexpr int kBlocksPerSm = kD <= 128 ? kMaxBlocksPerSm : 1;
};

template <class T, int kD, bool kWalk>
struct TileAttention {
  using Layout = AttentionLayout<kD, kWalk>;
  using TailOf = Tail<T, kD, Layout::kTailWarpPairs, Layout::kTailSlots>;

  const AttentionArgs& args;
  // Shared memory: keys 0, keys 1, values 0[, values 1], or TailOf's blocks and scores; queries
  // that are not kept in registers; TailOf's weights; then
  char* stream;
  __device__ float* weights() const {
    return reinterpret_cast<float*>(stream + Layout::kStreamBytes + Layout::kQueryBytes);
  }
  __device__ float2* tail_ml() const {  // [64]
    return reinterpret_cast<float2*>(weights() + Layout::kWeightBytes / 4);
  }
  __device__ float2& sum_ml(int pair) const {  // [64], of the splits merged so far
    return tail_ml()[kTilePairs + pair];
  }
  __device__ SeenRow* rows() const {  // [64]
    return reinterpret_cast<SeenRow*>(tail_ml() + 2 * kTilePairs);
  }
  __device__ AttentionItem& item() const {
    return *reinterpret_cast<AttentionItem*>(rows() + kTilePairs);
  }
  // [64][kD] in global memory, this block's: o of the splits merged so far
  __device__ float* sum(int pair) const {
    return args.partial_o + (int64_t{blockIdx.x} * kTilePairs + pair) * kD;
  }
  int kv_head = 0;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

  // The rows of an item.
  __device__ void begin(const AttentionItem& of, int head) {
    kv_head = head;
    __syncthreads();  // the item before this one is done with
    if (threadIdx.x == 0) item() = of;
    for (int i = static_cast<int>(threadIdx.x); i < of.num_pairs; i += kAttentionThreads) {
      const int pair = of.first_pair + i;
      rows()[i] = read_row(args, of.first_row + pair / args.group,
                           kv_head * args.group + pair % args.group);
    }
    __syncthreads();
  }

  // Starts the copy of the queries, zeros beyond the last pair.
  __device__ void load_queries(char* block, int count) const {
    const int head_dim = args.cache.head_dim, num_chunks = head_dim / 8;
    for (int i = static_cast<int>(threadIdx.x); i < count * Block<kD>::kChunks;
         i += kAttentionThreads) {
      const int pair = i / Block<kD>::kChunks, column = i % Block<kD>::kChunks;
      const bool valid = pair < item().num_pairs && column < num_chunks;
      const char* from = static_cast<const char*>(args.q);
      if (valid) {
        from += (args.pair(rows()[pair].row, rows()[pair].head) * head_dim + column * 8) * 2;
      }
      cp_async16(Block<kD>::chunk(block, pair, column), from, valid);
    }
    cp_async_commit();
  }

  __device__ int page_id(int page) const {
    return args.cache.page_of(item().sequence, int64_t{page} * kPageTokens);
  }

  __device__ void load(int kv, int page, int id, int end_page, int first_slot) const {
    if (page < end_page) {
      char* to =
          stream + (kv == 0 ? page % 2 : 2 + page % Layout::kValueSlots) * Layout::kBlockBytes;
      Block<kD>::load(to, block_of(args.cache, args.layer, kv, id, kv_head), args.cache.head_dim,
                      kv == 0 ? 0 : first_slot - page * kPageTokens, args.cache.data);
    }
    cp_async_commit();
  }

  // Blocks [begin_page, end_page) for those rows whose prefix they belong to. A lane holds rows
  // g = lane / 4 and g + 8 of its warp's 16 pairs.
  __device__ void attend_prefix(Queries<kD>& queries, int begin_page, int end_page) const {
    // What the rows of this lane, warp and block see.
    int row_first[2], row_end[2], warp_first = INT_MAX, warp_end = 0, block_first = INT_MAX;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pair = 16 * warp() + lane() / 4 + 8 * h;
      row_first[h] = pair < item().num_pairs ? rows()[pair].first : INT_MAX;
      row_end[h] = pair < item().num_pairs ? rows()[pair].end_page : 0;
      warp_first = min(warp_first, row_first[h]);
      warp_end = max(warp_end, row_end[h]);
    }
    warp_first = __reduce_min_sync(kAllLanes, warp_first);
    warp_end = __reduce_max_sync(kAllLanes, warp_end);
    for (int i = lane(); i < item().num_pairs; i += kWarp) {
      block_first = min(block_first, rows()[i].first);
    }
    block_first = __reduce_min_sync(kAllLanes, block_first);

    float o[kD / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
    const int first_page = max(begin_page, block_first / kPageTokens);
    const int first_id = page_id(first_page);
    int next_id = page_id(first_page + 1), later_id = page_id(first_page + 2);
    // Queries kept in registers pass through the slot of values that is needed last.
    char* query_block = Queries<kD>::kKept
                            ? stream + (2 + (first_page + 1) % 2) * Layout::kBlockBytes
                            : stream + Layout::kStreamBytes;
    load_queries(query_block, kTilePairs);
    load(0, first_page, first_id, end_page, 0);
    load(1, first_page, first_id, end_page, block_first);
    load(0, first_page + 1, next_id, end_page, 0);
    cp_async_wait<3>();
    __syncthreads();
    queries.fetch(query_block, 16 * warp());
    for (int page = first_page; page < end_page; ++page) {
      const int slot = page * kPageTokens;
      const bool warp_on = page < warp_end && slot + kPageTokens > warp_first;
      const bool on[2] = {page < row_end[0] && slot + kPageTokens > row_first[0],
                          page < row_end[1] && slot + kPageTokens > row_first[1]};
      char* keys = stream + page % 2 * Layout::kBlockBytes;
      char* values = stream + (2 + page % Layout::kValueSlots) * Layout::kBlockBytes;

      cp_async_wait<2>();
      __syncthreads();  // keys have come; the values before these are done with
      if constexpr (Layout::kValueSlots == 2) load(1, page + 1, next_id, end_page, block_first);
      uint32_t p[kPageTokens / 16][4];
      float correction[2] = {1.0f, 1.0f};
      if (warp_on) {
        weigh(queries, keys, slot, row_first, on, m, l, correction, p);
      }

      cp_async_wait<Layout::kValueSlots == 2 ? 2 : 0>();
      __syncthreads();  // values have come; these keys are done with
      load(0, page + 2, later_id, end_page, 0);
      if (warp_on) add_values(values, on, correction, p, o);
      if constexpr (Layout::kValueSlots == 1) {
        __syncthreads();
        load(1, page + 1, next_id, end_page, block_first);
      }
      next_id = later_id;
      later_id = page_id(page + 3);

      if (kWalk && starts_split(page + 1) && page + 1 < end_page) {
        finish_split(o, m, l);
      }
    }
    cp_async_wait<0>();
    finish_split(o, m, l);
  }

 private:
  // Scores of a block of keys to weights in T for the tensor cores; m and l of the rows it is for.
  __device__ __forceinline__ void weigh(const Queries<kD>& queries, char* keys, int slot,
                                        const int (&row_first)[2], const bool (&on)[2],
                                        float (&m)[2], float (&l)[2], float (&correction)[2],
                                        uint32_t (&p)[4][4]) const {
    float s[kPageTokens / 8][4] = {};
    add_scores<T, kD>(queries, keys, 0, s);
    float m_new[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < kPageTokens / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2;
        s[n][e] *= args.scale_log2;
        if (args.window > 0 && slot + 8 * n + 2 * (lane() % 4) + e % 2 < row_first[h]) {
          s[n][e] = -INFINITY;
        }
        m_new[h] = fmaxf(m_new[h], s[n][e]);
      }
    }
    float total[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      m_new[h] = fmaxf(m_new[h], __shfl_xor_sync(kAllLanes, m_new[h], 1));
      m_new[h] = fmaxf(m_new[h], __shfl_xor_sync(kAllLanes, m_new[h], 2));
      correction[h] = exp2_approx(m[h] - m_new[h]);
    }
#pragma unroll
    for (int n = 0; n < kPageTokens / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float first = exp2_approx(s[n][2 * h] - m_new[h]);
        const float second = exp2_approx(s[n][2 * h + 1] - m_new[h]);
        total[h] += first + second;
        p[n / 2][n % 2 * 2 + h] = pack<T>(first, second);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!on[h]) continue;
      m[h] = m_new[h];
      l[h] = fmaf(l[h], correction[h], total[h]);
    }
  }

  // o = o * correction + p V. The products of a block are summed apart, so that a row that the
  // block is not for keeps its o as it is, whatever is in V.
  __device__ __forceinline__ void add_values(char* values, const bool (&on)[2],
                                             const float (&correction)[2],
                                             const uint32_t (&p)[4][4],
                                             float (&o)[kD / 8][4]) const {
    char* first = Block<kD>::chunk(values, lane() % 16, lane() / 16);
#pragma unroll
    for (int d = 0; d < kD / 8; d += 2) {
      float added[2][4] = {};
#pragma unroll
      for (int k = 0; k < kPageTokens / 16; ++k) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, Block<kD>::moved(first, d) + 16 * k * Block<kD>::kRowBytes);
        mma_16816<T>(added[0], p[k], b[0], b[1]);
        mma_16816<T>(added[1], p[k], b[2], b[3]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!on[h]) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            o[d + i][e] = fmaf(o[d + i][e], correction[h], added[i][e]);
          }
        }
      }
    }
  }

  // Adds a split to the running sum, or writes it as a part; then starts the next one.
  __device__ __forceinline__ void finish_split(float (&o)[kD / 8][4], float (&m)[2],
                                               float (&l)[2]) const {
    const int t = lane() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pair = 16 * warp() + lane() / 4 + 8 * h;
      l[h] += __shfl_xor_sync(kAllLanes, l[h], 1);
      l[h] += __shfl_xor_sync(kAllLanes, l[h], 2);
      const bool any = pair < item().num_pairs && m[h] != -INFINITY;
      if constexpr (kWalk) {
        const float2 old = sum_ml(pair);
        __syncwarp();
        if (any) {
          const MergeScale merge(old.x, old.y, m[h], l[h]);
          if (t == 0) sum_ml(pair) = make_float2(merge.m, merge.l);
          auto* to = reinterpret_cast<float2*>(sum(pair) + 2 * t);
#pragma unroll
          for (int d = 0; d < kD / 8; ++d) {
            const float2 before = old.x == -INFINITY ? make_float2(0.0f, 0.0f) : to[4 * d];
            to[4 * d] = make_float2(merge(before.x, o[d][2 * h]), merge(before.y, o[d][2 * h + 1]));
          }
        }
      } else if (pair < item().num_pairs) {
        const int64_t at = args.partial(1 + item().part, rows()[pair].row, rows()[pair].head);
        if (t == 0) args.partial_ml[at] = make_float2(m[h], l[h]);
        auto* to = reinterpret_cast<float2*>(args.partial_o + at * args.cache.head_dim + 2 * t);
#pragma unroll
        for (int d = 0; d < kD / 8; ++d) {
          if (any && 8 * d < args.cache.head_dim) {
            to[4 * d] = make_float2(o[d][2 * h], o[d][2 * h + 1]);
          }
        }
      }
      m[h] = -INFINITY;
      l[h] = 0.0f;
#pragma unroll
      for (int d = 0; d < kD / 8; ++d) o[d][2 * h] = o[d][2 * h + 1] = 0.0f;
    }
  }

 public:
  __device__ void clear_sum() const {
    if (lane() < 16) sum_ml(16 * warp() + lane()) = make_float2(-INFINITY, 0.0f);
    __syncwarp();
  }

  // The tails of the item's pairs; where the block walks they end the rows.
  __device__ void attend_tail(Queries<kD>& queries) const {
    __syncthreads();  // blocks of the prefix are done with
    const TailOf tail{
        args,      rows(),
        item(),    kv_head,
        stream,    reinterpret_cast<float*>(stream + Layout::kTailSlots * Layout::kBlockBytes),
        weights(), tail_ml()};
    char* query_block =
        stream + (Queries<kD>::kKept ? (Layout::kTailSlots - 1) * Layout::kBlockBytes
                                     : Layout::kStreamBytes);
    if (!kWalk) load_queries(query_block, kTailItemPairs);
    const auto fetch = [&] {
      if (!kWalk) queries.fetch(query_block, 0);
    };
    constexpr int kColumns = TailOf::kColumns;
    tail.run(queries, fetch, [&](int pair, float2 ml, float(&o)[kColumns]) {
      const SeenRow& row = rows()[pair];
      const int column = lane() * kColumns;
      if constexpr (kWalk) {
        const float2 old = sum_ml(pair);
        Columns<kColumns> before = {};
        if (old.x != -INFINITY) before = load_columns<kColumns>(sum(pair) + column);
        const MergeScale merge(old.x, old.y, ml.x, ml.y);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[c] = merge(before.value[c], o[c]);
        store_result(args, row.row, row.head, column, o, merge.l);
      } else {
        const int64_t at = args.partial(0, row.row, row.head);
        if (lane() == 0) args.partial_ml[at] = ml;
        if (column >= args.cache.head_dim) return;
        Columns<kColumns> columns;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) columns.value[c] = o[c];
        store_columns(args.partial_o + at * args.cache.head_dim + column, columns);
      }
    });
  }
};

// A fixed grid takes the items in turn, every second round backwards: the first items are the
// longest.
template <class T, int kD, bool kWalk>
__global__ void __launch_bounds__(kAttentionThreads, AttentionLayout<kD, kWalk>::kBlocksPerSm)
    tree_attention_kernel(const __grid_constant__ AttentionArgs args) {
  MEDUSA_DYNAMIC_SHARED(char, shared);
  begin_overlapped();
  TileAttention<T, kD, kWalk> work{args, shared, {}};
  Queries<kD> queries;
  const int num_items = *args.plan.num_items, num_kv_heads = args.cache.num_kv_heads;
  const int num_blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  for (int64_t start = 0, round = 0; start < int64_t{num_items} * num_kv_heads;
       start += num_blocks, ++round) {
    const int64_t index = start + (round % 2 == 0 ? block : num_blocks - 1 - block);
    const int place = static_cast<int>(index / num_kv_heads);
    if (place >= num_items) continue;
    // The later tiles of a prompt see more.
    const AttentionItem item = args.plan.items[kWalk ? num_items - 1 - place : place];
    work.begin(item, static_cast<int>(index % num_kv_heads));
    if constexpr (kWalk) {
      work.clear_sum();
      work.attend_prefix(queries, 0, item.end_page);
      work.attend_tail(queries);
    } else if (item.part == kTailPart) {
      work.attend_tail(queries);
    } else {
      work.attend_prefix(queries, split_first_page(item.part),
                         min(split_first_page(item.part + 1), item.end_page));
    }
  }
}

template <class T, int kD>
void launch_tree_attention(const AttentionArgs& args, bool walk, int64_t num_items, int num_sms,
                           cudaStream_t stream) {
  const auto run = [&](auto kernel, int blocks_per_sm, int smem_bytes) {
    if constexpr (kD > 128) {  // all else fits everywhere
      int device = 0, allowed = 0;
      CUDA_CHECK(cudaGetDevice(&device));
      CUDA_CHECK(cudaDeviceGetAttribute(&allowed, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
      if (smem_bytes > allowed) {
        throw UnsupportedError(concat("tree_attention: head_dim ", args.cache.head_dim, " needs ",
                                      smem_bytes, " bytes of shared memory; this GPU has ",
                                      allowed));
      }
    }
    const int64_t num_blocks =
        std::min(num_items * args.cache.num_kv_heads, int64_t{num_sms} * blocks_per_sm);
    launch_overlapped(kernel, dim3(static_cast<unsigned>(num_blocks)), dim3(kAttentionThreads),
                      static_cast<size_t>(smem_bytes), stream, args);
  };
  if (walk) {
    using Layout = AttentionLayout<kD, true>;
    run(tree_attention_kernel<T, kD, true>, Layout::kBlocksPerSm, Layout::kBytes);
  } else {
    using Layout = AttentionLayout<kD, false>;
    run(tree_attention_kernel<T, kD, false>, Layout::kBlocksPerSm, Layout::kBytes);
  }
}

}  // namespace medusa::cuda
