// Decode steps that no host follows: the step's state, its graphs and the ring of results.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "backend/cuda/runtime.h"
#include "backend/cuda/step_state.h"
#include "backend/cuda/verify_state.h"
#include "medusa/resident.h"

namespace medusa::cuda {

// A captured step, move-only.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph();
  bool captured() const { return exec_ != nullptr; }
  // Records what `body` enqueues on the stream; nothing runs. What body throws is passed on, and
  // nothing is captured.
  void capture(cudaStream_t stream, const std::function<void()>& body);
  void launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t exec_ = nullptr;
};

class CudaResident final : public Resident {
 public:
  // stream and staging are the backend's, which outlives this.
  CudaResident(const ResidentShape& shape, const Stream& stream, Staging& staging);
  ~CudaResident() override;

  void start(const ResidentLine& line) override;
  void set_lines(std::span<const int> lines) override;
  void launch(int batch, const std::function<void()>& body) override;
  TensorView hidden(int batch) override;
  void fill_tree(int batch, TensorView ids, TensorView values, TensorView token_map) override;
  PassRows build_rows(int batch) override;
  void commit(int batch, TensorView logits, TensorView hidden, KvCache& cache) override;
  std::vector<Accepted> wait() override;
  Times times() const override { return times_; }
  void discard() override;
  void read_hidden(int line, float* hidden) override;

 private:
  struct Recorded {
    bool run_once = false;  // so that all memory has grown and all kernels are loaded
    Graph graph;
  };

  const ResidentShape shape_;
  const bool graphs_ = enabled("MEDUSA_CUDA_GRAPHS");
  const Stream& stream_;
  Staging& staging_;
  OwnedStepState state_;
  PinnedRing ring_;
  Scratch work_;  // between the kernels of verify
  std::vector<VerifyNeeds> line_needs_;
  VerifyNeeds needs_;                                 // of the lines that step
  std::map<std::pair<int, int>, Recorded> recorded_;  // by batch and needs
  std::vector<int> unread_;  // batches of the steps under way, oldest first
  uint64_t num_read_ = 0;
  uint64_t last_ended_ = 0;  // nanoseconds, of the step read last
  Times times_;
};

}  // namespace medusa::cuda
