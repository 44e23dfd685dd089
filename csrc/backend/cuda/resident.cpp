// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/resident.h"

#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "backend/cuda/layout.h"
#include "medusa/error.h"

namespace medusa::cuda {
Graph::~Graph() {
  if (exec_ != nullptr) static_cast<void>(cudaGraphExecDestroy(exec_));
}

void Graph::capture(cudaStream_t stream, const std::function<void()>& body) {
  // Of this thread alone: another engine may allocate meanwhile.
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    body();
  } catch (...) {
    static_cast<void>(cudaStreamEndCapture(stream, &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    static_cast<void>(cudaGetLastError());
    throw;
  }
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  const cudaError_t made = cudaGraphInstantiate(&exec_, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  CUDA_CHECK(made);
  CUDA_CHECK(cudaGraphUpload(exec_, stream));
}

void Graph::launch(cudaStream_t stream) const { CUDA_CHECK(cudaGraphLaunch(exec_, stream)); }

CudaResident::CudaResident(const ResidentShape& shape, const Stream& stream, Staging& staging)
    : shape_(shape),
      stream_(stream),
      staging_(staging),
      state_(shape, staging, stream.get()),
      ring_(kMaxAhead + 1, shape.max_lines, shape.tree.num_nodes()),
      line_needs_(static_cast<size_t>(shape.max_lines)) {}

CudaResident::~CudaResident() {
  stream_.drain();  // the device may still write to the ring
}

void CudaResident::start(const ResidentLine& line) {
  line_needs_[static_cast<size_t>(line.line)] = needs_of(*line.sampling, shape_.vocab_size);
  start_line(state_.view(), line, staging_, stream_.get());
}

void CudaResident::set_lines(std::span<const int> lines) {
  needs_ = {};
  for (const int line : lines) {
    needs_ |= line_needs_[static_cast<size_t>(line)];
  }
  medusa::cuda::set_lines(state_.view(), lines, staging_, stream_.get());
}

void CudaResident::launch(int batch, const std::function<void()>& body) {
  MEDUSA_CHECK_INTERNAL(static_cast<int>(unread_.size()) < kMaxAhead, "resident: ", unread_.size(),
                        " steps are unread");
  const cudaStream_t stream = stream_.get();
  const int needs = needs_.penalty * 1 + needs_.filters * 2 + needs_.typical * 4;
  Recorded& recorded = recorded_[{batch, needs}];
  if (recorded.graph.captured()) {
    recorded.graph.launch(stream);
  } else if (recorded.run_once && graphs_) {
    recorded.graph.capture(stream, body);
    recorded.graph.launch(stream);
  } else {
    body();
    recorded.run_once = true;
  }
  unread_.push_back(batch);
}

TensorView CudaResident::hidden(int batch) {
  return gather_hidden(state_.view(), batch, stream_.get());
}

void CudaResident::fill_tree(int batch, TensorView ids, TensorView values, TensorView token_map) {
  medusa::cuda::fill_tree(state_.view(), batch, ids, values, token_map, stream_.get());
}

Resident::PassRows CudaResident::build_rows(int batch) {
  medusa::cuda::build_rows(state_.view(), batch, stream_.get());
  return state_.view().pass_rows(batch);
}

void CudaResident::commit(int batch, TensorView logits, TensorView hidden, KvCache& cache) {
  const cudaStream_t stream = stream_.get();
  const StepState& state = state_.view();
  VerifyArgs args = state.verify_args(batch);
  args.logits = logits.as<float>();
  args.vocab = logits.size(1);
  args.needs = needs_;
  set_verify_work(args, work_.at_least(set_verify_work(args, nullptr), stream));
  launch_verify(args, stream);
  compact_kv(view_of(cache), state.moves(batch), stream);
  advance(state, batch, stream);
  keep_hidden(state, batch, hidden, stream);
  publish(state, batch, ring_.view(), stream);
}

std::vector<Accepted> CudaResident::wait() {
  MEDUSA_CHECK_INTERNAL(!unread_.empty(), "resident: no step is under way");
  const cudaStream_t stream = stream_.get();
  while (!ring_.has(num_read_)) {
    const cudaError_t status = cudaStreamQuery(stream);
    if (status == cudaErrorNotReady) {
      // A step takes milliseconds, and the next one is under way already.
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      continue;
    }
    CUDA_CHECK(status);
    MEDUSA_CHECK_INTERNAL(ring_.has(num_read_), "resident: a step published nothing");
  }
  const int batch = unread_.front();
  std::vector<Accepted> results(static_cast<size_t>(batch));
  std::optional<uint32_t> broken;  // position
  for (int b = 0; b < batch; ++b) {
    const PinnedRing::Row row = ring_.row(num_read_, b);
    Accepted& accepted = results[static_cast<size_t>(b)];
    if (row.result.status == WalkStatus::broken && !broken) broken = row.result.broken_position;
    accepted.path.assign(row.path.begin(), row.path.end());
    accepted.tokens.assign(row.tokens.begin(), row.tokens.end());
  }
  const auto [began, ended] = ring_.times(num_read_);
  times_.step_s = 1e-9 * static_cast<double>(ended - began);
  times_.gap_s = last_ended_ == 0 ? 0.0 : 1e-9 * static_cast<double>(began - last_ended_);
  last_ended_ = ended;
  unread_.erase(unread_.begin());
  ++num_read_;
  if (broken) throw_broken_logits(*broken);
  return results;
}

void CudaResident::discard() {
  unread_.clear();
  stream_.synchronize();
  while (ring_.has(num_read_)) ++num_read_;  // a launch that failed half-way published nothing
}

void CudaResident::read_hidden(int line, float* hidden) {
  const StepState& state = state_.view();
  const cudaStream_t stream = stream_.get();
  CUDA_CHECK(cudaMemcpyAsync(hidden, state.hidden + line * state.hidden_size,
                             static_cast<size_t>(state.hidden_size) * sizeof(float),
                             cudaMemcpyDeviceToHost, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

}  // namespace medusa::cuda
