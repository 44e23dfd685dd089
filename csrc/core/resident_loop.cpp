// SPDX-License-Identifier: Apache-2.0
#include "core/resident_loop.h"

#include <algorithm>

#include "medusa/error.h"

namespace medusa {

std::unique_ptr<ResidentLoop> ResidentLoop::make(const Model& model, Drafter* drafter,
                                                 const SessionOptions& options) {
  if (drafter && (!drafter->resident_tree() || drafter->needs_commit())) return nullptr;
  ResidentShape shape;
  shape.max_lines = options.max_batch;
  shape.hidden_size = model.config.hidden_size;
  shape.vocab_size = model.config.vocab_size;
  if (drafter) shape.tree = *drafter->resident_tree();
  if (shape.tree.depth() > model.backend->max_tree_depth()) return nullptr;
  std::unique_ptr<Resident> resident = model.backend->make_resident(shape);
  if (!resident) return nullptr;
  return std::unique_ptr<ResidentLoop>(new ResidentLoop(model, drafter, std::move(resident)));
}

ResidentLoop::ResidentLoop(const Model& model, Drafter* drafter, std::unique_ptr<Resident> resident)
    : model_(model),
      drafter_(drafter),
      resident_(std::move(resident)),
      num_nodes_(drafter ? drafter->resident_tree()->num_nodes() : 1),
      depth_(drafter ? drafter->resident_tree()->depth() : 0) {}

bool ResidentLoop::accepts(const Sequence& sequence) const {
  return sequence.to_root() == 0 && (!drafter_ || !sequence.hidden.empty()) &&
         sequence.request.eos_ids.size() <= kMaxResidentEos;
}

bool ResidentLoop::start(Scheduler& scheduler) {
  const auto& active = scheduler.active();
  const auto accepted = [&](const auto& sequence) { return accepts(*sequence); };
  if (active.empty() || !std::all_of(active.begin(), active.end(), accepted)) return false;
  started_.clear();
  for (const auto& sequence : active) {
    started_.insert(sequence->id);
    ResidentLine line;
    line.line = sequence->line;
    line.prompt_len = sequence->prompt_len();
    line.remaining = sequence->remaining();
    line.tokens = sequence->tokens;
    line.sampling = &sequence->request.sampling;
    line.eos_ids = sequence->request.eos_ids;
    line.hidden = drafter_ ? sequence->hidden.data() : nullptr;
    resident_->start(line);
  }
  lines_.clear();
  running_ = true;
  return true;
}

void ResidentLoop::launch(Scheduler& scheduler, Workspace& workspace) {
  const auto& active = scheduler.active();
  while (static_cast<int>(launched_.size()) < Resident::kMaxAhead) {
    const auto ahead = static_cast<int64_t>(launched_.size());
    // Every step emits at least one token of each line.
    const bool any_left = std::any_of(active.begin(), active.end(), [&](const auto& sequence) {
      return sequence->remaining() > ahead;
    });
    if (!any_left) return;
    const bool covered = scheduler.reserve([&](const Sequence& sequence) {
      return std::min<int64_t>(sequence.len + ahead * (depth_ + 1), sequence.max_tokens) +
             num_nodes_;
    });
    if (!covered) return;

    std::vector<int> lines;
    std::vector<int64_t> ids;
    for (const auto& sequence : active) {
      lines.push_back(sequence->line);
      ids.push_back(sequence->id);
    }
    MEDUSA_CHECK_INTERNAL(
        std::all_of(ids.begin(), ids.end(), [&](int64_t id) { return started_.contains(id); }),
        "resident loop: a sequence steps that was not started");
    if (lines != lines_) resident_->set_lines(lines);
    lines_ = std::move(lines);
    const auto batch = static_cast<int>(ids.size());
    resident_->launch(batch, [&] { step(batch, scheduler.cache(), workspace); });
    launched_.push_back(std::move(ids));
  }
}

// What is recorded: nothing here may depend on more than the batch.
void ResidentLoop::step(int batch, KvCache& cache, Workspace& workspace) {
  if (drafter_) drafter_->draft_resident(*resident_, batch);
  const Resident::PassRows rows = resident_->build_rows(batch);
  const PassInput input{rows.rows, rows.prompt_len, rows.row_index, rows.row_index};
  const PassOutput out = forward(model_, cache, input, workspace);
  resident_->commit(batch, out.logits, out.hidden, cache);
}

std::vector<std::pair<int64_t, Accepted>> ResidentLoop::wait() {
  MEDUSA_CHECK_INTERNAL(!launched_.empty(), "resident loop: no step is under way");
  const std::vector<int64_t> ids = std::move(launched_.front());
  launched_.pop_front();
  std::vector<Accepted> accepted = resident_->wait();
  MEDUSA_CHECK_INTERNAL(accepted.size() == ids.size(), "resident loop: ", accepted.size(),
                        " results of ", ids.size(), " lines");
  std::vector<std::pair<int64_t, Accepted>> results;
  for (size_t i = 0; i < ids.size(); ++i) results.emplace_back(ids[i], std::move(accepted[i]));
  return results;
}

void ResidentLoop::stop(Scheduler& scheduler) {
  running_ = false;
  if (!drafter_) return;
  for (const auto& sequence : scheduler.active()) {
    resident_->read_hidden(sequence->line, sequence->hidden.data());
  }
}

void ResidentLoop::abandon(Scheduler& scheduler) {
  running_ = false;
  launched_.clear();
  for (const auto& sequence : scheduler.active()) sequence->hidden.clear();
  try {
    resident_->discard();
  } catch (const CudaError&) {  // the error that led here tells more
  }
}

}  // namespace medusa
