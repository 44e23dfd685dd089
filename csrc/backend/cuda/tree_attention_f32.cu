// tree_attention of an f32 cache, for small models and for tests: plain rather than fast.
//
//   online softmax over 32 keys at a time, cut at logical positions that are multiples of 32
//
// Shapes    q [R, H, D] f32, out [R, H, D] f32 | f16 | bf16; D <= 256
// Launch    one warp for each (row, head): a lane takes a key for the scores and every 32nd column
//           for the values
// Traffic   K and V once for each (row, head): 8 * S * D bytes
// Bits      A score is the fmaf over D in rising order, the values are added by fmaf in logical
//           order, and blocks are cut by logical positions: tree and plain decoding agree.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/reduce.h"
#include "backend/cuda/tree_attention.h"
#include "medusa/error.h"

namespace medusa::cuda {
namespace {

constexpr int kWarps = 4, kMaxColumns = 8;  // columns of a lane

// Slot of the n-th ancestor.
__device__ int ancestor_slot(const SeenRow& seen, const uint64_t* ancestors, int n) {
  for (int word = 0; word < kAncestorWords; ++word) {
    uint64_t bits = ancestors[word];
    const int count = count_bits(bits);
    if (n >= count) {
      n -= count;
      continue;
    }
    for (; n > 0; --n) bits &= bits - 1;
    return seen.prefix_len + 64 * word + lowest_bit(bits);
  }
  return -1;
}

__global__ void __launch_bounds__(kWarps* kWarp)
    tree_attention_f32_kernel(const __grid_constant__ AttentionArgs args) {
  begin_overlapped();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t pair = int64_t{blockIdx.x} * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (pair >= int64_t{args.num_rows} * args.num_heads) return;
  const int head_dim = args.cache.head_dim;
  const SeenRow seen = read_row(args, static_cast<int>(pair / args.num_heads),
                                static_cast<int>(pair % args.num_heads));
  const int kv_head = seen.head / args.group;
  const int sequence = args.sequence[seen.row];
  const uint64_t* ancestors = args.ancestors + int64_t{seen.row} * kAncestorWords;
  const float* q = static_cast<const float*>(args.q) + pair * head_dim;
  int num_keys = seen.prefix_len;
  for (int word = 0; word < kAncestorWords; ++word) num_keys += count_bits(ancestors[word]);

  float m = -INFINITY, l = 0.0f, o[kMaxColumns] = {};
  for (int block = seen.first / kWarp * kWarp; block < num_keys; block += kWarp) {
    const int key = block + lane;
    int slot = -1, page = -1;
    if (key >= seen.first && key < num_keys) {
      slot = key < seen.prefix_len ? key : ancestor_slot(seen, ancestors, key - seen.prefix_len);
      page = args.cache.page_of(sequence, slot);
    }
    const int64_t place = int64_t{slot % kPageTokens} * head_dim;
    float s = -INFINITY;
    if (page >= 0) {
      const auto* k =
          reinterpret_cast<const float*>(block_of(args.cache, args.layer, 0, page, kv_head)) +
          place;
      s = 0.0f;
      for (int i = 0; i < head_dim; ++i) s = fmaf(q[i], k[i], s);
      s *= args.scale_log2;
    }
    float m_new = fmaxf(m, s);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      m_new = fmaxf(m_new, __shfl_xor_sync(kAllLanes, m_new, step));
    }
    if (m_new == -INFINITY) continue;
    const float correction = exp2_approx(m - m_new);
    const float weight = page >= 0 ? exp2_approx(s - m_new) : 0.0f;
    m = m_new;
    l = fmaf(l, correction, warp_sum(weight));
    for (int c = 0; c < kMaxColumns; ++c) o[c] *= correction;
    for (int i = 0; i < kWarp; ++i) {
      const int64_t at = __shfl_sync(kAllLanes, place, i);
      const int value_page = __shfl_sync(kAllLanes, page, i);
      const float w = __shfl_sync(kAllLanes, weight, i);
      if (value_page < 0) continue;
      const auto* v =
          reinterpret_cast<const float*>(block_of(args.cache, args.layer, 1, value_page, kv_head)) +
          at;
#pragma unroll
      for (int c = 0; c < kMaxColumns; ++c) {
        const int column = lane + c * kWarp;
        if (column < head_dim) o[c] = fmaf(w, v[column], o[c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kMaxColumns; ++c) {
    const float one[1] = {o[c]};
    store_result(args, seen.row, seen.head, lane + c * kWarp, one, l);
  }
}

}  // namespace

void launch_tree_attention_f32(const AttentionArgs& args, cudaStream_t stream) {
  if (args.cache.head_dim > kMaxColumns * kWarp) {
    throw UnsupportedError(concat("tree_attention: head_dim is ", args.cache.head_dim, "; at most ",
                                  kMaxColumns * kWarp, " on CUDA"));
  }
  const int64_t pairs = int64_t{args.num_rows} * args.num_heads;
  launch_overlapped(tree_attention_f32_kernel,
                    dim3(static_cast<unsigned>((pairs + kWarps - 1) / kWarps)),
                    dim3(kWarps * kWarp), 0, stream, args);
}

}  // namespace medusa::cuda
