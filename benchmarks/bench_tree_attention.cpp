// bench_tree_attention: the trees of B sequences over their cached tokens, one layer. See
// README.md.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/row_batch.h"
#include "cost.h"
#include "data.h"
#include "report.h"
#include "shapes.h"

namespace medusa::bench {
namespace {

constexpr int kTreeDepth = 5;

struct Case {
  NamedShape model;
  int context, nodes, batch;
  DType dtype;
  std::string text() const {
    return concat(model.name, " ", batch, " x (", nodes, " nodes, ", context, " tokens)");
  }
};

struct Data {
  KvCache cache;
  std::unique_ptr<DeviceArray> page_table;
  std::unique_ptr<Buffer> row_memory;
  std::vector<DraftTree> trees;
  PassInput rows;
};

// Every layer holds its own keys and values, so that walking the layers keeps them cold.
Data make_data(const Common& common, Backend& backend, const Case& c) {
  Data data;
  const int pages = (c.context + c.nodes + kPageTokens - 1) / kPageTokens;
  KvShape shape{1, c.model.kv_heads, c.model.head_dim, c.dtype, pages * c.batch};
  shape.num_layers = cold_copies(common, shape.num_pages * shape.page_bytes());
  data.cache = backend.make_kv_cache(shape);
  data.cache.num_sequences = c.batch;
  data.cache.max_pages = pages;

  std::mt19937 random(7);
  std::vector<int32_t> table(static_cast<size_t>(shape.num_pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), random);
  data.page_table = std::make_unique<DeviceArray>(
      backend, TensorView(nullptr, DType::i32, c.batch, pages), table.data());
  data.cache.page_table = data.page_table->view().as<int32_t>();

  NormalValues normal(3);
  const int64_t total = data.cache.buffer->num_bytes();
  const HostArray block(normal, c.dtype, std::min(total, int64_t{64} << 20) / dtype_bytes(c.dtype),
                        1.0f);
  for (int64_t at = 0; at < total; at += block.num_bytes()) {
    backend.upload(static_cast<char*>(data.cache.buffer->data()) + at, block.data(),
                   std::min(block.num_bytes(), total - at));
  }

  RowBatch rows;
  for (int b = 0; b < c.batch; ++b) {
    DraftTree tree(0);
    grow_tree(tree, c.nodes, kTreeDepth, 1 << 20, random);
    rows.add_tree(b, c.context, tree, c.context);
    data.trees.push_back(tree);
  }
  data.row_memory = backend.allocate(RowBatch::bytes(rows.num_rows()));
  data.rows = rows.upload(backend, data.row_memory->data());
  backend.prepare_rows(data.rows.rows, data.cache);
  return data;
}

bool sees(const DraftTree& tree, int node, int other) {
  const auto at = static_cast<size_t>(other);
  return (tree.ancestors(node)[at / 64] >> (at % 64) & 1) != 0;
}

// Some nodes and heads against f64 over the keys and values that the cache holds, in one layer.
void check(Backend& backend, const Case& c, const Data& data, int layer, int sequence,
           const HostArray& q, const DeviceArray& out) {
  const int H = c.model.heads, Hkv = c.model.kv_heads, D = c.model.head_dim;
  const int num_slots = c.context + c.nodes;
  const auto row_size = static_cast<size_t>(Hkv) * static_cast<size_t>(D);
  std::vector<float> keys(static_cast<size_t>(num_slots) * row_size), values(keys.size());
  for (int slot = 0; slot < num_slots; ++slot) {
    const auto at = static_cast<size_t>(slot) * row_size;
    backend.read_kv(data.cache, layer, sequence, slot, &keys[at], &values[at]);
  }
  const std::vector<std::byte> bytes = out.read();
  const DraftTree& tree = data.trees[static_cast<size_t>(sequence)];
  for (const int node : std::set<int>{0, c.nodes / 2, c.nodes - 1}) {
    for (const int head : std::set<int>{0, H / 2, H - 1}) {
      const int64_t row = (int64_t{sequence} * c.nodes + node) * H + head;
      const auto group = static_cast<size_t>(head / (H / Hkv)) * static_cast<size_t>(D);
      std::vector<double> scores, sum(static_cast<size_t>(D));
      std::vector<int> seen;
      double greatest = -1e300, total = 0, largest = 0;
      for (int slot = 0; slot < num_slots; ++slot) {
        if (slot >= c.context && !sees(tree, node, slot - c.context)) continue;
        double score = 0;
        for (int d = 0; d < D; ++d) {
          score += static_cast<double>(q.at(row * D + d)) *
                   keys[static_cast<size_t>(slot) * row_size + group + static_cast<size_t>(d)];
        }
        scores.push_back(score / std::sqrt(D));
        seen.push_back(slot);
        greatest = std::max(greatest, scores.back());
      }
      for (size_t i = 0; i < seen.size(); ++i) {
        const double weight = std::exp(scores[i] - greatest);
        total += weight;
        for (size_t d = 0; d < sum.size(); ++d) {
          const double v = values[static_cast<size_t>(seen[i]) * row_size + group + d];
          sum[d] += weight * v;
          largest = std::max(largest, std::abs(v));
        }
      }
      // A convex mix of values: each weight and the result are rounded to the cache's type.
      const double bound = 4 * largest * (c.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11);
      for (int d = 0; d < D; ++d) {
        check_close("tree_attention", c.text(),
                    element(bytes.data(), out.view().dtype, row * D + d),
                    sum[static_cast<size_t>(d)] / total, bound);
      }
    }
  }
}

void run(const Common& common, Backend& backend, const Case& c, Report& report) {
  const int64_t H = c.model.heads, Hkv = c.model.kv_heads, D = c.model.head_dim;
  const int64_t R = int64_t{c.batch} * c.nodes;
  const DType act = backend.activation_dtype(c.dtype);
  const Data data = make_data(common, backend, c);
  NormalValues normal(5);
  const HostArray q(normal, act, R * H * D, 1.0f);
  const DeviceArray in(backend, TensorView(nullptr, act, R, H, D), q.data());
  const DeviceArray out(backend, TensorView(nullptr, act, R, H, D));
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  const auto attend = [&](int layer) {
    backend.tree_attention(in.view(), data.cache, layer, data.rows.rows, scale, 0, out.view());
  };

  const int last = data.cache.shape.num_layers - 1;
  out.poison();
  attend(last);
  for (const int sequence : std::set<int>{0, c.batch - 1}) {
    check(backend, c, data, last, sequence, q, out);
  }
  const Samples seconds = time_op(backend, common, false, [&](int i) { attend(i % (last + 1)); });

  int64_t seen = 0;
  for (const DraftTree& tree : data.trees) {
    for (int node = 0; node < c.nodes; ++node) seen += c.context + tree.depth(node) + 1;
  }
  const Cost cost = tree_attention_cost(
      R, H, Hkv, D, seen, int64_t{c.batch} * (c.context + c.nodes), c.dtype, act, act);
  report.add("tree_attention", c.text(), dtype_name(c.dtype), seconds, cost.num_bytes, cost.flops);
}

void bench(Arguments& args, Common& common) {
  if (common.shapes.empty()) common.shapes = {"llama-2-7b", "llama-3-8b"};
  const bool quick = common.quick, tiny = common.tiny();
  constexpr int kMaxContext = 1 << 20;
  std::vector<int> contexts{128, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  std::vector<int> nodes{1, 16, 32, 64}, batches{1, 8};
  if (quick) contexts = {1024, 8192};
  if (quick) nodes = {1, 64};
  if (tiny) contexts = {128, 300};
  if (tiny) batches = {1, 2};
  contexts = args.counts("--contexts", contexts, 1, kMaxContext);
  nodes = args.counts("--nodes", nodes, 1, kMaxTreeNodes);
  batches = args.counts("--batches", batches, 1, 1024);
  args.finish();
  const std::vector<NamedShape> shapes = find_shapes(common.shapes);
  const std::shared_ptr<Backend> backend = make_backend(common.backend);
  Report report("bench_tree_attention", common, *backend);
  for (const NamedShape& shape : shapes) {
    for (const DType dtype : common.dtypes) {
      for (const int batch : batches) {
        for (const int context : contexts) {
          for (const int count : nodes) {
            const Case one{shape, context, count, batch, dtype};
            report.attempt("tree_attention", one.text(), dtype_name(dtype),
                           [&] { run(common, *backend, one, report); });
          }
        }
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
      "usage: bench_tree_attention [--shape NAME,...] [--contexts 128,...] [--nodes 1,64,...]\n"
      "       [--batches 1,8,...] [options]\n  NAME: ",
      kShapeNames, "\n");
  return run_program("bench_tree_attention", usage, argc, argv, bench);
}
