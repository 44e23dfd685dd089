// SPDX-License-Identifier: Apache-2.0
#include "core/pages.h"

#include <algorithm>

#include "medusa/error.h"

namespace medusa {

PagePool::PagePool(int num_pages) : references_(static_cast<size_t>(num_pages), 0) {
  // Low pages are handed out first, so that a cache larger than its use stays untouched.
  for (int page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

int PagePool::take() {
  MEDUSA_CHECK_INTERNAL(!free_.empty(), "page pool: no page is free");
  const int page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  return page;
}

void PagePool::release(int page) {
  int& count = references_[static_cast<size_t>(page)];
  MEDUSA_CHECK_INTERNAL(count > 0, "page pool: page ", page, " released twice");
  if (--count == 0) free_.push_back(page);
}

int common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  const size_t limit = std::min(a.size(), b.size());
  return static_cast<int>(
      std::mismatch(a.begin(), a.begin() + static_cast<int64_t>(limit), b.begin()).first -
      a.begin());
}

void PrefixCache::keep(CachedText text) {
  for (auto it = texts_.begin(); it != texts_.end();) {
    const auto next = std::next(it);
    const int shared = common_prefix(it->tokens, text.tokens);
    if (it->rope_length == text.rope_length && shared == static_cast<int>(it->tokens.size())) {
      drop(it);
    }
    it = next;
  }
  texts_.push_back(std::move(text));
}

const CachedText* PrefixCache::find(std::span<const int32_t> tokens, int rope_length) {
  auto best = texts_.end();
  int best_shared = 0;
  for (auto it = texts_.begin(); it != texts_.end(); ++it) {
    const int shared = it->rope_length == rope_length ? common_prefix(it->tokens, tokens) : 0;
    if (shared > best_shared) {
      best_shared = shared;
      best = it;
    }
  }
  if (best == texts_.end()) return nullptr;
  texts_.splice(texts_.end(), texts_, best);
  return &texts_.back();
}

bool PrefixCache::drop_oldest() {
  if (texts_.empty()) return false;
  drop(texts_.begin());
  return true;
}

void PrefixCache::drop(std::list<CachedText>::iterator text) {
  for (const int page : text->pages) pool_.release(page);
  texts_.erase(text);
}

int PrefixCache::num_pages() const {
  // A page shared by kept texts alone is free once all of them are gone.
  std::vector<int> held(static_cast<size_t>(pool_.num_pages()), 0);
  int count = 0;
  for (const CachedText& text : texts_) {
    for (const int page : text.pages) {
      if (++held[static_cast<size_t>(page)] == pool_.references(page)) ++count;
    }
  }
  return count;
}

}  // namespace medusa
