// Pages of the KV cache: the free list, reference counts, and the texts whose pages are kept for
// reuse.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <vector>

namespace medusa {

class PagePool {
 public:
  explicit PagePool(int num_pages);
  int num_pages() const { return static_cast<int>(references_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }
  int take();  // reference count 1; InternalError when none is free
  void share(int page) { ++references_[static_cast<size_t>(page)]; }
  void release(int page);
  int references(int page) const { return references_[static_cast<size_t>(page)]; }

 private:
  std::vector<int> references_, free_;
};

// The K and V of a text, whole pages and a last partial one.
struct CachedText {
  std::vector<int32_t> tokens;
  std::vector<int> pages;
  int rope_length = 0;  // K of texts with different values differ (dynamic RoPE scaling)
};

// Texts of finished requests, the least recently used given up first.
class PrefixCache {
 public:
  explicit PrefixCache(PagePool& pool) : pool_(pool) {}
  // Takes over one reference of each page. A kept text that the new one begins with is dropped.
  void keep(CachedText text);
  // The kept text with the longest common prefix, marked as used; null when none shares a token.
  const CachedText* find(std::span<const int32_t> tokens, int rope_length);
  bool drop_oldest();     // false: nothing kept
  int num_pages() const;  // that nobody else uses, so that dropping everything frees them

 private:
  void drop(std::list<CachedText>::iterator text);

  PagePool& pool_;
  std::list<CachedText> texts_;  // least recently used first
};

int common_prefix(std::span<const int32_t> a, std::span<const int32_t> b);

}  // namespace medusa
