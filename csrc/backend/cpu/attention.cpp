// tree_attention: cuts the work into tiles of queries that share a sequence and a kv head. The
// arithmetic, and why the cut cannot change a bit of it, is in kernels/attention.cpp.
// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/layout.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

// Of one thread, grown to the longest context met.
struct Scratch {
  std::vector<float> scores, values, queries;
  std::vector<uint8_t> needed;  // per page of the sequence: some query sees a slot of it
  std::vector<const void*> k_pages, v_pages;
};

template <class T>
T* at_least(std::vector<T>& memory, int64_t count) {
  if (memory.size() < static_cast<size_t>(count)) memory.resize(static_cast<size_t>(count));
  return memory.data();
}

struct Run {  // adjacent rows of one sequence
  int first_row, num_rows;
};

void check_row(const Rows& rows, int row, const KvCache& cache) {
  int num_ancestors = 0;
  int64_t last_slot = int64_t{rows.prefix_len[row]} - 1;  // may pass the range of int
  for (int word = 0; word < kAncestorWords; ++word) {
    const uint64_t bits = rows.ancestors[row][static_cast<size_t>(word)];
    num_ancestors += std::popcount(bits);
    if (bits != 0)
      last_slot = int64_t{rows.prefix_len[row]} + word * 64 + 63 - std::countl_zero(bits);
  }
  MEDUSA_CHECK_ARG(rows.sequence[row] >= 0 && rows.sequence[row] < cache.num_sequences,
                   "tree_attention: row ", row, " is of sequence ", rows.sequence[row],
                   "; the page table has ", cache.num_sequences, " lines");
  MEDUSA_CHECK_ARG(
      rows.prefix_len[row] >= 0 && rows.position[row] >= 0 &&
          int64_t{rows.prefix_len[row]} + num_ancestors == int64_t{rows.position[row]} + 1,
      "tree_attention: row ", row, " at position ", rows.position[row], " has prefix_len ",
      rows.prefix_len[row], " and ", num_ancestors, " ancestors; their sum must be position + 1");
  MEDUSA_CHECK_ARG(last_slot / kPage < cache.max_pages, "tree_attention: row ", row, " sees slot ",
                   last_slot, "; a sequence has ", cache.max_pages, " pages");
}

}  // namespace

void CpuBackend::do_tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                                   float scale, int window, TensorView out) {
  const int64_t H = q.size(1), Hkv = cache.shape.num_kv_heads, D = cache.shape.head_dim,
                group = H / Hkv;
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

  // Larger tiles load K and V less often; smaller ones keep all threads busy.
  const auto tiles_of = [&](const Run& run, int64_t size) {
    return (run.num_rows * group + size - 1) / size;
  };
  int64_t tile_size = kTileQueries, num_tiles = 0;
  for (; tile_size > 0; tile_size /= 2) {
    num_tiles = 0;
    for (const Run& run : runs) num_tiles += tiles_of(run, tile_size) * Hkv;
    if (num_tiles >= 3 * pool_.num_threads() || pool_.num_threads() == 1 || tile_size == 1) break;
  }

  const auto body = [&](int64_t index) {
    thread_local Scratch scratch;
    const Run* run = runs.data();
    for (; index >= tiles_of(*run, tile_size) * Hkv; ++run) {
      index -= tiles_of(*run, tile_size) * Hkv;
    }
    const int64_t num_run_tiles = tiles_of(*run, tile_size), head = index % Hkv, part = index / Hkv;
    const int64_t num_queries = run->num_rows * group;
    const int64_t first = num_queries * part / num_run_tiles,
                  last = num_queries * (part + 1) / num_run_tiles;

    AttentionTile tile;
    tile.dtype = cache.shape.dtype;
    tile.num_queries = static_cast<int>(last - first);
    tile.head_dim = static_cast<int>(D);
    tile.scale = scale;
    tile.out_bf16 = out.dtype == DType::bf16;
    scratch.needed.clear();
    const auto need = [&](int64_t page) {
      if (scratch.needed.size() <= static_cast<size_t>(page)) {
        scratch.needed.resize(static_cast<size_t>(page) + 1, 0);
      }
      scratch.needed[static_cast<size_t>(page)] = 1;
    };
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = run->first_row + i / group, query_head = head * group + i % group;
      const int64_t offset = (row * H + query_head) * D, at = i - first;
      tile.q[at] = q.as<char>() + offset * dtype_bytes(q.dtype);
      tile.out[at] = out.as<char>() + offset * dtype_bytes(out.dtype);
      tile.position[at] = rows.position[row];
      tile.prefix_len[at] = rows.prefix_len[row];
      tile.ancestors[at] = rows.ancestors[row].data();
      tile.first[at] = window > 0 ? std::max(0, rows.position[row] - window + 1) : 0;
      if (at > 0 && i % group != 0) continue;  // the same row as the query before
      for (int64_t page = tile.first[at] / kPage; page * kPage < tile.prefix_len[at]; ++page) {
        need(page);
      }
      for (int word = 0; word < kAncestorWords; ++word) {
        for (uint64_t bits = tile.ancestors[at][word]; bits != 0; bits &= bits - 1) {
          need((int64_t{tile.prefix_len[at]} + word * 64 + std::countr_zero(bits)) / kPage);
        }
      }
    }

    const auto num_pages = static_cast<int64_t>(scratch.needed.size());
    tile.num_pages = static_cast<int>(num_pages);
    tile.score_stride = num_pages * kPage + 16;  // so that queries fall into different cache sets
    tile.scores = at_least(scratch.scores, tile.num_queries * tile.score_stride);
    tile.values = at_least(scratch.values, tile.num_queries * ((D + 15) / 16 * 16));
    tile.queries = at_least(scratch.queries, tile.num_queries * D);
    const void** k_pages = at_least(scratch.k_pages, num_pages);
    const void** v_pages = at_least(scratch.v_pages, num_pages);
    const int32_t* table =
        cache.page_table + int64_t{rows.sequence[run->first_row]} * cache.max_pages;
    for (int64_t i = 0; i < num_pages; ++i) {
      k_pages[i] = v_pages[i] = nullptr;
      if (scratch.needed[static_cast<size_t>(i)] == 0) continue;
      MEDUSA_CHECK_ARG(table[i] >= 0 && table[i] < cache.shape.num_pages, "tree_attention: page ",
                       i, " of sequence ", rows.sequence[run->first_row], " is ", table[i],
                       "; the cache has ", cache.shape.num_pages);
      k_pages[i] = cache_block(cache, layer, 0, table[i], head);
      v_pages[i] = cache_block(cache, layer, 1, table[i], head);
    }
    tile.k_pages = k_pages;
    tile.v_pages = v_pages;
    kernels_.attention(tile);
  };
  pool_.run(static_cast<int>(num_tiles), [&](int task) { body(task); });
}

}  // namespace medusa::cpu
