// linear, and linear behind a norm or a gated activation: rows are made and laid out for the
// kernel, then ranges of outputs shared out among the threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels/block_layout.h"
#include "backend/cpu/memory.h"
#include "backend/cpu/packed_weight.h"

namespace medusa::cpu {
namespace {

constexpr int64_t kPanelRows = 120;     // these rows of x stay cached while blocks of W pass
constexpr int64_t kWorthBytes = 16384;  // of weights and rows that pay for another claim
constexpr int64_t kCut = kRowPadding;   // K is cut at multiples of this, so that groups stay whole
constexpr int kMaxRanges = 256;
// So few values every thread lays out for itself: cheaper than waiting for one that does.
constexpr int64_t kOwnValues = 2048;

// Rows [first, last) of the panel or tile `index` of `count` nearly equal ones.
struct Part {
  int64_t first, last;
  Part(int64_t num_rows, int64_t index, int64_t count)
      : first(num_rows * index / count), last(num_rows * (index + 1) / count) {}
  int64_t size() const { return last - first; }
};

// Blocks of outputs that one thread walks through; the others may take from it.
struct alignas(64) Range {
  std::atomic<int64_t> next;
};

}  // namespace

// make(row, k, memory) leaves the values k of row `row` [K] of the weight's activation type where
// they belong in memory; it may write others.
template <class Make>
void CpuBackend::product(int64_t num_rows, const Make& make, const Weight& weight, TensorView bias,
                         bool accumulate, TensorView out) {
  const PackedWeight& matrix = packed(weight);
  const int64_t K = weight.num_inputs(), num_blocks = matrix.num_blocks();
  const int64_t value_bytes = dtype_bytes(activation_dtype(weight.dtype()));
  const int64_t row_bytes = kernels_.arranged_bytes(weight.dtype(), K);
  const int64_t num_panels = (num_rows + kPanelRows - 1) / kPanelRows;
  const int64_t max_tile = kernels_.tile_rows(weight.dtype());

  // Values k of all rows of a tile of a panel, to the panel's place.
  const auto arrange = [&](const Part& panel, int64_t index, Span k, char* to) {
    const int64_t num_tiles = (panel.size() + max_tile - 1) / max_tile;
    if (index >= num_tiles) return;
    const Part tile(panel.size(), index, num_tiles);
    thread_local std::vector<char> memory;
    char* rows = at_least(memory, tile.size() * K * value_bytes);
    for (int64_t i = 0; i < tile.size(); ++i) {
      make(panel.first + tile.first + i, k, rows + i * K * value_bytes);
    }
    kernels_.arrange_rows(weight.dtype(), rows, tile.size(), K, k, to + tile.first * row_bytes);
  };

  thread_local std::vector<char> memory;
  const bool own = num_panels == 1 && num_rows * K <= kOwnValues;
  char* shared = own ? nullptr : at_least(memory, num_rows * row_bytes);
  const int64_t most_tiles = (num_rows / num_panels + 1 + max_tile - 1) / max_tile;  // of a panel
  if (!own) {
    // Few tiles are shared out by parts of K as well.
    const int64_t tiles = num_panels * most_tiles, cuts = (K + kCut - 1) / kCut;
    const int64_t parts = std::clamp<int64_t>(pool_.num_threads() / tiles, 1, cuts);
    pool_.run(static_cast<int>(tiles * parts), [&](int task) {
      const Part panel(num_rows, task / parts / most_tiles, num_panels);
      const int64_t part = task % parts;
      const Span k{cuts * part / parts * kCut, std::min(K, cuts * (part + 1) / parts * kCut)};
      arrange(panel, task / parts % most_tiles, k, shared + panel.first * row_bytes);
    });
  }

  // Each thread walks through a range of its own, so that it fetches ahead what it will read, and
  // then helps the others.
  const int64_t chunk =
      std::max<int64_t>(1, kWorthBytes / (matrix.block_bytes() * std::min<int64_t>(num_rows, 8)));
  const int64_t num_ranges =
      std::clamp<int64_t>(num_blocks / chunk, 1, std::min(pool_.num_threads(), kMaxRanges));
  std::array<Range, kMaxRanges> ranges;
  static std::atomic<uint64_t> last_product{0};
  const uint64_t this_product = ++last_product;
  for (int64_t index = 0; index < num_panels; ++index) {
    const Part panel(num_rows, index, num_panels);
    for (int64_t i = 0; i < num_ranges; ++i) {
      ranges[static_cast<size_t>(i)].next = matrix.first_of(i, num_ranges);
    }
    const Weight* after = index + 1 < num_panels ? &weight : weight.next;
    pool_.run(static_cast<int>(num_ranges), [&](int task) {
      // The same range of every weight where there is one for each thread, so that what was fetched
      // ahead is where it is read.
      const int64_t own_range =
          num_ranges == pool_.num_threads() ? ThreadPool::thread_index() % num_ranges : task;
      const char* rows = own ? nullptr : shared + panel.first * row_bytes;
      if (own) {
        thread_local std::vector<char> own_memory;
        thread_local uint64_t arranged = 0;  // the product whose rows lie there
        char* to = at_least(own_memory, num_rows * row_bytes);
        for (int64_t tile = 0; arranged != this_product && tile < most_tiles; ++tile) {
          arrange(panel, tile, {0, K}, to);
        }
        arranged = this_product;
        rows = to;
      }
      LinearTask part{};
      part.dtype = weight.dtype();
      part.weight = matrix.block(0);
      part.x = rows;
      part.bias = bias.as<float>();
      part.out = out.as<float>() + panel.first * out.size(1);
      part.accumulate = accumulate;
      part.num_rows = panel.size();
      part.num_inputs = K;
      part.num_outputs = weight.num_outputs();
      if (after != nullptr) {
        const PackedWeight& next = packed(*after);
        part.fetch_next = next.block(next.first_of(own_range, num_ranges));
      }
      for (int64_t i = 0; i < num_ranges; ++i) {
        const int64_t range = (own_range + i) % num_ranges;
        const int64_t end = matrix.first_of(range + 1, num_ranges);
        part.fetch_end = matrix.block(end);
        std::atomic<int64_t>& next = ranges[static_cast<size_t>(range)].next;
        for (;;) {
          part.first_block = next.fetch_add(chunk, std::memory_order_relaxed);
          if (part.first_block >= end) break;
          part.last_block = std::min(part.first_block + chunk, end);
          kernels_.linear(part);
        }
      }
    });
  }
}

void CpuBackend::do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                           TensorView out) {
  const int64_t value_bytes = dtype_bytes(x.dtype), row_bytes = x.size(1) * value_bytes;
  const auto copy = [&](int64_t row, Span k, char* to) {
    std::memcpy(to + k.first * value_bytes, x.as<char>() + row * row_bytes + k.first * value_bytes,
                static_cast<size_t>((k.last - k.first) * value_bytes));
  };
  product(x.size(0), copy, weight, bias, accumulate, out);
}

void CpuBackend::do_norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                                TensorView bias, TensorView /*normed*/, TensorView out) {
  const int64_t d = x.size(1);
  const bool bf16 = activation_dtype(weight.dtype()) == DType::bf16;
  const auto norm = [&](int64_t row, Span /*k*/, char* to) {  // its sum needs the whole row
    kernels_.rms_norm(x.as<float>() + row * d, gain.as<float>(), eps, d, to, bf16);
  };
  product(x.size(0), norm, weight, bias, false, out);
}

void CpuBackend::do_gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                                 TensorView bias, bool accumulate, TensorView /*gated*/,
                                 TensorView out) {
  const int64_t n = weight.num_inputs();
  const DType dtype = activation_dtype(weight.dtype());
  const Gate act = gate_kernel(activation);
  const auto gate = [&](int64_t row, Span k, char* to) {
    const float* values = gate_up.as<float>() + row * 2 * n + k.first;
    act(values, values + n, k.last - k.first, to + k.first * dtype_bytes(dtype),
        dtype == DType::bf16);
  };
  product(gate_up.size(0), gate, weight, bias, accumulate, out);
}

}  // namespace medusa::cpu
