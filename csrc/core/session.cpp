// The decode loop: plan rows, one pass, walk the trees, keep what they accepted.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/session.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <utility>

#include "core/forward.h"
#include "core/resident_loop.h"
#include "core/row_batch.h"
#include "core/scheduler.h"
#include "medusa/error.h"

namespace medusa {
namespace {

SessionOptions checked(SessionOptions options, const Model& model) {
  const int model_context = model.config.max_context;
  if (options.max_context == 0) options.max_context = model_context;
  MEDUSA_CHECK_ARG(options.max_context >= 2 && options.max_context <= model_context,
                   "max_context is ", options.max_context, ", allowed is 2 to ", model_context,
                   " (the model's)");
  MEDUSA_CHECK_ARG(options.max_batch >= 1 && options.max_batch <= 1024, "max_batch is ",
                   options.max_batch, ", allowed is 1 to 1024");
  MEDUSA_CHECK_ARG(options.prefill_chunk >= 1 && options.prefill_chunk <= 8192, "prefill_chunk is ",
                   options.prefill_chunk, ", allowed is 1 to 8192");
  constexpr int64_t kMaxCacheTokens = int64_t{1} << 30;
  MEDUSA_CHECK_ARG(options.cache_tokens >= 0 && options.cache_tokens <= kMaxCacheTokens,
                   "cache_tokens is ", options.cache_tokens, ", allowed is 0 (automatic) to ",
                   kMaxCacheTokens);
  constexpr int64_t kDefaultCacheTokens = 16384;
  if (options.cache_tokens == 0) {
    options.cache_tokens =
        std::min(int64_t{options.max_batch} * options.max_context, kDefaultCacheTokens);
  }
  options.cache_tokens = std::max<int64_t>(options.cache_tokens, options.max_context);
  return options;
}

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

struct Session::State {
  State(std::shared_ptr<const Model> model_in, std::shared_ptr<Drafter> drafter_in,
        const SessionOptions& options_in)
      : model(std::move(model_in)),
        drafter(std::move(drafter_in)),
        options(checked(options_in, *model)),
        max_nodes(drafter ? drafter->max_nodes() : 1),
        needs_commit(drafter && drafter->needs_commit()),
        // Hidden rows of reused tokens are gone, and such a drafter wants them all.
        scheduler(*model, options, max_nodes, !needs_commit),
        workspace(*model, options.prefill_chunk + options.max_batch * max_nodes,
                  options.max_batch * max_nodes),
        resident(ResidentLoop::make(*model, drafter.get(), options)) {
    publish();
  }

  void receive();
  void draft();
  void run();
  bool on_device() const { return resident && resident->running(); }
  bool run_resident();
  void read_resident_step();
  void leave_device();
  void commit(Sequence& sequence, const float* hidden, std::vector<KvMove>& moves);
  void take_over(Sequence& sequence);
  bool emit(Sequence& sequence);
  void tell_drafter(const Sequence& sequence, const float* hidden);
  void finish(Sequence& sequence, Finish reason, Event event);
  void publish();

  const std::shared_ptr<const Model> model;
  const std::shared_ptr<Drafter> drafter;
  const SessionOptions options;
  const int max_nodes;
  const bool needs_commit;

  std::atomic<std::thread::id> stepping;  // the thread that is in step()
  std::mutex step_mutex;                  // one step at a time; guards what follows
  Scheduler scheduler;
  Workspace workspace;
  std::unique_ptr<ResidentLoop> resident;  // null: every step passes through the host
  std::vector<Event> events;               // survive a step that throws
  std::vector<int64_t> cancelling;         // likewise
  bool leave_soon = false;                 // a line of the device is wanted for another text
  int64_t steps = 0, device_steps = 0, compactions_across_pages = 0;

  mutable std::mutex inbox_mutex;  // guards what follows; never held during a pass
  int64_t next_id = 1;
  std::vector<std::unique_ptr<Sequence>> submitted;
  std::vector<int64_t> cancelled;
  std::set<int64_t> live;
  SessionStats snapshot;
};

Session::Session(std::shared_ptr<const Model> model, std::shared_ptr<Drafter> drafter,
                 const SessionOptions& options) {
  MEDUSA_CHECK_ARG(model != nullptr, "session: no model given");
  const int nodes = drafter ? drafter->max_nodes() : 1;
  MEDUSA_CHECK_ARG(nodes >= 1 && nodes <= kMaxTreeNodes, "session: the drafter's max_nodes is ",
                   nodes, ", allowed is 1 to ", kMaxTreeNodes);
  state_ = std::make_unique<State>(std::move(model), std::move(drafter), options);
}

Session::~Session() = default;

const SessionOptions& Session::options() const { return state_->options; }

int64_t Session::submit(Request request) {
  State& s = *state_;
  const int vocab = s.model->config.vocab_size;
  const auto length = static_cast<int64_t>(request.tokens.size());
  MEDUSA_CHECK_ARG(length >= 1, "the prompt is empty; give at least one token");
  MEDUSA_CHECK_ARG(length < s.options.max_context, "the prompt has ", length,
                   " tokens, allowed is at most ", s.options.max_context - 1,
                   " (max_context less one); shorten it or raise max_context");
  for (const int32_t token : request.tokens) {
    MEDUSA_CHECK_ARG(token >= 0 && token < vocab, "the prompt holds token ", token,
                     ", allowed is 0 to ", vocab - 1);
  }
  MEDUSA_CHECK_ARG(request.max_new_tokens >= 0, "max_new_tokens is ", request.max_new_tokens,
                   ", allowed is 0 (to the context's end) or a positive number");
  request.sampling.check();

  auto sequence = std::make_unique<Sequence>();
  const int64_t room = s.options.max_context - length;
  const int64_t wanted = request.max_new_tokens > 0 ? request.max_new_tokens : room;
  sequence->tokens = request.tokens;
  sequence->max_tokens = static_cast<int>(length + std::min(wanted, room));
  sequence->stats.prompt_tokens = static_cast<int>(length);
  sequence->request = std::move(request);

  const std::lock_guard lock(s.inbox_mutex);
  const int64_t id = s.next_id++;
  sequence->id = id;
  s.submitted.push_back(std::move(sequence));
  s.live.insert(id);
  return id;
}

bool Session::cancel(int64_t request) {
  const std::lock_guard lock(state_->inbox_mutex);
  if (!state_->live.contains(request)) return false;
  state_->cancelled.push_back(request);
  return true;
}

bool Session::idle() const {
  const std::lock_guard lock(state_->inbox_mutex);
  return state_->live.empty();
}

SessionStats Session::stats() const {
  const std::lock_guard lock(state_->inbox_mutex);
  return state_->snapshot;
}

std::vector<Event> Session::step() {
  State& s = *state_;
  MEDUSA_CHECK_ARG(s.stepping != std::this_thread::get_id(),
                   "step was called from inside a step, by a method of the drafter");
  const std::lock_guard lock(s.step_mutex);
  s.stepping = std::this_thread::get_id();
  const std::shared_ptr<void> reset(nullptr, [&](void*) { s.stepping = std::thread::id(); });
  s.receive();
  if (!s.on_device()) s.scheduler.admit();
  if (!s.scheduler.active().empty() && !s.run_resident()) {
    s.scheduler.share_out();
    s.draft();
    s.scheduler.commit_pages();
    s.run();
  }
  s.publish();
  return std::exchange(s.events, {});
}

// Takes what came in; for it, steps under way on the device are read and the host takes over.
void Session::State::receive() {
  bool any;
  {
    const std::lock_guard lock(inbox_mutex);
    any = !submitted.empty() || !cancelled.empty();
    for (auto& sequence : submitted) scheduler.enqueue(std::move(sequence));
    submitted.clear();
    cancelling.insert(cancelling.end(), cancelled.begin(), cancelled.end());
    cancelled.clear();
  }
  if (any || leave_soon || !cancelling.empty()) leave_device();
  for (const int64_t id : std::exchange(cancelling, {})) {
    const std::unique_ptr<Sequence> sequence = scheduler.remove(id);
    if (sequence) finish(*sequence, Finish::cancelled, {});
  }
}

void Session::State::draft() {
  if (!drafter) return;
  std::vector<DraftInput> inputs;
  std::vector<Sequence*> takers;
  std::vector<DraftTree> trees;
  for (const auto& sequence : scheduler.active()) {
    // Depth j accepted means j + 1 tokens emitted.
    const int max_depth = std::min(sequence->remaining() - 1, model->backend->max_tree_depth());
    if (!sequence->has_tree || max_depth < 1 || max_nodes < 2) continue;
    inputs.push_back({sequence->id, sequence->tokens,
                      sequence->hidden.empty() ? nullptr : sequence->hidden.data(), max_nodes,
                      max_depth, &sequence->request.sampling});
    takers.push_back(sequence.get());
    trees.push_back(sequence->tree);
  }
  if (inputs.empty()) return;
  drafter->draft(inputs, trees);
  for (size_t i = 0; i < takers.size(); ++i) {
    const DraftTree& tree = trees[i];
    MEDUSA_CHECK_ARG(tree.num_nodes() <= max_nodes, "the drafter made ", tree.num_nodes(),
                     " nodes, allowed is ", max_nodes);
    // Deeper nodes could be accepted past the end; tokens outside the vocabulary could never be.
    DraftTree usable(takers[i]->tokens.back());
    std::vector<int> node_of(static_cast<size_t>(tree.num_nodes()), -1);
    node_of[0] = 0;
    for (int node = 1; node < tree.num_nodes(); ++node) {
      const int parent = node_of[static_cast<size_t>(tree.parent(node))];
      const int32_t token = tree.token(node);
      if (parent < 0 || tree.depth(node) > inputs[i].max_depth || token < 0 ||
          token >= model->config.vocab_size) {
        continue;
      }
      node_of[static_cast<size_t>(node)] = usable.add(parent, token);
    }
    takers[i]->tree = usable;
  }
}

void Session::State::run() {
  RowBatch rows;
  std::vector<VerifyItem> items;
  std::vector<int32_t> tree_rows, first_rows;
  Backend& backend = *model->backend;
  for (const auto& owned : scheduler.active()) {
    Sequence& sequence = *owned;
    const std::span<const int32_t> text = sequence.tokens;
    first_rows.push_back(rows.num_rows());
    rows.add_chunk(
        sequence.line, sequence.prompt_len(),
        text.subspan(static_cast<size_t>(sequence.len), static_cast<size_t>(sequence.chunk)),
        sequence.len);
    if (!sequence.has_tree) continue;
    const int root = rows.add_tree(sequence.line, sequence.prompt_len(), sequence.tree,
                                   sequence.len + sequence.chunk);
    items.push_back({&sequence.tree, static_cast<int>(tree_rows.size()), &sequence.request.sampling,
                     text, sequence.request.eos_ids, sequence.remaining(), &sequence.accepted});
    for (int node = 0; node < sequence.tree.num_nodes(); ++node) tree_rows.push_back(root + node);
  }
  if (rows.num_rows() == 0) return;

  if (needs_commit) {
    rows.hidden_rows.resize(static_cast<size_t>(rows.num_rows()));
    std::iota(rows.hidden_rows.begin(), rows.hidden_rows.end(), 0);
    rows.logit_rows = tree_rows;
  } else {
    rows.hidden_rows = tree_rows;
    rows.logit_rows.resize(tree_rows.size());
    std::iota(rows.logit_rows.begin(), rows.logit_rows.end(), 0);
  }
  const PassOutput out =
      forward(*model, scheduler.cache(), rows.upload(backend, workspace.row_memory()), workspace);
  if (!items.empty()) backend.verify(out.logits, items);
  ++steps;

  const int64_t d = model->config.hidden_size;
  std::vector<KvMove> moves;
  const auto* hidden = static_cast<const float*>(out.hidden.data);
  size_t item = 0, index = 0;
  for (const auto& sequence : scheduler.active()) {
    const int first_row = first_rows[index++];
    const int first_tree_row = sequence->has_tree ? items[item++].first_row : 0;
    const int root = needs_commit ? first_row + sequence->chunk : first_tree_row;
    commit(*sequence, hidden + root * d, moves);
  }
  if (!moves.empty()) backend.compact_kv(scheduler.cache(), moves);
  backend.synchronize();

  std::vector<int64_t> ended;
  for (const auto& sequence : scheduler.active()) {
    if (sequence->has_tree && emit(*sequence)) ended.push_back(sequence->id);
  }
  std::vector<std::pair<Sequence*, int64_t>> told;
  index = 0;
  for (const auto& sequence : scheduler.active()) {
    const int64_t first_row = first_rows[index++];
    const bool over = std::find(ended.begin(), ended.end(), sequence->id) != ended.end();
    if (needs_commit && !over) told.emplace_back(sequence.get(), first_row);
  }
  for (const int64_t id : ended) scheduler.remove(id);
  // Last and all of them, so that a drafter that throws for one text loses nothing of another.
  std::exception_ptr error;
  for (const auto& [sequence, first_row] : told) {
    try {
      tell_drafter(*sequence, hidden + first_row * d);
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// One step on the device, if every active sequence can be there. The host reads it late: the next
// one is already under way.
bool Session::State::run_resident() {
  if (!resident || (!resident->running() && !resident->start(scheduler))) return false;
  try {
    resident->launch(scheduler, workspace);
  } catch (...) {
    resident->abandon(scheduler);
    throw;
  }
  if (resident->idle()) {  // no pages left for a whole tree
    leave_device();
    return false;
  }
  read_resident_step();
  return true;
}

void Session::State::read_resident_step() {
  std::vector<std::pair<int64_t, Accepted>> results;
  try {
    results = resident->wait();
  } catch (...) {
    resident->abandon(scheduler);
    throw;
  }
  ++steps;
  ++device_steps;
  std::vector<int64_t> ended;
  for (auto& [id, accepted] : results) {
    if (accepted.tokens.empty()) continue;
    const auto found =
        std::find_if(scheduler.active().begin(), scheduler.active().end(),
                     [&, wanted = id](const auto& sequence) { return sequence->id == wanted; });
    if (found == scheduler.active().end()) continue;
    Sequence& sequence = **found;
    sequence.accepted = std::move(accepted);
    take_over(sequence);
    if (emit(sequence)) ended.push_back(id);
  }
  for (const int64_t id : ended) scheduler.remove(id);
  // Not now: a text's end is told before the steps that still run without it.
  leave_soon |= !ended.empty() && (scheduler.has_waiting() || scheduler.active().empty());
}

// Reads what is under way and goes on with the host in the loop.
void Session::State::leave_device() {
  while (on_device() && !resident->idle()) read_resident_step();
  if (on_device()) resident->stop(scheduler);
  leave_soon = false;
}

// The tokens that this step put into the cache, with the hidden rows that the pass gave them
// (`hidden`, backend memory).
void Session::State::tell_drafter(const Sequence& sequence, const float* hidden) {
  const auto d = static_cast<int64_t>(model->config.hidden_size);
  const std::vector<int> path = sequence.has_tree ? sequence.accepted.path : std::vector<int>();
  const auto added = static_cast<size_t>(sequence.chunk) + path.size();
  const size_t start = static_cast<size_t>(sequence.len) - added;
  std::vector<float> rows(added * static_cast<size_t>(d));
  float* to = rows.data();
  model->backend->download(to, hidden, sequence.chunk * d * 4);
  to += sequence.chunk * d;
  for (const int node : path) {
    model->backend->download(to, hidden + (sequence.chunk + node) * d, d * 4);
    to += d;
  }
  drafter->on_commit(sequence.id, static_cast<int>(start),
                     std::span<const int32_t>(sequence.tokens).subspan(start, added), rows.data());
}

// Takes over what a sequence's walk accepted. `hidden` is the row of its root, backend memory.
void Session::State::commit(Sequence& sequence, const float* hidden, std::vector<KvMove>& moves) {
  const auto d = static_cast<size_t>(model->config.hidden_size);
  sequence.len += sequence.chunk;
  if (!sequence.has_tree) return;

  const std::vector<int>& path = sequence.accepted.path;
  const auto accepted = static_cast<int>(path.size());
  MEDUSA_CHECK_INTERNAL(accepted > 0, "session: a walk accepted nothing");
  if (path.back() != accepted - 1) {
    moves.push_back({sequence.line, sequence.len, accepted, path.data()});
  }
  if (drafter && drafter->needs_hidden()) {
    sequence.hidden.resize(d);
    model->backend->download(sequence.hidden.data(), hidden + static_cast<size_t>(path.back()) * d,
                             static_cast<int64_t>(d) * 4);
  }
  take_over(sequence);
}

// What a step accepted joins the text; its rows of the cache are in place, or are being moved
// there.
void Session::State::take_over(Sequence& sequence) {
  const std::vector<int>& path = sequence.accepted.path;
  const auto accepted = static_cast<int>(path.size());
  MEDUSA_CHECK_INTERNAL(
      accepted > 0 && path[0] == 0 && sequence.accepted.tokens.size() == path.size(),
      "session: a walk accepted ", accepted, " nodes and ", sequence.accepted.tokens.size(),
      " tokens");
  for (int i = 0; i < accepted; ++i) {
    if ((sequence.len + path[static_cast<size_t>(i)]) / kPageTokens !=
        (sequence.len + i) / kPageTokens) {
      ++compactions_across_pages;
      break;
    }
  }
  sequence.len += accepted;

  if (sequence.emitted() == 0) sequence.first_token = Clock::now();
  sequence.tokens.insert(sequence.tokens.end(), sequence.accepted.tokens.begin(),
                         sequence.accepted.tokens.end());
  RequestStats& stats = sequence.stats;
  ++stats.steps;
  if (static_cast<int>(stats.accepted_lengths.size()) <= accepted) {
    stats.accepted_lengths.resize(static_cast<size_t>(accepted) + 1);
  }
  ++stats.accepted_lengths[static_cast<size_t>(accepted)];
}

// The event of what was taken over; true: it is the sequence's last one.
bool Session::State::emit(Sequence& sequence) {
  const int32_t last = sequence.accepted.tokens.back();
  const std::vector<int32_t>& eos = sequence.request.eos_ids;
  const bool stopped = std::find(eos.begin(), eos.end(), last) != eos.end();
  Event event{sequence.id, sequence.accepted.tokens, Finish::none, {}};
  if (!stopped && sequence.remaining() > 0) {
    events.push_back(std::move(event));
    return false;
  }
  finish(sequence, stopped ? Finish::stop : Finish::length, std::move(event));
  return true;
}

void Session::State::finish(Sequence& sequence, Finish reason, Event event) {
  const Clock::time_point now = Clock::now();
  if (sequence.emitted() > 0) {
    sequence.stats.prefill_s = seconds(sequence.first_token - sequence.start);
    sequence.stats.decode_s = seconds(now - sequence.first_token);
  }
  event.request = sequence.id;
  event.finish = reason;
  event.stats = sequence.stats;
  events.push_back(std::move(event));
  if (drafter) drafter->on_finish(sequence.id);
  const std::lock_guard lock(inbox_mutex);
  live.erase(sequence.id);
}

void Session::State::publish() {
  SessionStats stats;
  scheduler.fill_stats(stats);
  stats.steps = steps;
  stats.device_steps = device_steps;
  if (device_steps > 0) {
    const Resident::Times times = resident->times();
    stats.device_step_s = times.step_s;
    stats.device_gap_s = times.gap_s;
  }
  stats.compactions_across_pages = compactions_across_pages;
  stats.weight_bytes = model->weight_bytes();
  stats.workspace_bytes = workspace.num_bytes();
  const std::lock_guard lock(inbox_mutex);
  snapshot = stats;
}

}  // namespace medusa
