// tree_attention: cuts the work into tiles of queries that share a sequence and a kv head. A long
// context is shared out by pages, and by heads or columns, instead, so that K and V are read once.
// The arithmetic, and why no cut can change a bit of it, is in kernels/attention.cpp.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <climits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/layout.h"
#include "backend/cpu/memory.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

constexpr int64_t kLongPages = 16;                      // from here on threads share a context
constexpr int64_t kMaxSharedScores = int64_t{1} << 20;  // of all queries of a step: 4 MiB

// Of one thread, grown to the longest context met.
struct Scratch {
  std::vector<float> scores, values, queries, totals;
  std::vector<uint8_t> needed;  // per page of the sequence: some query sees a slot of it
  std::vector<const void*> k_pages, v_pages;
};

struct Run {  // adjacent rows of one sequence
  int first_row, num_rows;
};

int64_t last_slot(const Rows& rows, int row) {  // may pass the range of int
  for (int word = kAncestorWords - 1; word >= 0; --word) {
    const uint64_t bits = rows.ancestors[row][static_cast<size_t>(word)];
    if (bits != 0) return int64_t{rows.prefix_len[row]} + word * 64 + 63 - std::countl_zero(bits);
  }
  return int64_t{rows.prefix_len[row]} - 1;
}

void check_row(const Rows& rows, int row, const KvCache& cache) {
  int num_ancestors = 0;
  for (const uint64_t bits : rows.ancestors[row]) num_ancestors += std::popcount(bits);
  MEDUSA_CHECK_ARG(rows.sequence[row] >= 0 && rows.sequence[row] < cache.num_sequences,
                   "tree_attention: row ", row, " is of sequence ", rows.sequence[row],
                   "; the page table has ", cache.num_sequences, " lines");
  MEDUSA_CHECK_ARG(
      rows.prefix_len[row] >= 0 && rows.position[row] >= 0 &&
          int64_t{rows.prefix_len[row]} + num_ancestors == int64_t{rows.position[row]} + 1,
      "tree_attention: row ", row, " at position ", rows.position[row], " has prefix_len ",
      rows.prefix_len[row], " and ", num_ancestors, " ancestors; their sum must be position + 1");
  const int64_t last = last_slot(rows, row);
  MEDUSA_CHECK_ARG(last / kPage < cache.max_pages, "tree_attention: row ", row, " sees slot ", last,
                   "; a sequence has ", cache.max_pages, " pages");
}

// One call of the op.
class Attention {
 public:
  Attention(const Kernels& kernels, ThreadPool& pool, TensorView q, const KvCache& cache, int layer,
            const Rows& rows, float scale, int window, TensorView out)
      : kernels_(kernels),
        pool_(pool),
        q_(q),
        out_(out),
        cache_(cache),
        rows_(rows),
        layer_(layer),
        window_(window),
        scale_(scale),
        num_kv_heads_(cache.shape.num_kv_heads),
        head_dim_(cache.shape.head_dim),
        group_(q.size(1) / cache.shape.num_kv_heads) {}

  void run(const std::vector<Run>& runs) {
    // More queries of a head than a tile holds fill two threads by themselves, and their scores
    // would leave the cache before they are read again.
    int64_t pages = 0, scores = 0;
    bool few = pool_.num_threads() > 1;
    for (const Run& run : runs) {
      const int64_t own = num_pages(run);
      pages = std::max(pages, own);
      scores += own * kPage * run.num_rows * q_.size(1);
      few = few && num_queries(run) <= kTileQueries;
    }
    if (few && pages >= kLongPages && scores <= kMaxSharedScores) {
      share_context(runs);
    } else {
      share_queries(runs);
    }
  }

 private:
  int64_t num_queries(const Run& run) const { return run.num_rows * group_; }  // of a kv head

  int64_t num_pages(const Run& run) const {
    int64_t slots = 0;
    for (int row = run.first_row; row < run.first_row + run.num_rows; ++row) {
      slots = std::max<int64_t>(slots, last_slot(rows_, row) + 1);
    }
    return (slots + kPage - 1) / kPage;
  }

  // What a tile of queries [first, last) of one kv head asks, without pages and scratch.
  AttentionTile questions(const Run& run, int64_t head, int64_t first, int64_t last) const {
    AttentionTile tile{};
    tile.dtype = cache_.shape.dtype;
    tile.num_queries = static_cast<int>(last - first);
    tile.head_dim = static_cast<int>(head_dim_);
    tile.scale = scale_;
    tile.out_bf16 = out_.dtype == DType::bf16;
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = run.first_row + i / group_, query_head = head * group_ + i % group_;
      const int64_t offset = (row * q_.size(1) + query_head) * head_dim_, at = i - first;
      tile.q[at] = q_.as<char>() + offset * dtype_bytes(q_.dtype);
      tile.out[at] = out_.as<char>() + offset * dtype_bytes(out_.dtype);
      tile.position[at] = rows_.position[row];
      tile.prefix_len[at] = rows_.prefix_len[row];
      tile.ancestors[at] = rows_.ancestors[row].data();
      tile.first[at] = window_ > 0 ? std::max(0, rows_.position[row] - window_ + 1) : 0;
    }
    return tile;
  }

  // Marks the pages that the tile's queries see.
  static void mark(const AttentionTile& tile, std::vector<uint8_t>& needed) {
    const auto need = [&](int64_t page) {
      if (needed.size() <= static_cast<size_t>(page)) {
        needed.resize(static_cast<size_t>(page) + 1, 0);
      }
      needed[static_cast<size_t>(page)] = 1;
    };
    for (int i = 0; i < tile.num_queries; ++i) {
      if (i > 0 && tile.ancestors[i] == tile.ancestors[i - 1]) continue;  // the same row
      for (int64_t page = tile.first[i] / kPage; page * kPage < tile.prefix_len[i]; ++page) {
        need(page);
      }
      for (int word = 0; word < kAncestorWords; ++word) {
        for (uint64_t bits = tile.ancestors[i][word]; bits != 0; bits &= bits - 1) {
          need((int64_t{tile.prefix_len[i]} + word * 64 + std::countr_zero(bits)) / kPage);
        }
      }
    }
  }

  // Where the marked pages of one kv head lie; null for the others.
  void find_pages(const Run& run, int64_t head, const std::vector<uint8_t>& needed,
                  const void** k_pages, const void** v_pages) const {
    const int32_t* table =
        cache_.page_table + int64_t{rows_.sequence[run.first_row]} * cache_.max_pages;
    for (size_t i = 0; i < needed.size(); ++i) {
      k_pages[i] = v_pages[i] = nullptr;
      if (needed[i] == 0) continue;
      MEDUSA_CHECK_ARG(table[i] >= 0 && table[i] < cache_.shape.num_pages, "tree_attention: page ",
                       i, " of sequence ", rows_.sequence[run.first_row], " is ", table[i],
                       "; the cache has ", cache_.shape.num_pages);
      k_pages[i] = cache_block(cache_, layer_, 0, table[i], head);
      v_pages[i] = cache_block(cache_, layer_, 1, table[i], head);
    }
  }

  // So that queries fall into different cache sets.
  static int64_t stride_of(int64_t num_pages) { return num_pages * kPage + 16; }

  int64_t values_size(int64_t queries) const { return queries * ((head_dim_ + 15) / 16 * 16); }

  // A tile is one task.
  void share_queries(const std::vector<Run>& runs) {
    // Larger tiles load K and V less often; smaller ones keep all threads busy.
    const auto tiles_of = [&](const Run& run, int64_t size) {
      return (num_queries(run) + size - 1) / size;
    };
    int64_t tile_size = kTileQueries, num_tiles = 0;
    for (; tile_size > 0; tile_size /= 2) {
      num_tiles = 0;
      for (const Run& run : runs) num_tiles += tiles_of(run, tile_size) * num_kv_heads_;
      if (num_tiles >= 3 * pool_.num_threads() || pool_.num_threads() == 1 || tile_size == 1) break;
    }

    pool_.run(static_cast<int>(num_tiles), [&](int task) {
      thread_local Scratch scratch;
      int64_t index = task;
      const Run* run = runs.data();
      for (; index >= tiles_of(*run, tile_size) * num_kv_heads_; ++run) {
        index -= tiles_of(*run, tile_size) * num_kv_heads_;
      }
      const int64_t count = tiles_of(*run, tile_size), head = index % num_kv_heads_;
      const int64_t part = index / num_kv_heads_, queries = num_queries(*run);
      AttentionTile tile =
          questions(*run, head, queries * part / count, queries * (part + 1) / count);
      scratch.needed.clear();
      mark(tile, scratch.needed);
      const auto pages = static_cast<int64_t>(scratch.needed.size());
      tile.num_pages = static_cast<int>(pages);
      tile.score_stride = stride_of(pages);
      tile.scores = at_least(scratch.scores, tile.num_queries * tile.score_stride);
      tile.totals = at_least(scratch.totals, tile.num_queries);
      tile.values = at_least(scratch.values, values_size(tile.num_queries));
      tile.queries = at_least(scratch.queries, tile.num_queries * head_dim_);
      const void** k_pages = at_least(scratch.k_pages, pages);
      const void** v_pages = at_least(scratch.v_pages, pages);
      find_pages(*run, head, scratch.needed, k_pages, v_pages);
      tile.k_pages = k_pages;
      tile.v_pages = v_pages;
      kernels_.attention_arrange(tile);
      kernels_.attention_scores(tile, 0, tile.num_pages);
      kernels_.attention_softmax(tile);
      kernels_.attention_values(tile, 0, tile.head_dim);
    });
  }

  // A tile for each kv head of each sequence: every query's scores by pages, then its weights, then
  // the sums by tiles or columns; threads meet between the three.
  void share_context(const std::vector<Run>& runs) {
    thread_local std::vector<AttentionTile> tile_memory;
    thread_local Scratch shared;
    std::vector<AttentionTile>& tiles = tile_memory;  // tasks on other threads must see this one's
    lay_out(runs, shared, tiles);
    const auto num_tiles = static_cast<int64_t>(tiles.size());

    int most_pages = 0, least_pages = INT_MAX, most_queries = 0;
    for (const AttentionTile& tile : tiles) {
      most_pages = std::max(most_pages, tile.num_pages);
      least_pages = std::min(least_pages, tile.num_pages);
      most_queries = std::max(most_queries, tile.num_queries);
    }
    // Some four tasks a thread; a task's first page is fetched by nobody.
    const int64_t chunk_pages =
        std::clamp<int64_t>(num_tiles * most_pages / (4 * pool_.num_threads()), 4, 16);
    const int64_t num_chunks = (most_pages + chunk_pages - 1) / chunk_pages;
    pool_.run(static_cast<int>(num_tiles * num_chunks), [&](int task) {
      AttentionTile tile = tiles[static_cast<size_t>(task / num_chunks)];
      const int64_t first = task % num_chunks * chunk_pages;
      const int64_t last = std::min<int64_t>(first + chunk_pages, tile.num_pages);
      if (first >= last) return;
      thread_local std::vector<float> queries;
      tile.queries = at_least(queries, kTileQueries * head_dim_);
      kernels_.attention_arrange(tile);
      kernels_.attention_scores(tile, static_cast<int>(first), static_cast<int>(last));
    });

    pool_.run(static_cast<int>(num_tiles) * most_queries, [&](int task) {
      const AttentionTile& tile = tiles[static_cast<size_t>(task / most_queries)];
      const int i = task % most_queries;
      if (i >= tile.num_queries) return;
      AttentionTile one = tile;
      one.num_queries = 1;
      one.scores += i * tile.score_stride;
      one.totals += i;
      one.first[0] = tile.first[i];
      one.prefix_len[0] = tile.prefix_len[i];
      one.position[0] = tile.position[i];
      one.ancestors[0] = tile.ancestors[i];
      kernels_.attention_softmax(one);
    });

    // A thread that reads some columns only leaves lines out, which halves its pace: as many whole
    // tiles of like length as all threads share evenly, and columns of the rest.
    const bool alike = most_pages <= 2 * least_pages;
    const int64_t whole = alike ? num_tiles / pool_.num_threads() * pool_.num_threads() : 0;
    const int64_t width = std::max<int64_t>(16, 64 / dtype_bytes(cache_.shape.dtype));
    const int64_t slices = (head_dim_ + width - 1) / width;
    pool_.run(static_cast<int>(whole + (num_tiles - whole) * slices), [&](int task) {
      thread_local std::vector<float> values;
      const int64_t slice = std::max<int64_t>(task - whole, 0);
      const int64_t index = task < whole ? task : whole + slice / slices;
      const int64_t first = task < whole ? 0 : slice % slices * width;
      const int64_t last = task < whole ? head_dim_ : std::min(first + width, head_dim_);
      AttentionTile tile = tiles[static_cast<size_t>(index)];
      tile.values = at_least(values, values_size(kTileQueries));
      kernels_.attention_values(tile, static_cast<int>(first), static_cast<int>(last));
    });
  }

  // Tiles with their pages and places for scores.
  void lay_out(const std::vector<Run>& runs, Scratch& shared,
               std::vector<AttentionTile>& tiles) const {
    tiles.clear();
    int64_t num_scores = 0, pointers = 0;
    for (const Run& run : runs) {
      const int64_t pages = num_pages(run);
      num_scores += num_queries(run) * num_kv_heads_ * stride_of(pages);
      pointers += num_kv_heads_ * pages;
    }
    float* scores = at_least(shared.scores, num_scores);
    float* totals = at_least(shared.totals, rows_.num_rows * q_.size(1));
    const void** k_pages = at_least(shared.k_pages, pointers);
    const void** v_pages = at_least(shared.v_pages, pointers);
    for (const Run& run : runs) {
      for (int64_t head = 0; head < num_kv_heads_; ++head) {
        AttentionTile tile = questions(run, head, 0, num_queries(run));
        if (head == 0) {
          shared.needed.clear();
          mark(tile, shared.needed);
        }
        const auto pages = static_cast<int64_t>(shared.needed.size());
        find_pages(run, head, shared.needed, k_pages, v_pages);
        tile.num_pages = static_cast<int>(pages);
        tile.score_stride = stride_of(pages);
        tile.k_pages = k_pages;
        tile.v_pages = v_pages;
        tile.scores = scores;
        tile.totals = totals;
        tiles.push_back(tile);
        k_pages += pages;
        v_pages += pages;
        scores += tile.num_queries * tile.score_stride;
        totals += tile.num_queries;
      }
    }
  }

  const Kernels& kernels_;
  ThreadPool& pool_;
  const TensorView q_, out_;
  const KvCache& cache_;
  const Rows& rows_;
  const int layer_, window_;
  const float scale_;
  const int64_t num_kv_heads_, head_dim_, group_;
};

}  // namespace

void CpuBackend::do_tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                                   float scale, int window, TensorView out) {
  thread_local std::vector<Run> memory;  // kept, so that a step allocates nothing
  std::vector<Run>& runs = memory;       // tasks on other threads must see this one's
  runs.clear();
  for (int row = 0; row < rows.num_rows; ++row) {
    check_row(rows, row, cache);
    if (row > 0 && rows.sequence[row] == rows.sequence[row - 1]) {
      ++runs.back().num_rows;
    } else {
      runs.push_back({row, 1});
    }
  }
  Attention(kernels_, pool_, q, cache, layer, rows, scale, window, out).run(runs);
}

}  // namespace medusa::cpu
