// SPDX-License-Identifier: Apache-2.0
#include "core/scheduler.h"

#include <algorithm>

#include "medusa/error.h"

namespace medusa {

Scheduler::Scheduler(const Model& model, const SessionOptions& options, int max_nodes, bool reuse)
    : model_(model),
      options_(options),
      max_nodes_(max_nodes),
      reuse_(reuse),
      pool_(pages_for(options.cache_tokens)),
      kept_(pool_) {
  cache_ = model.backend->make_kv_cache(model.kv_shape(pool_.num_pages()));
  // A tree's slots may pass the context's end though its positions do not.
  cache_.max_pages = pages_for(int64_t{options.max_context} + kMaxTreeNodes);
  page_table_.assign(static_cast<size_t>(options.max_batch) * static_cast<size_t>(cache_.max_pages),
                     0);
  page_table_memory_ =
      model.backend->allocate(static_cast<int64_t>(page_table_.size() * sizeof(int32_t)));
  cache_.page_table = static_cast<const int32_t*>(page_table_memory_->data());
  cache_.num_sequences = options.max_batch;
  for (int line = options.max_batch - 1; line >= 0; --line) free_lines_.push_back(line);
}

int Scheduler::pages_for(int64_t slots) const {
  return static_cast<int>((slots + kPageTokens - 1) / kPageTokens);
}

// Pages that a start needs: the whole text so far and one tree.
int Scheduler::pages_wanted(const Sequence& sequence) const {
  const auto slots = static_cast<int64_t>(sequence.tokens.size()) + max_nodes_;
  return std::min(pages_for(slots), pool_.num_pages());
}

// K depends on more than token and position only where RoPE scales with the prompt's length.
int Scheduler::rope_length(const Sequence& sequence) const {
  const RopeConfig& rope = model_.config.rope;
  return rope.dynamic_factor > 0 ? std::max(sequence.prompt_len(), rope.original_context) : 0;
}

std::unique_ptr<Sequence> Scheduler::remove(int64_t id) {
  const auto is_it = [&](const auto& sequence) { return sequence->id == id; };
  if (const auto it = std::find_if(waiting_.begin(), waiting_.end(), is_it); it != waiting_.end()) {
    std::unique_ptr<Sequence> sequence = std::move(*it);
    waiting_.erase(it);
    return sequence;
  }
  const auto it = std::find_if(active_.begin(), active_.end(), is_it);
  if (it == active_.end()) return nullptr;
  std::unique_ptr<Sequence> sequence = std::move(*it);
  active_.erase(it);
  release(*sequence);
  return sequence;
}

void Scheduler::admit() {
  while (!waiting_.empty() && !free_lines_.empty()) {
    if (!active_.empty()) {
      // What the active ones still need for their texts, and a page each to grow.
      int64_t available = pool_.num_free() + kept_.num_pages();
      for (const auto& sequence : active_) {
        available -=
            std::max(0, pages_wanted(*sequence) - static_cast<int>(sequence->pages.size())) + 1;
      }
      if (pages_wanted(*waiting_.front()) > available) return;
    }
    std::unique_ptr<Sequence> next = std::move(waiting_.front());
    waiting_.pop_front();
    start(std::move(next));
  }
}

Scheduler::Donor Scheduler::find_donor(const Sequence& sequence) {
  Donor donor;
  const int length = rope_length(sequence);
  if (const CachedText* text = kept_.find(sequence.tokens, length)) {
    donor = {&text->pages, common_prefix(text->tokens, sequence.tokens)};
  }
  for (const auto& other : active_) {
    if (rope_length(*other) != length) continue;
    const std::span<const int32_t> text(other->tokens.data(), static_cast<size_t>(other->len));
    const int shared = common_prefix(text, sequence.tokens);
    if (shared > donor.shared) donor = {&other->pages, shared};
  }
  return donor;
}

void Scheduler::start(std::unique_ptr<Sequence> owned) {
  Sequence& sequence = *owned;
  sequence.line = free_lines_.back();
  free_lines_.pop_back();
  sequence.len = 0;
  if (reuse_ && sequence.request.reuse_prefix) {
    const Donor donor = find_donor(sequence);
    // The root's own K and V are never taken over: its pass gives the logits.
    const int shared = std::min(donor.shared, static_cast<int>(sequence.tokens.size()) - 1);
    // References first: taking a page for the copy may drop the donor.
    for (int i = 0; i < pages_for(shared); ++i) {
      const int page = (*donor.pages)[static_cast<size_t>(i)];
      pool_.share(page);
      sequence.pages.push_back(page);
    }
    sequence.len = shared;
    if (shared % kPageTokens != 0) {
      // Both would write to the last, partial page: this sequence goes on in a copy.
      const int source = sequence.pages.back();
      sequence.pages.pop_back();
      sequence.len -= shared % kPageTokens;
      if (take_page(sequence)) {
        model_.backend->copy_page(cache_, source, sequence.pages.back(), shared % kPageTokens);
        sequence.len = shared;
      }
      pool_.release(source);
    }
    int32_t* line = page_table_.data() + static_cast<int64_t>(sequence.line) * cache_.max_pages;
    std::copy(sequence.pages.begin(), sequence.pages.end(), line);
    page_table_changed_ = true;
  }
  if (sequence.stats.set_backs == 0) {
    sequence.stats.reused_tokens = sequence.len;
    sequence.start = Clock::now();
  }
  const auto older = [&](const auto& other) { return other->id < sequence.id; };
  active_.insert(std::find_if_not(active_.begin(), active_.end(), older), std::move(owned));
}

// Pages go to the texts kept for reuse, which give them up when anybody needs one.
void Scheduler::release(Sequence& sequence) {
  const auto used = static_cast<size_t>(pages_for(sequence.len));
  while (sequence.pages.size() > used) {
    pool_.release(sequence.pages.back());
    sequence.pages.pop_back();
  }
  if (reuse_ && sequence.len > 0) {
    kept_.keep({{sequence.tokens.begin(), sequence.tokens.begin() + sequence.len},
                std::move(sequence.pages),
                rope_length(sequence)});
  } else {
    for (const int page : sequence.pages) pool_.release(page);
  }
  sequence.pages.clear();
  sequence.hidden.clear();
  sequence.len = 0;
  free_lines_.push_back(sequence.line);
  sequence.line = -1;
}

// Invisible from outside: the text so far becomes its prompt, and the same tokens follow.
void Scheduler::set_back(size_t index) {
  std::unique_ptr<Sequence> sequence = std::move(active_[index]);
  active_.erase(active_.begin() + static_cast<int64_t>(index));
  release(*sequence);
  ++sequence->stats.set_backs;
  ++set_backs_;
  const auto older = [&](const auto& other) { return other->id < sequence->id; };
  waiting_.insert(std::find_if_not(waiting_.begin(), waiting_.end(), older), std::move(sequence));
}

void Scheduler::share_out() {
  int rows = options_.prefill_chunk;
  for (const auto& sequence : active_) {
    sequence->chunk = std::min(sequence->to_root(), rows);
    sequence->has_tree = sequence->chunk == sequence->to_root();
    sequence->tree.reset(sequence->tokens.back());
    rows -= sequence->chunk;
  }
}

bool Scheduler::take_page(Sequence& sequence) {
  while (pool_.num_free() == 0) {
    if (!kept_.drop_oldest()) return false;
  }
  const int page = pool_.take();
  const int64_t line = static_cast<int64_t>(sequence.line) * cache_.max_pages;
  page_table_[static_cast<size_t>(line) + sequence.pages.size()] = page;
  page_table_changed_ = true;
  sequence.pages.push_back(page);
  return true;
}

bool Scheduler::cover(Sequence& sequence, int64_t slots) {
  while (static_cast<int64_t>(sequence.pages.size()) * kPageTokens < slots) {
    if (!take_page(sequence)) return false;
  }
  return true;
}

void Scheduler::commit_pages() {
  for (size_t i = 0; i < active_.size();) {
    Sequence& sequence = *active_[i];
    const int least = sequence.len + sequence.chunk + (sequence.has_tree ? 1 : 0);
    if (!cover(sequence, least)) {
      // Oldest first, so the youngest has no pages of this step yet. Alone, a sequence always fits.
      MEDUSA_CHECK_INTERNAL(active_.size() > 1, "scheduler: one sequence does not fit the cache");
      set_back(active_.size() - 1);
      continue;
    }
    const int nodes = sequence.tree.num_nodes();
    if (sequence.has_tree && !cover(sequence, least - 1 + nodes)) {
      const auto room = static_cast<int>(sequence.pages.size()) * kPageTokens - (least - 1);
      DraftTree cut(sequence.tree.token(0));
      for (int node = 1; node < room; ++node) {
        cut.add(sequence.tree.parent(node), sequence.tree.token(node));
      }
      sequence.tree = cut;
    }
    ++i;
  }
  upload_page_table();
}

bool Scheduler::reserve(const std::function<int64_t(const Sequence&)>& slots) {
  bool covered = true;
  for (const auto& sequence : active_) covered = covered && cover(*sequence, slots(*sequence));
  upload_page_table();
  return covered;
}

void Scheduler::upload_page_table() {
  if (!page_table_changed_) return;
  model_.backend->upload(page_table_memory_->data(), page_table_.data(),
                         page_table_memory_->num_bytes());
  page_table_changed_ = false;
}

void Scheduler::fill_stats(SessionStats& stats) const {
  stats.active = static_cast<int>(active_.size());
  stats.waiting = static_cast<int>(waiting_.size());
  stats.pages_total = pool_.num_pages();
  stats.pages_cached = kept_.num_pages();
  stats.pages_used = pool_.num_pages() - pool_.num_free() - stats.pages_cached;
  stats.set_backs = set_backs_;
  stats.cache_bytes = cache_.buffer->num_bytes();
}

}  // namespace medusa
