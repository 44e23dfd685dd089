// The tail of tree_attention: the last 64 to 128 keys of every row, whose slots may have gaps.
//
// Scores come from the tensor cores, slot by slot; they are put into shared memory by logical
// order, where one warp takes the maximum, the weights and their sum (lane j % 32 adds the weights
// j, j + 32, .. of the row, then the lanes are summed: an order by position, too). Then the values
// are added slot by slot, which is the logical order, a row skipping the slots that it does not
// see. The pairs of a warp share the loads of V.
//
// Cost      A pair of (row, head) with 96 keys: 192 D flops on the tensor cores for scores, 96 D
//           fma for values. 7B, 64 nodes: 25 Mfma a layer, 0.9 us at 28.7 Tfma/s (132 SMs, 128 a
//           cycle, 1.7 GHz); 4 pairs share a load of V, 12.6 MB from shared memory. 8B: the same
//           fma; the heads of a group see the same slots, so none of them is idle
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/cuda/tree_attention_tile.h"

namespace medusa::cuda {

// kPairs: of a warp. 16: every warp scores its own 16 pairs. 4: the block has 16 pairs, and the
// warps share out the keys. kSlots: blocks that fit into shared memory.
template <class T, int kD, int kPairs, int kSlots>
struct Tail {
  static_assert(kPairs == 16 || kPairs == 4);
  static constexpr int kBlockPairs = kPairs * kAttentionWarps;
  static constexpr int kColumns = kD / kWarp;  // of a lane
  static constexpr int kHalf = kPageTokens / 2;
  static constexpr int kScoreBytes = kBlockPairs * kTailKeys * 4;
  static constexpr int kWeightBytes = kBlockPairs * kHalf * 4;
  static constexpr float kUnseen = -1.0f;  // in place of a weight

  const AttentionArgs& args;
  const SeenRow* rows;  // of the pairs, in shared memory
  const AttentionItem& item;
  int kv_head;
  char* blocks;    // kSlots blocks
  float* scores;   // [kBlockPairs][kTailKeys], then the weights
  float* weights;  // of the page's half at hand: [warp][slot][pair]
  float2* ml;      // [kBlockPairs]

  __device__ float& score(int pair, int key) const {
    return scores[pair * kTailKeys + (key ^ ((pair & 7) << 2))];
  }

  __device__ int next_page(int page) const {
    int next = kNoPage;
    for (int i = lane(); i < item.num_pairs; i += kWarp) {
      next = min(next, rows[i].next_tail_page(page));
    }
    return __reduce_min_sync(kAllLanes, next);
  }

  // Keys, then values, of all pages that hold a key of the tail.
  struct Step {
    int kv = 0, page = kNoPage;
  };
  __device__ Step after(Step step, int first_page) const {
    if (step.page == kNoPage) return step;
    step.page = next_page(step.page + 1);
    return step.page == kNoPage && step.kv == 0 ? Step{1, first_page} : step;
  }

  __device__ void load(Step step, int slot) const {
    if (step.page != kNoPage) {
      const int page = args.cache.page_of(item.sequence, int64_t{step.page} * kPageTokens);
      Block<kD>::load(blocks + slot * Block<kD>::kBytes,
                      block_of(args.cache, args.layer, step.kv, page, kv_head), args.cache.head_dim,
                      0, args.cache.data);
    }
    cp_async_commit();
  }

  // Calls emit(pair, ml, o) for each pair, by its warp; o: columns [kColumns * lane, ..). Every
  // thread of the block takes part. `queries` are the warp's 16 (kPairs = 16) or the block's;
  // fetch() gets them where their copy was the last one started.
  template <class Fetch, class Emit>
  __device__ void run(const Queries<kD>& queries, Fetch fetch, Emit emit) const {
    const int first_page = next_page(0);
    Step loading{0, first_page}, step = loading;
    int num_loaded = 0;
    for (; num_loaded < kSlots - 1; ++num_loaded) {
      load(loading, num_loaded);
      loading = after(loading, first_page);
    }
    cp_async_wait<kSlots - 1>();
    __syncthreads();
    fetch();

    float o[kPairs][kColumns] = {};
    int num_scored[2] = {};  // keys so far of this lane's rows of scores
    int num_added = 0;       // keys so far of the pair whose weights this lane lays out
    bool weighed = false;
    for (int slot = 0; step.page != kNoPage; slot = slot + 1 < kSlots ? slot + 1 : 0) {
      cp_async_wait<kSlots - 2>();
      __syncthreads();  // the block has come, and the one before it is done with
      load(loading, slot > 0 ? slot - 1 : kSlots - 1);
      loading = after(loading, first_page);
      char* block = blocks + slot * Block<kD>::kBytes;
      if (step.kv == 0) {
        score_page(queries, step.page, block, num_scored);
      } else {
        if (!weighed) weigh();  // the barrier above has shown all scores
        weighed = true;
        add_page(step.page, block, num_added, o);
      }
      step = after(step, first_page);
    }
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int pair = warp() * kPairs + k;
      if (pair < item.num_pairs) {
        emit(pair, weighed ? ml[pair] : make_float2(-INFINITY, 0.0f), o[k]);
      }
    }
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

  __device__ void score_page(const Queries<kD>& queries, int page, char* keys,
                             int (&num_scored)[2]) const {
    constexpr int kTiles = kPairs == 16 ? 8 : 2;
    const int first_key = kPairs == 16 ? 0 : 16 * warp();
    float s[kTiles][4] = {};
    add_scores<T, kD>(queries, keys, first_key, s);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pair = (kPairs == 16 ? 16 * warp() : 0) + lane() / 4 + 8 * h;
      const uint64_t mask = pair < item.num_pairs ? rows[pair].tail_mask(page) : 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = first_key + 8 * n + 2 * (lane() % 4) + e;
          const int key = num_scored[h] + count_bits(mask & bits_below(i));
          if ((mask >> i & 1) != 0 && key < kTailKeys) {
            score(pair, key) = s[n][2 * h + e] * args.scale_log2;
          }
        }
      }
      num_scored[h] += count_bits(mask);
    }
  }

  // Scores to weights, for the pairs of this warp.
  __device__ void weigh() const {
    for (int k = 0; k < kPairs; ++k) {
      const int pair = warp() * kPairs + k;
      if (pair >= item.num_pairs) break;
      const int num_keys = rows[pair].num_tail_keys;
      float s[kTailKeys / kWarp], m = -INFINITY, l = 0.0f;
#pragma unroll
      for (int i = 0; i < kTailKeys / kWarp; ++i) {
        const int key = lane() + i * kWarp;
        s[i] = key < num_keys ? score(pair, key) : -INFINITY;
        m = fmaxf(m, s[i]);
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, step));
      }
#pragma unroll
      for (int i = 0; i < kTailKeys / kWarp; ++i) {
        const int key = lane() + i * kWarp;
        if (key >= num_keys) continue;
        s[i] = exp2_approx(s[i] - m);
        score(pair, key) = s[i];
        l += s[i];
      }
      l = warp_sum(l);
      if (lane() == 0) ml[pair] = make_float2(m, l);
    }
    __syncwarp();
  }

  __device__ void add_page(int page, char* values, int& num_added,
                           float (&o)[kPairs][kColumns]) const {
    constexpr int kSlotLanes = kWarp / kPairs;
    const int own = lane() % kPairs, pair = warp() * kPairs + own;
    const uint64_t mask = pair < item.num_pairs ? rows[pair].tail_mask(page) : 0;
    uint32_t seen[2] = {static_cast<uint32_t>(mask), static_cast<uint32_t>(mask >> 32)};
    float* laid = weights + warp() * kHalf * kPairs;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t by_any = __reduce_or_sync(kAllLanes, seen[h]);
      if (by_any == 0) continue;
#pragma unroll 4
      for (int i = lane() / kPairs; i < kHalf; i += kSlotLanes) {
        const int key = num_added + count_bits(mask & bits_below(kHalf * h + i));
        laid[i * kPairs + own] =
            (seen[h] >> i & 1) != 0 && key < kTailKeys ? score(pair, key) : kUnseen;
      }
      __syncwarp();
      for (int i = 0; i < kHalf; i += 4) {
        if ((by_any >> i & 15) == 0) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) add_slot(values, kHalf * h + i + j, laid + (i + j) * kPairs, o);
      }
      __syncwarp();
    }
    num_added += count_bits(mask);
  }

  __device__ __forceinline__ void add_slot(char* values, int slot, const float* laid,
                                           float (&o)[kPairs][kColumns]) const {
    const int byte = lane() * kColumns * 2;
    const char* from = Block<kD>::chunk(values, slot, byte / 16) + byte % 16;
    const auto packed = *reinterpret_cast<const Packed<uint32_t, kColumns / 2>*>(from);
    float v[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      const float2 two = unpack<T>(packed.value[c / 2]);
      v[c] = two.x;
      v[c + 1] = two.y;
    }
#pragma unroll
    for (int k = 0; k < kPairs; k += 4) {
      const auto four = *reinterpret_cast<const Packed<float, 4>*>(laid + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = four.value[i];
        if (weight == kUnseen) continue;  // V may be NaN here; a NaN weight passes
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[k + i][c] = fmaf(weight, v[c], o[k + i][c]);
      }
    }
  }
};

}  // namespace medusa::cuda
