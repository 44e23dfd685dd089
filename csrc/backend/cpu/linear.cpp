// linear, and linear behind a norm or a gated activation: rows are made and laid out for the
// kernel, then stripes of outputs shared out among the threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"

namespace medusa::cpu {
namespace {

constexpr int64_t kPanelRows = 120;     // these rows of x stay cached while blocks of W pass
constexpr int64_t kWorthBytes = 32768;  // of weights and rows that pay for another task
// So few values every thread lays out for itself: cheaper than waiting for one that does.
constexpr int64_t kOwnValues = 2048;

char* at_least(std::vector<char>& memory, int64_t num_bytes) {
  if (memory.size() < static_cast<size_t>(num_bytes)) memory.resize(static_cast<size_t>(num_bytes));
  return memory.data();
}

// Rows [first, last) of the panel or tile `index` of `count` nearly equal ones.
struct Part {
  int64_t first, last;
  Part(int64_t num_rows, int64_t index, int64_t count)
      : first(num_rows * index / count), last(num_rows * (index + 1) / count) {}
  int64_t size() const { return last - first; }
};

}  // namespace

// make(row, memory) leaves row `row` [K] of the weight's activation type in memory.
template <class Make>
void CpuBackend::product(int64_t num_rows, const Make& make, const Weight& weight, TensorView bias,
                         bool accumulate, TensorView out) {
  const PackedWeight& matrix = packed(weight);
  const int64_t K = weight.num_inputs(), num_blocks = matrix.num_blocks();
  const int64_t value_bytes = dtype_bytes(activation_dtype(weight.dtype()));
  const int64_t row_bytes = kernels_.arranged_bytes(weight.dtype(), K);
  const int64_t num_panels = (num_rows + kPanelRows - 1) / kPanelRows;
  const int64_t max_tile = kernels_.tile_rows(weight.dtype());

  const auto arrange = [&](int64_t first, int64_t last, char* to) {
    thread_local std::vector<char> memory;
    char* rows = at_least(memory, (last - first) * K * value_bytes);
    for (int64_t row = first; row < last; ++row) make(row, rows + (row - first) * K * value_bytes);
    kernels_.arrange_rows(weight.dtype(), rows, last - first, K, to);
  };
  const auto arrange_panel = [&](const Part& panel, char* to) {
    const int64_t num_tiles = (panel.size() + max_tile - 1) / max_tile;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const Part tile(panel.size(), i, num_tiles);
      arrange(panel.first + tile.first, panel.first + tile.last, to + tile.first * row_bytes);
    }
  };

  thread_local std::vector<char> memory;
  const bool own = num_panels == 1 && num_rows * K <= kOwnValues;
  char* shared = own ? nullptr : at_least(memory, num_rows * row_bytes);
  if (!own) {
    // As many tasks as tiles of the smallest panel, whatever the panels' sizes.
    const int64_t per_panel = (num_rows / num_panels + max_tile - 1) / max_tile + 1;
    pool_.run(static_cast<int>(num_panels * per_panel), [&](int task) {
      const Part panel(num_rows, task / per_panel, num_panels);
      const int64_t num_tiles = (panel.size() + max_tile - 1) / max_tile;
      if (task % per_panel >= num_tiles) return;
      const Part tile(panel.size(), task % per_panel, num_tiles);
      arrange(panel.first + tile.first, panel.first + tile.last,
              shared + (panel.first + tile.first) * row_bytes);
    });
  }

  static std::atomic<uint64_t> last_product{0};
  const uint64_t this_product = ++last_product;
  const int64_t num_stripes = std::max<int64_t>(
      1,
      std::min({num_blocks, int64_t{4} * pool_.num_threads(),
                num_blocks * matrix.block_bytes() * std::min<int64_t>(num_rows, 8) / kWorthBytes}));
  pool_.run(static_cast<int>(num_panels * num_stripes), [&](int task) {
    const Part panel(num_rows, task / num_stripes, num_panels);
    const char* rows = own ? nullptr : shared + panel.first * row_bytes;
    if (own) {
      thread_local std::vector<char> own_memory;
      thread_local uint64_t arranged = 0;  // the product whose rows lie there
      char* to = at_least(own_memory, num_rows * row_bytes);
      if (arranged != this_product) arrange_panel(panel, to);
      arranged = this_product;
      rows = to;
    }
    LinearTask part;
    part.dtype = weight.dtype();
    part.weight = matrix.block(0);
    part.x = rows;
    part.bias = bias.as<float>();
    part.out = out.as<float>() + panel.first * out.size(1);
    part.accumulate = accumulate;
    part.num_rows = panel.size();
    part.num_inputs = K;
    part.num_outputs = weight.num_outputs();
    part.first_block = num_blocks * (task % num_stripes) / num_stripes;
    part.last_block = num_blocks * (task % num_stripes + 1) / num_stripes;
    kernels_.linear(part);
  });
}

void CpuBackend::do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                           TensorView out) {
  const int64_t row_bytes = x.size(1) * dtype_bytes(x.dtype);
  const auto copy = [&](int64_t row, char* to) {
    std::copy_n(x.as<char>() + row * row_bytes, row_bytes, to);
  };
  product(x.size(0), copy, weight, bias, accumulate, out);
}

void CpuBackend::do_norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                                TensorView bias, TensorView /*normed*/, TensorView out) {
  const int64_t d = x.size(1);
  const bool bf16 = activation_dtype(weight.dtype()) == DType::bf16;
  const auto norm = [&](int64_t row, char* to) {
    kernels_.rms_norm(x.as<float>() + row * d, gain.as<float>(), eps, d, to, bf16);
  };
  product(x.size(0), norm, weight, bias, false, out);
}

void CpuBackend::do_gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                                 TensorView bias, bool accumulate, TensorView /*gated*/,
                                 TensorView out) {
  const int64_t n = weight.num_inputs();
  const bool bf16 = activation_dtype(weight.dtype()) == DType::bf16;
  const auto act = gate_kernel(activation);
  const auto gate = [&](int64_t row, char* to) {
    const float* values = gate_up.as<float>() + row * 2 * n;
    act(values, values + n, n, to, bf16);
  };
  product(gate_up.size(0), gate, weight, bias, accumulate, out);
}

}  // namespace medusa::cpu
