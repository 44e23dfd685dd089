// How the work of tree_attention is cut. Splits and tails follow from absolute positions alone,
// since bits depend on them; tiles and items are bookkeeping and change no bit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "medusa/backend.h"
#include "medusa/noise.h"

namespace medusa::cuda {

constexpr int kTilePairs = 64;      // (row, head of the group) pairs that one block serves
constexpr int kTailItemPairs = 16;  // the same where a block has nothing to do but tails
constexpr int kTailKeys = 128;      // most keys of a tail
constexpr int kMaxBlocksPerSm = 2;

// Splits begin at positions 0, 256, 512, 768, 1024, then every 512 to 8192, every 1024 to 32768,
// every 2048: short ones give one row enough blocks, long ones keep the partial results of a long
// context small beside the cache. In pages:
MEDUSA_HD constexpr int split_first_page(int split) {
  if (split <= 4) return 4 * split;
  if (split <= 18) return 8 * (split - 2);
  if (split <= 42) return 128 + 16 * (split - 18);
  return 512 + 32 * (split - 42);
}

// Splits that begin before this page.
MEDUSA_HD constexpr int num_splits(int pages) {
  if (pages <= 16) return (pages + 3) / 4;
  if (pages <= 128) return 2 + (pages + 7) / 8;
  if (pages <= 512) return 18 + (pages - 128 + 15) / 16;
  return 42 + (pages - 512 + 31) / 32;
}

MEDUSA_HD constexpr bool starts_split(int page) {
  return split_first_page(num_splits(page)) == page;
}

static_assert(split_first_page(4) == 16 && split_first_page(5) == 24);
static_assert(split_first_page(18) == 128 && split_first_page(19) == 144);
static_assert(split_first_page(42) == 512 && split_first_page(43) == 544);
static_assert(num_splits(0) == 0 && num_splits(16) == 4 && num_splits(17) == 5);
static_assert(num_splits(128) == 18 && num_splits(129) == 19);
static_assert(num_splits(512) == 42 && num_splits(513) == 43 && num_splits(545) == 44);

// The page where the tail of a row begins: 64 to 128 keys before and at its position. All keys
// before it belong to the prefix: 64 * tail_page <= position - 64 <= position - depth = prefix_len.
// The clamps bind only for rows that no caller may give.
MEDUSA_HD constexpr int tail_page(int position, int prefix_len, int max_pages) {
  int page = position / kPageTokens - 1;
  if (page > prefix_len / kPageTokens) page = prefix_len / kPageTokens;
  if (page > max_pages) page = max_pages;
  return page < 0 ? 0 : page;
}

// What one block does: pairs [first_pair, first_pair + num_pairs) of a run, that is of adjacent
// rows of one sequence times the heads of a group. `part` >= 0: that split of them; kTailPart:
// their tails; a plan for walking has one item a tile, for all splits and the tails.
constexpr int kTailPart = -1;
struct alignas(32) AttentionItem {
  int first_row = 0;  // of the run
  int first_pair = 0, num_pairs = 0;
  int sequence = 0;
  int end_page = 0;  // greatest tail_page of the tile's rows
  int part = 0;
};

struct AttentionRun {
  int first_row = 0, first_tile = 0;
};

// Device memory of a plan.
struct AttentionPlan {
  int* num_items = nullptr;
  AttentionRun* runs = nullptr;
  AttentionItem* tiles = nullptr;
  AttentionItem* items = nullptr;  // the tiles themselves in a plan for walking
};

}  // namespace medusa::cuda
