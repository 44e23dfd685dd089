// bench_compact_kv: accepted rows of a tree slide down to the end of the cache, all layers. Through
// the op of the host's path, which sends the moves first. See README.md.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "cost.h"
#include "data.h"
#include "report.h"
#include "shapes.h"

namespace medusa::bench {
namespace {

constexpr std::array<int32_t, 5> kPath{0, 2, 11, 30, 57};  // nodes of a tree of 64, root first

using KvRow = std::pair<std::vector<float>, std::vector<float>>;

// B sequences with room for trees at many places, so that the rows moved are cold.
class Bench {
 public:
  Bench(const Common& common, Backend& backend, const NamedShape& model, DType dtype, int batch)
      : backend_(backend), model_(model), batch_(batch) {
    const auto moved = static_cast<int64_t>(kPath.size()) - 1;
    cost_ = compact_kv_cost(model.layers, model.kv_heads, model.head_dim, batch * moved, dtype);
    // Each place is a page; a tree starts at its middle, so that some rows cross to the next.
    places_ = std::min(cold_copies(common, cost_.num_bytes), 64);
    KvShape shape{model.layers, model.kv_heads, model.head_dim, dtype, (places_ + 1) * batch};
    cache_ = backend.make_kv_cache(shape);
    cache_.num_sequences = batch;
    cache_.max_pages = places_ + 1;
    std::vector<int32_t> table(static_cast<size_t>(shape.num_pages));
    std::iota(table.rbegin(), table.rend(), 0);
    page_table_ = std::make_unique<DeviceArray>(
        backend, TensorView(nullptr, DType::i32, batch, cache_.max_pages), table.data());
    cache_.page_table = page_table_->view().as<int32_t>();

    NormalValues normal(3);
    const int64_t total = cache_.buffer->num_bytes();
    const HostArray block(normal, dtype, std::min(total, int64_t{64} << 20) / dtype_bytes(dtype),
                          1.0f);
    for (int64_t at = 0; at < total; at += block.num_bytes()) {
      backend.upload(static_cast<char*>(cache_.buffer->data()) + at, block.data(),
                     std::min(block.num_bytes(), total - at));
    }
  }

  void compact(int place) {
    moves_.clear();
    for (int b = 0; b < batch_; ++b) {
      moves_.push_back({b, start(place), static_cast<int32_t>(kPath.size()), kPath.data()});
    }
    backend_.compact_kv(cache_, moves_);
  }

  // Every row of a tree, before and after, in the first and last layer and sequence.
  void check() {
    for (const int layer : std::set<int>{0, model_.layers - 1}) {
      for (const int sequence : std::set<int>{0, batch_ - 1}) {
        const int place = layer % places_;  // another one each time: they stay compacted
        std::vector<KvRow> wanted = rows(layer, sequence, place);
        compact(place);
        for (size_t i = 0; i < kPath.size(); ++i) {
          wanted[i] = wanted[static_cast<size_t>(kPath[i])];
        }
        MEDUSA_CHECK_INTERNAL(rows(layer, sequence, place) == wanted, "compact_kv ", model_.name,
                              ": layer ", layer, " of sequence ", sequence,
                              " differs; nothing was timed");
      }
    }
  }

  int places() const { return places_; }
  const Cost& cost() const { return cost_; }

 private:
  static int start(int place) { return place * kPageTokens + kPageTokens / 2; }

  std::vector<KvRow> rows(int layer, int sequence, int place) const {
    const auto size = static_cast<size_t>(model_.kv_heads) * static_cast<size_t>(model_.head_dim);
    std::vector<KvRow> all;
    for (int slot = start(place); slot <= start(place) + kPath.back(); ++slot) {
      all.emplace_back(std::vector<float>(size), std::vector<float>(size));
      backend_.read_kv(cache_, layer, sequence, slot, all.back().first.data(),
                       all.back().second.data());
    }
    return all;
  }

  Backend& backend_;
  NamedShape model_;
  int batch_, places_ = 1;
  Cost cost_;
  KvCache cache_;
  std::unique_ptr<DeviceArray> page_table_;
  std::vector<KvMove> moves_;
};

void bench(Arguments& args, Common& common) {
  if (common.shapes.empty()) common.shapes = {"llama-2-7b", "llama-3-8b"};
  const std::vector<int> batches = args.counts("--batches", {1, 8}, 1, 1024);
  args.finish();
  const std::vector<NamedShape> shapes = find_shapes(common.shapes);
  const std::shared_ptr<Backend> backend = make_backend(common.backend);
  Report report("bench_compact_kv", common, *backend);
  for (const NamedShape& shape : shapes) {
    for (const DType dtype : common.dtypes) {
      for (const int batch : batches) {
        const std::string text =
            concat(shape.name, " ", batch, " x ", kPath.size() - 1, " rows moved");
        report.attempt("compact_kv", text, dtype_name(dtype), [&] {
          Bench one(common, *backend, shape, dtype, batch);
          one.check();
          const Samples seconds =
              time_op(*backend, common, false, [&](int i) { one.compact(i % one.places()); });
          report.add("compact_kv", text, dtype_name(dtype), seconds, one.cost().num_bytes,
                     one.cost().flops);
        });
      }
    }
  }
  report.finish();
}

}  // namespace
}  // namespace medusa::bench

int main(int argc, char** argv) {
  using namespace medusa::bench;
  const std::string usage = medusa::concat(
      "usage: bench_compact_kv [--shape NAME,...] [--batches 1,8,...] [options]\n  NAME: ",
      kShapeNames, "\n");
  return run_program("bench_compact_kv", usage, argc, argv, bench);
}
