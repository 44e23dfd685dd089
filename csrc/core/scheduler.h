// Which sequences run, which wait, and which pages of the cache each one holds.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "core/pages.h"
#include "medusa/model.h"
#include "medusa/session.h"

namespace medusa {

using Clock = std::chrono::steady_clock;

// One request from submit() to its last event.
struct Sequence {
  int64_t id = 0;
  Request request;
  std::vector<int32_t> tokens;  // prompt and all emitted tokens; the last one is the next root
  int max_tokens = 0;           // length at which it ends
  RequestStats stats;
  Clock::time_point start{}, first_token{};

  // While it runs.
  int line = -1;              // of the page table
  int len = 0;                // tokens whose K and V are in the cache
  std::vector<int> pages;     // in order; those past the first len / 64 are nobody else's
  std::vector<float> hidden;  // [d] of the last accepted node; empty after a start or a set-back

  // This step's share: `chunk` tokens of the text, then the tree if that brings it to the root.
  int chunk = 0;
  bool has_tree = false;
  DraftTree tree;
  Accepted accepted;

  int prompt_len() const { return static_cast<int>(request.tokens.size()); }
  int emitted() const { return static_cast<int>(tokens.size()) - prompt_len(); }
  int to_root() const { return static_cast<int>(tokens.size()) - 1 - len; }
  int remaining() const { return max_tokens - static_cast<int>(tokens.size()); }
};

class Scheduler {
 public:
  Scheduler(const Model& model, const SessionOptions& options, int max_nodes, bool reuse);

  void enqueue(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }
  std::unique_ptr<Sequence> remove(int64_t id);  // waiting or active; its pages are kept for reuse
  void admit();                                  // starts what fits, in order of arrival
  void share_out();                              // each active sequence's chunk of this step's rows
  // Gives every sequence pages for its chunk and tree, and the backend the page table; trees are
  // cut and the youngest set back where pages run out.
  void commit_pages();

  // Pages for `slots(sequence)` of every active sequence, and the page table to the backend. False:
  // they do not fit; nobody was set back.
  bool reserve(const std::function<int64_t(const Sequence&)>& slots);

  std::vector<std::unique_ptr<Sequence>>& active() { return active_; }  // oldest first
  bool idle() const { return active_.empty() && waiting_.empty(); }
  bool has_waiting() const { return !waiting_.empty(); }
  KvCache& cache() { return cache_; }
  void fill_stats(SessionStats& stats) const;

 private:
  struct Donor {
    const std::vector<int>* pages = nullptr;
    int shared = 0;  // tokens that it has in common with the text
  };
  int pages_for(int64_t slots) const;
  int pages_wanted(const Sequence& sequence) const;
  int rope_length(const Sequence& sequence) const;
  Donor find_donor(const Sequence& sequence);
  void start(std::unique_ptr<Sequence> sequence);
  void release(Sequence& sequence);
  void set_back(size_t index);
  bool take_page(Sequence& sequence);
  bool cover(Sequence& sequence, int64_t slots);
  void upload_page_table();

  const Model& model_;
  const SessionOptions& options_;
  const int max_nodes_;
  const bool reuse_;
  PagePool pool_;
  PrefixCache kept_;
  KvCache cache_;
  std::vector<int32_t> page_table_;  // as the next upload makes it
  std::unique_ptr<Buffer> page_table_memory_;
  bool page_table_changed_ = false;
  std::vector<int> free_lines_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> active_;
  int64_t set_backs_ = 0;
};

}  // namespace medusa
