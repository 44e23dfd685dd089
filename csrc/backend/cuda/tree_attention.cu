// tree_attention: attention of rows over their sequence's cached tokens and their own ancestors.
//
//   s[p] = scale * q . K[p];   w = exp(s - max s);   out = sum_p w[p] V[p] / sum_p w[p]
//   over the logical positions p that the row sees (struct Rows, and its window)
//
// Shapes    q [R, H, D] f16 | bf16 in the cache's type, out [R, H, D] f32 | f16 | bf16; D <= 256,
//           D % 8 == 0, computed in 64, 128 or 256 columns, those past D zeros. An f32 cache:
//           tree_attention_f32.cu
// Bits      What handles a key depends on its and the row's logical position alone, so a node of a
//           tree has the bits that it has when its path is decoded or prefilled row by row:
//             keys before 64 * tail_page(row), 64 at a time, cut at multiples of 64 (a block is a
//             page): scores and weighted values by mma.sync, weights in T, softmax online over the
//             blocks of a split; splits begin at fixed positions (split_first_page);
//             the tail, 64 to 128 keys whose slots may have gaps: weights f32, values by fmaf in
//             logical order (tree_attention_tail.h);
//           then (m, l, o) of the splits and of the tail are merged one after another. The tail
//           holds all ancestors: no node is deeper than kMaxTreeDepth = 64, so prefix_len >=
//           position - 64 >= 64 * tail_page. A row leaves no trace in another: products of a block
//           that is not for a row, and slots that a row does not see, are left out, not added as
//           zeros. Only where the window cuts a block have its hidden keys weight 0, and V there is
//           that of a key which another row sees, or zero.
// Launch    Pairs of (row, head of a group) of one sequence and kv head are packed into tiles of
//           64, 16 to a warp. prepare_rows makes the list of tiles and items on the device, where
//           the lengths are, once for all layers. Few tiles: an item is a split of a tile or 16
//           tails, and a second kernel merges the parts. Many tiles: a block walks all splits and
//           the tails of its tile and merges as it goes, with the same arithmetic. A fixed grid of
//           two blocks an SM, blocks of 4 warps; four slots of 64 keys or values in shared memory
//           (64 KiB at D = 128), three of them in flight: 96 KiB an SM.
// Traffic   K and V once for each tile, 4 S Hkv D bytes; 4 R H S D flops. 7B, 64 nodes, S = 1024:
//           16.8 MB, 3.9 us at 4.3 TB/s, and 1.1 GFLOP; besides 1.1 MB of parts for each split and
//           for the tails, written and read again in the second-level cache
// Source    FlashAttention-2, arXiv:2307.08691; Flash-Decoding
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>

#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/reduce.h"
#include "backend/cuda/tree_attention.h"
#include "medusa/error.h"

namespace medusa::cuda {
namespace {

constexpr int kPlanThreads = 256;
constexpr int64_t kMaxPartialBytes = int64_t{512} << 20;
constexpr int kMergeWarps = 4;

// Columns of the kernel that serves this head size.
constexpr int columns_of(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// ---- the plan

// The sum of the values of all threads before this one; `total` of all. One call at a time.
__device__ int scan_before(int value, int* warp_sums, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(step));
    if (lane >= step) sum += before;
  }
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int i = 0; i < kPlanThreads / kWarp; ++i) {
    if (i < warp) before += warp_sums[i];
    all += warp_sums[i];
  }
  *total = all;
  return before + sum - value;
}

struct Range {  // of this thread, when `count` things are cut into one piece for each
  int first, last;
};

__device__ Range own_range(int count) {
  const int size = (count + kPlanThreads - 1) / kPlanThreads;
  const int first = min(static_cast<int>(threadIdx.x) * size, count);
  return {first, min(first + size, count)};
}

struct PlanArgs {
  const int32_t* sequence = nullptr;
  const int32_t* position = nullptr;
  const int32_t* prefix_len = nullptr;
  AttentionPlan plan;
  int num_rows = 0, group = 0, max_pages = 0;
  bool walk = false;
};

// One block: runs of rows of one sequence, their tiles, and the items of these, long splits first.
__global__ void __launch_bounds__(kPlanThreads) attention_plan_kernel(PlanArgs args) {
  __shared__ int warp_sums[kPlanThreads / kWarp];
  begin_overlapped();
  const AttentionPlan& plan = args.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const auto starts_run = [&](int row) {
    return row == 0 || args.sequence[row] != args.sequence[row - 1];
  };
  const auto num_tiles_of = [&](int64_t num_rows) {
    return static_cast<int>((num_rows * args.group + kTilePairs - 1) / kTilePairs);
  };

  const Range own_rows = own_range(args.num_rows);
  int num_starts = 0, num_runs = 0;
  for (int row = own_rows.first; row < own_rows.last; ++row) num_starts += starts_run(row);
  int run = scan_before(num_starts, warp_sums, &num_runs);
  for (int row = own_rows.first; row < own_rows.last; ++row) {
    if (starts_run(row)) plan.runs[run++].first_row = row;
  }
  __syncthreads();

  const auto run_end = [&](int i) {
    return i + 1 < num_runs ? plan.runs[i + 1].first_row : args.num_rows;
  };
  const Range own_runs = own_range(num_runs);
  int count = 0, num_tiles = 0;
  for (int i = own_runs.first; i < own_runs.last; ++i) {
    count += num_tiles_of(run_end(i) - plan.runs[i].first_row);
  }
  int first_tile = scan_before(count, warp_sums, &num_tiles);
  for (int i = own_runs.first; i < own_runs.last; ++i) {
    plan.runs[i].first_tile = first_tile;
    first_tile += num_tiles_of(run_end(i) - plan.runs[i].first_row);
  }
  __syncthreads();

  for (int i = thread; i < num_tiles; i += kPlanThreads) {
    int low = 0, high = num_runs;  // the last run that begins at or before tile i
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (plan.runs[middle].first_tile <= i ? low : high) = middle;
    }
    AttentionItem tile;
    tile.first_row = plan.runs[low].first_row;
    tile.first_pair = (i - plan.runs[low].first_tile) * kTilePairs;
    const int num_pairs = (run_end(low) - tile.first_row) * args.group;
    tile.num_pairs = min(num_pairs - tile.first_pair, kTilePairs);
    tile.sequence = args.sequence[tile.first_row];
    const int last_pair = tile.first_pair + tile.num_pairs - 1;
    for (int row = tile.first_pair / args.group; row <= last_pair / args.group; ++row) {
      const int at = tile.first_row + row;
      tile.end_page =
          max(tile.end_page, tail_page(args.position[at], args.prefix_len[at], args.max_pages));
    }
    plan.tiles[i] = tile;
  }
  if (thread == 0 && args.walk) *plan.num_items = num_tiles;
  if (args.walk) return;
  __syncthreads();

  constexpr int kShortSplits = 4;
  const Range own_tiles = own_range(num_tiles);
  int num_long = 0, num_short = 0, total_long = 0, total_short = 0;
  for (int i = own_tiles.first; i < own_tiles.last; ++i) {
    const int splits = num_splits(plan.tiles[i].end_page);
    num_long += max(splits - kShortSplits, 0);
    num_short +=
        min(splits, kShortSplits) + (plan.tiles[i].num_pairs + kTailItemPairs - 1) / kTailItemPairs;
  }
  int next_long = scan_before(num_long, warp_sums, &total_long);
  int next_short = total_long + scan_before(num_short, warp_sums, &total_short);
  for (int i = own_tiles.first; i < own_tiles.last; ++i) {
    AttentionItem item = plan.tiles[i];
    for (item.part = num_splits(item.end_page) - 1; item.part >= 0; --item.part) {
      plan.items[item.part >= kShortSplits ? next_long++ : next_short++] = item;
    }
    const int num_pairs = item.num_pairs;
    item.part = kTailPart;
    for (int first = 0; first < num_pairs; first += kTailItemPairs) {
      item.num_pairs = min(num_pairs - first, kTailItemPairs);
      plan.items[next_short++] = item;
      item.first_pair += kTailItemPairs;
    }
  }
  if (thread == 0) *plan.num_items = total_long + total_short;
}

// ---- the merge

// out = the parts of a (row, head) in ascending order, the tail last. A warp for each.
template <int kColumns>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_parts_kernel(const __grid_constant__ AttentionArgs args) {
  begin_overlapped();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t pair = int64_t{blockIdx.x} * kMergeWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (pair >= int64_t{args.num_rows} * args.num_heads) return;
  const int row = static_cast<int>(pair / args.num_heads);
  const int head = static_cast<int>(pair % args.num_heads);
  const int column = lane * kColumns, head_dim = args.cache.head_dim;
  const int splits =
      num_splits(tail_page(args.position[row], args.prefix_len[row], args.cache.max_pages));

  // A lane reads (m, l) of one part for all; then the columns of several parts are on their way.
  constexpr int kAtOnce = 32 / kColumns;
  const auto part_of = [&](int i) { return i < splits ? 1 + i : 0; };
  float m = -INFINITY, l = 0.0f, o[kColumns] = {};
  for (int round = 0; round <= splits; round += kWarp) {
    float2 own = make_float2(-INFINITY, 0.0f);
    if (round + lane <= splits) {
      own = args.partial_ml[args.partial(part_of(round + lane), row, head)];
    }
    for (int first = 0; first < kWarp && round + first <= splits; first += kAtOnce) {
      float2 ml[kAtOnce];
      Columns<kColumns> columns[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        ml[i].x = __shfl_sync(kAllLanes, own.x, first + i);
        ml[i].y = __shfl_sync(kAllLanes, own.y, first + i);
        if (ml[i].x != -INFINITY && column < head_dim) {
          const int64_t at = args.partial(part_of(round + first + i), row, head);
          columns[i] = load_columns<kColumns>(args.partial_o + at * head_dim + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (ml[i].x == -INFINITY) continue;
        const MergeScale merge(m, l, ml[i].x, ml[i].y);
        m = merge.m;
        l = merge.l;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) o[c] = merge(o[c], columns[i].value[c]);
      }
    }
  }
  store_result(args, row, head, column, o, l);
}

// ---- host

// Sizes of a plan, known to the host: bounds of what the device will find.
struct PlanShape {
  bool walk = false;
  int64_t max_tiles = 0, max_items = 0;
  int64_t runs_at = 0, tiles_at = 0, items_at = 0, num_bytes = 0;
};

int64_t partial_bytes(int64_t num_rows, int64_t num_heads, const KvCache& cache) {
  return (1 + int64_t{num_splits(cache.max_pages)}) * num_rows * num_heads *
         (cache.shape.head_dim + 2) * 4;
}

// The greatest of them where blocks do not walk: allocated at once, since what recorded steps point
// to is never given back. python/medusa_ext/memory.py plans for it.
int64_t max_partial_bytes(int64_t num_heads, const KvCache& cache, int num_sms) {
  const int64_t pairs =
      kTilePairs * (int64_t{kMaxBlocksPerSm} * num_sms + cache.shape.num_kv_heads);
  return std::min(kMaxPartialBytes,
                  partial_bytes((pairs + num_heads - 1) / num_heads, num_heads, cache));
}

PlanShape plan_shape(int64_t num_rows, int64_t group, const KvCache& cache, int num_sms) {
  const int64_t kv_heads = cache.shape.num_kv_heads, full_tiles = num_rows * group / kTilePairs;
  PlanShape shape;
  shape.walk = full_tiles * kv_heads >= int64_t{kMaxBlocksPerSm} * num_sms ||
               partial_bytes(num_rows, group * kv_heads, cache) > kMaxPartialBytes;
  shape.max_tiles = full_tiles + num_rows;  // every run may end in a tile that is not full
  shape.max_items = shape.max_tiles;
  if (!shape.walk) {
    constexpr int kTailItems = kTilePairs / kTailItemPairs;
    shape.max_items *= num_splits(cache.max_pages) + kTailItems;
  }
  const auto align = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  shape.runs_at = 64;
  shape.tiles_at = align(shape.runs_at + num_rows * int64_t{sizeof(AttentionRun)});
  shape.items_at = align(shape.tiles_at + shape.max_tiles * int64_t{sizeof(AttentionItem)});
  shape.num_bytes = shape.walk ? shape.items_at
                               : shape.items_at + shape.max_items * int64_t{sizeof(AttentionItem)};
  if (shape.walk) shape.items_at = shape.tiles_at;
  return shape;
}

AttentionPlan plan_in(void* memory, const PlanShape& shape) {
  char* base = static_cast<char*>(memory);
  return {reinterpret_cast<int*>(base), reinterpret_cast<AttentionRun*>(base + shape.runs_at),
          reinterpret_cast<AttentionItem*>(base + shape.tiles_at),
          reinterpret_cast<AttentionItem*>(base + shape.items_at)};
}

template <class T>
void launch_attention(const AttentionArgs& args, bool walk, int64_t num_items, int num_sms,
                      cudaStream_t stream) {
  const int columns = columns_of(args.cache.head_dim);
  const auto launch_tiles = columns == 64    ? launch_tree_attention<T, 64>
                            : columns == 128 ? launch_tree_attention<T, 128>
                                             : launch_tree_attention<T, 256>;
  launch_tiles(args, walk, num_items, num_sms, stream);
  if (walk) return;
  const auto merge = columns == 64    ? merge_parts_kernel<2>
                     : columns == 128 ? merge_parts_kernel<4>
                                      : merge_parts_kernel<8>;
  const int64_t pairs = int64_t{args.num_rows} * args.num_heads;
  launch_overlapped(merge, dim3(static_cast<unsigned>((pairs + kMergeWarps - 1) / kMergeWarps)),
                    dim3(kMergeWarps * kWarp), 0, stream, args);
}

}  // namespace

void CudaBackend::plan_attention(const Rows& rows, const KvCache& cache) {
  const PlanShape shape = plan_shape(rows.num_rows, attention_group_, cache, num_sms_);
  PlanArgs args;
  args.sequence = rows.sequence;
  args.position = rows.position;
  args.prefix_len = rows.prefix_len;
  args.plan = plan_in(attention_plan_.at_least(shape.num_bytes, stream_.get()), shape);
  args.num_rows = rows.num_rows;
  args.group = attention_group_;
  args.max_pages = cache.max_pages;
  args.walk = shape.walk;
  launch_overlapped(attention_plan_kernel, dim3(1), dim3(kPlanThreads), 0, stream_.get(), args);
}

void CudaBackend::do_prepare_rows(const Rows& rows, const KvCache& cache) {
  // How many query heads share a kv head is not known here: as many as last time.
  if (cache.shape.dtype != DType::f32) plan_attention(rows, cache);
}

void CudaBackend::do_tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                                    float scale, int window, TensorView out) {
  const KvShape& shape = cache.shape;
  MEDUSA_CHECK_ARG(rows.sequence && rows.position && rows.prefix_len && rows.ancestors,
                   "tree_attention: rows without sequence, position, prefix_len or ancestors");
  AttentionArgs args;
  args.cache = view_of(cache);
  args.sequence = rows.sequence;
  args.position = rows.position;
  args.prefix_len = rows.prefix_len;
  args.ancestors = reinterpret_cast<const uint64_t*>(rows.ancestors);
  args.q = q.data;
  args.out = out.data;
  args.num_rows = rows.num_rows;
  args.num_heads = static_cast<int>(q.size(1));
  args.group = args.num_heads / shape.num_kv_heads;
  args.layer = layer;
  args.window = window;
  args.scale_log2 = scale * 1.44269504f;
  args.out_type = out.dtype;
  if (shape.dtype == DType::f32) return launch_tree_attention_f32(args, stream_.get());

  if (shape.head_dim % 8 != 0 || shape.head_dim > 256) {
    throw UnsupportedError(concat("tree_attention: head_dim is ", shape.head_dim, "; a cache of ",
                                  dtype_name(shape.dtype),
                                  " needs a multiple of 8, at most 256, on CUDA"));
  }
  if (args.group != attention_group_) {
    attention_group_ = args.group;
    plan_attention(rows, cache);
  }
  const PlanShape plan = plan_shape(rows.num_rows, args.group, cache, num_sms_);
  args.plan = plan_in(attention_plan_.at_least(plan.num_bytes, stream_.get()), plan);
  const int64_t parts = 1 + int64_t{num_splits(cache.max_pages)};
  const int64_t pairs = int64_t{args.num_rows} * args.num_heads;
  args.partial_o = static_cast<float*>(attention_partials_.at_least(
      plan.walk ? int64_t{kMaxBlocksPerSm} * num_sms_ * kTilePairs * columns_of(shape.head_dim) * 4
                : max_partial_bytes(args.num_heads, cache, num_sms_),
      stream_.get()));
  if (!plan.walk) {
    args.partial_ml = reinterpret_cast<float2*>(args.partial_o + parts * pairs * shape.head_dim);
  }
  (shape.dtype == DType::f16
       ? launch_attention<__half>
       : launch_attention<__nv_bfloat16>)(args, plan.walk, plan.max_items, num_sms_, stream_.get());
}

}  // namespace medusa::cuda
