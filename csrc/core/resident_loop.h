// Decoding with no host between the steps, where the backend can (medusa/resident.h): sequences
// that have reached their root move to the device, steps are launched ahead, results read late.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "core/forward.h"
#include "core/scheduler.h"
#include "medusa/drafter.h"
#include "medusa/resident.h"

namespace medusa {

class ResidentLoop {
 public:
  // Null where the backend or the drafter needs the host between steps.
  static std::unique_ptr<ResidentLoop> make(const Model& model, Drafter* drafter,
                                            const SessionOptions& options);

  bool running() const { return running_; }
  bool idle() const { return launched_.empty(); }
  // Moves all active sequences to the device; false: one of them cannot go.
  bool start(Scheduler& scheduler);
  // Launches steps until kMaxAhead are under way, or pages or work run out.
  void launch(Scheduler& scheduler, Workspace& workspace);
  // The oldest step: what each sequence, by id, accepted. Nothing: it had ended before.
  std::vector<std::pair<int64_t, Accepted>> wait();
  Resident::Times times() const { return resident_->times(); }
  // Back to the host; idle() must hold.
  void stop(Scheduler& scheduler);
  // The same after an error: what is under way is lost, and computed again.
  void abandon(Scheduler& scheduler);

 private:
  ResidentLoop(const Model& model, Drafter* drafter, std::unique_ptr<Resident> resident);
  bool accepts(const Sequence& sequence) const;
  void step(int batch, KvCache& cache, Workspace& workspace);

  const Model& model_;
  Drafter* const drafter_;  // null: plain
  const std::unique_ptr<Resident> resident_;
  const int num_nodes_, depth_;
  bool running_ = false;
  std::set<int64_t> started_;                  // ids
  std::vector<int> lines_;                     // of the next step
  std::deque<std::vector<int64_t>> launched_;  // ids of each step under way
};

}  // namespace medusa
