// bench_linear: the dense products of a step, out [R, N] f32 = x [R, K] W^T. See README.md.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "cost.h"
#include "data.h"
#include "report.h"
#include "shapes.h"

namespace medusa::bench {
namespace {

struct Product {
  std::string name;  // model and matrix
  int64_t N, K;
};

constexpr const char* kProductNames = "qkv, o, gate_up, down, lm_head";

// Those of one model that `wanted` names; all if it names none.
std::vector<Product> products_of(const NamedShape& s, const std::vector<std::string>& wanted) {
  const int64_t q = int64_t{s.heads} * s.head_dim, kv = int64_t{s.kv_heads} * s.head_dim;
  std::vector<Product> products{{"qkv", q + 2 * kv, s.hidden},
                                {"o", s.hidden, q},
                                {"gate_up", int64_t{2} * s.mlp, s.hidden},
                                {"down", s.hidden, s.mlp},
                                {"lm_head", s.vocab, s.hidden}};
  const auto is_wanted = [&](const Product& product) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), product.name) != wanted.end();
  };
  std::erase_if(products, [&](const Product& product) { return !is_wanted(product); });
  for (Product& product : products) product.name = concat(s.name, " ", product.name);
  return products;
}

constexpr int64_t kGroup = 32;  // values of x that share a scale where weights lie in blocks

// Some outputs of the weight, as it is stored.
struct StoredRows {
  std::vector<int32_t> outputs;
  std::vector<float> values;  // [outputs, K]

  StoredRows(Backend& backend, const Weight& weight) {
    const int64_t N = weight.num_outputs(), count = std::min<int64_t>(64, N);
    for (int64_t i = 0; i < count; ++i) {
      outputs.push_back(static_cast<int32_t>(i * (N - 1) / std::max<int64_t>(count - 1, 1)));
    }
    const DeviceArray tokens(backend, TensorView(nullptr, DType::i32, count), outputs.data());
    const DeviceArray rows(backend, TensorView(nullptr, DType::f32, count, weight.num_inputs()));
    backend.embed(tokens.view(), weight, 1.0f, rows.view());
    const std::vector<std::byte> bytes = rows.read();
    const auto* first = reinterpret_cast<const float*>(bytes.data());
    values.assign(first, first + count * weight.num_inputs());
  }
};

// Some outputs of some rows against sums in f64, and all against NaN, which they were before.
void check(const Product& product, bool blocks, const HostArray& x, const StoredRows& weight,
           const DeviceArray& out) {
  const int64_t R = out.view().size(0), N = product.N, K = product.K;
  const std::vector<std::byte> bytes = out.read();
  const auto* values = reinterpret_cast<const float*>(bytes.data());
  for (int64_t i = 0; i < R * N; ++i) {
    MEDUSA_CHECK_INTERNAL(std::isfinite(values[i]), "linear ", product.name, ": element ", i,
                          " of the output is ", values[i], "; nothing was timed");
  }
  // Roundings of a sum of K terms in any order partly cancel; one term left out is far more.
  const double unit = 8 * std::sqrt(static_cast<double>(K)) * 0x1p-24;
  for (const int64_t r : std::set<int64_t>{0, R / 2, R - 1}) {
    for (size_t i = 0; i < weight.outputs.size(); ++i) {
      const float* row = weight.values.data() + static_cast<int64_t>(i) * K;
      double sum = 0, bound = 0;
      for (int64_t first = 0; first < K; first += kGroup) {
        double most = 0, size = 0;
        for (int64_t k = first; k < std::min(first + kGroup, K); ++k) {
          const double value = x.at(r * K + k), term = value * row[k];
          sum += term;
          bound += unit * std::abs(term);
          most = std::max(most, std::abs(value));
          size += std::abs(row[k]);
        }
        if (blocks) bound += most / 254 * size;  // x is rounded to 127 steps of its greatest
      }
      check_close("linear", product.name, values[r * N + weight.outputs[i]], sum, bound);
    }
  }
}

void run(const Common& common, Backend& backend, const Product& product, DType dtype,
         const std::vector<int>& row_counts, Report& report) {
  const int64_t N = product.N, K = product.K;
  const DType act = backend.activation_dtype(dtype);
  NormalValues normal(1);
  const float scale = 1.0f / std::sqrt(static_cast<float>(K));
  const DType source = is_block(dtype) ? DType::f32 : dtype;
  const HostArray values(normal, source, N * K, scale);
  std::vector<std::unique_ptr<Weight>> copies;
  const int64_t num_bytes = N * K / block_elements(dtype) * block_bytes(dtype);
  for (int i = 0; i < cold_copies(common, num_bytes); ++i) {
    copies.push_back(backend.make_weight(N, K, dtype));
    backend.pack(*copies.back(), 0, TensorView(values.data(), source, N, K));
  }
  for (size_t i = 0; i < copies.size(); ++i) {
    copies[i]->next = copies[(i + 1) % copies.size()].get();
  }
  const StoredRows stored(backend, *copies.front());
  const auto run_rows = [&](const std::string& shape, int R) {
    const HostArray x(normal, act, R * K, 1.0f);
    const DeviceArray in(backend, TensorView(nullptr, act, R, K), x.data());
    const DeviceArray out(backend, TensorView(nullptr, DType::f32, R, N));
    for (const Weight* weight : {copies.front().get(), copies.back().get()}) {
      out.poison();
      backend.linear(in.view(), *weight, TensorView(), false, out.view());
      check(product, is_block(dtype), x, stored, out);
    }
    const Samples seconds = time_op(backend, common, false, [&](int i) {
      backend.linear(in.view(), *copies[static_cast<size_t>(i) % copies.size()], TensorView(),
                     false, out.view());
    });
    const Cost cost = linear_cost(R, N, K, copies[0]->num_bytes(), act);
    report.add("linear", shape, dtype_name(dtype), seconds, cost.num_bytes, cost.flops);
  };
  for (const int R : row_counts) {
    const std::string shape = concat(product.name, " [", N, ", ", K, "] x ", R);
    report.attempt("linear", shape, dtype_name(dtype), [&] { run_rows(shape, R); });
  }
}

void bench(Arguments& args, Common& common) {
  if (common.shapes.empty()) {
    common.shapes = {"llama-2-7b", "llama-3-8b"};
    if (!common.quick) common.shapes.push_back("llama-1b");
  }
  std::vector<int> rows{1, 2, 4, 8, 16, 32, 64, 512};
  if (common.quick) rows = {1, 16, 64};
  rows = args.counts("--rows", rows, 1, 8192);
  const std::vector<std::string> names = args.texts("--product");
  std::vector<DType> types;
  for (const std::string& name : args.texts("--weights")) {
    types.push_back(parse_weight_dtype(name));
    MEDUSA_CHECK_ARG(types.back() != DType::q4_k, "--weights: q4_k is read from files alone");
  }
  if (types.empty()) types = common.dtypes;
  args.finish();
  const std::vector<NamedShape> shapes = find_shapes(common.shapes);
  for (const NamedShape& shape : shapes) {
    MEDUSA_CHECK_ARG(names.empty() || products_of(shape, names).size() == names.size(),
                     "--product: wanted some of ", kProductNames, ", each once");
  }
  const std::shared_ptr<Backend> backend = make_backend(common.backend);
  Report report("bench_linear", common, *backend);
  for (const NamedShape& shape : shapes) {
    for (const Product& product : products_of(shape, names)) {
      for (const DType dtype : types) {
        report.attempt("linear", product.name, dtype_name(dtype),
                       [&] { run(common, *backend, product, dtype, rows, report); });
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
      "usage: bench_linear [--shape NAME,...] [--product PRODUCT,...] [--rows 1,64,...] [options]\n"
      "       [--weights TYPE,...]: bf16, f16, f32, q8_0, q4_0, q4_1 (else --dtype)\n"
      "  NAME: ",
      kShapeNames, "\n  PRODUCT: ", kProductNames, "\n");
  return run_program("bench_linear", usage, argc, argv, bench);
}
