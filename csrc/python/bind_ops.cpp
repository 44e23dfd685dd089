// Every op on NumPy arrays, and test access to a paged cache. Nothing here is on the hot path.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>

#include "medusa/backend.h"
#include "medusa/noise.h"
#include "python/bindings.h"

namespace medusa::python {
namespace {

struct Ops {};  // only a name to hang the functions on

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Floats = Array<float>;
using Ints = Array<int32_t>;

template <class T>
TensorView view_of(const Array<T>& array) {
  return borrow(array, std::nullopt, "array");
}

TensorView view_of(const std::optional<Floats>& array) {
  return array ? view_of(*array) : TensorView();
}

// An op's f32 or bf16 activation. Python sees f32; bf16 is rounded to nearest even on the way in
// and widened on the way out.
class Activation32 {
 public:
  Activation32(const TensorView& shape, DType dtype) : view_(shape) {
    view_.dtype = dtype;
    bytes_.resize(static_cast<size_t>(view_.num_bytes()) / sizeof(float) + 1);
    view_.data = bytes_.data();
  }

  Activation32(const Floats& values, DType dtype) : Activation32(view_of(values), dtype) {
    const float* source = values.data();
    for (int64_t i = 0; i < view_.num_elements(); ++i) {
      if (dtype == DType::f32) {
        view_.as<float>()[i] = source[i];
      } else {
        view_.as<uint16_t>()[i] = round_bf16(source[i]);
      }
    }
  }

  const TensorView& view() const { return view_; }

  Floats values() const {
    Floats out(std::vector<int64_t>(view_.shape.begin(), view_.shape.begin() + view_.rank));
    for (int64_t i = 0; i < view_.num_elements(); ++i) {
      if (view_.dtype == DType::f32) {
        out.mutable_data()[i] = view_.as<float>()[i];
      } else {
        const uint32_t bits = uint32_t{view_.as<uint16_t>()[i]} << 16;
        std::memcpy(out.mutable_data() + i, &bits, sizeof(bits));
      }
    }
    return out;
  }

 private:
  static uint16_t round_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }

  TensorView view_;
  std::vector<uint32_t> bytes_;
};

std::unique_ptr<Weight> make_weight(Backend& backend, const TensorView& values, DType dtype) {
  MEDUSA_CHECK_ARG(values.rank == 2, "weight is ", shape_string(values), "; wanted [N, K]");
  std::unique_ptr<Weight> weight = backend.make_weight(values.size(0), values.size(1), dtype);
  backend.pack(*weight, 0, values);
  return weight;
}

Floats embed(Backend& backend, const TensorView& tokens, const Weight& weight, float scale) {
  Activation32 out(TensorView(nullptr, DType::f32, tokens.size(0), weight.num_inputs()),
                   DType::f32);
  backend.embed(tokens, weight, scale, out.view());
  return out.values();
}

struct TestCache {
  KvCache cache;
  std::vector<int32_t> page_table;
  std::shared_ptr<Backend> backend;
};

std::unique_ptr<TestCache> make_cache(std::shared_ptr<Backend> backend, int num_layers,
                                      int num_kv_heads, int head_dim, const std::string& dtype,
                                      const Ints& page_table, int num_pages) {
  const TensorView pages = view_of(page_table);
  MEDUSA_CHECK_ARG(pages.rank == 2, "page_table is ", shape_string(pages),
                   "; wanted [sequences, max_pages]");
  auto test = std::make_unique<TestCache>();
  test->page_table.assign(page_table.data(), page_table.data() + page_table.size());
  test->cache =
      backend->make_kv_cache({num_layers, num_kv_heads, head_dim, parse_dtype(dtype), num_pages});
  test->cache.page_table = test->page_table.data();
  test->cache.num_sequences = static_cast<int>(pages.size(0));
  test->cache.max_pages = static_cast<int>(pages.size(1));
  // All bits set is a NaN in f32, f16 and bf16.
  std::memset(test->cache.buffer->data(), 0xFF,
              static_cast<size_t>(test->cache.buffer->num_bytes()));
  test->backend = std::move(backend);
  return test;
}

std::pair<Floats, Floats> read_cache(const TestCache& test, int layer, int sequence, int slot) {
  const KvShape& shape = test.cache.shape;
  const std::vector<int64_t> size{shape.num_kv_heads, shape.head_dim};
  Floats k(size), v(size);
  test.backend->read_kv(test.cache, layer, sequence, slot, k.mutable_data(), v.mutable_data());
  return {k, v};
}

// The rows of a step, held as arrays.
struct RowArrays {
  explicit RowArrays(const py::dict& fields)
      : token(field<int32_t>(fields, "token")),
        sequence(field<int32_t>(fields, "sequence")),
        position(field<int32_t>(fields, "position")),
        slot(field<int32_t>(fields, "slot")),
        prefix_len(field<int32_t>(fields, "prefix_len")),
        ancestors(field<uint64_t>(fields, "ancestors")) {
    const py::ssize_t num_rows = token.size();
    MEDUSA_CHECK_ARG(sequence.size() == num_rows && position.size() == num_rows &&
                         slot.size() == num_rows && prefix_len.size() == num_rows &&
                         ancestors.size() == num_rows * kAncestorWords,
                     "rows: the arrays disagree with ", num_rows, " tokens");
    rows = {static_cast<int>(num_rows),
            token.data(),
            sequence.data(),
            position.data(),
            slot.data(),
            prefix_len.data(),
            reinterpret_cast<const AncestorBits*>(ancestors.data())};
  }

  template <class T>
  static Array<T> field(const py::dict& fields, const char* name) {
    MEDUSA_CHECK_ARG(fields.contains(name), "rows: the array ", name, " is missing");
    return fields[name].cast<Array<T>>();
  }

  Ints token, sequence, position, slot, prefix_len;
  Array<uint64_t> ancestors;
  Rows rows;
};

DType query_dtype(Backend& backend, const TestCache& cache) {
  return backend.activation_dtype(cache.cache.shape.dtype);
}

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw ArgumentError(concat("activation is \"", name, "\"; wanted silu, gelu or gelu_tanh"));
}

void bind_row_ops(py::class_<Ops>& ops) {
  ops.def_static(
      "pack_unpack",
      [](Backend& backend, const py::array& weight, const std::string& dtype,
         const std::optional<std::string>& src_dtype) {
        const auto packed =
            make_weight(backend, borrow(weight, src_dtype, "weight"), parse_dtype(dtype));
        std::vector<int32_t> all(static_cast<size_t>(packed->num_outputs()));
        for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
        return embed(backend, {all.data(), DType::i32, packed->num_outputs()}, *packed, 1.0f);
      },
      py::arg("backend"), py::arg("weight"), py::arg("dtype"), py::arg("src_dtype") = py::none());
  ops.def_static(
      "embed",
      [](Backend& backend, const Ints& tokens, const Floats& weight, const std::string& dtype,
         float scale) {
        const auto packed = make_weight(backend, view_of(weight), parse_dtype(dtype));
        return embed(backend, view_of(tokens), *packed, scale);
      },
      py::arg("backend"), py::arg("tokens"), py::arg("weight"), py::arg("dtype"), py::arg("scale"));
  ops.def_static(
      "rms_norm",
      [](Backend& backend, const Floats& x, const Floats& gain, float eps,
         const std::string& out_dtype) {
        const Activation32 out(view_of(x), parse_dtype(out_dtype));
        backend.rms_norm(view_of(x), view_of(gain), eps, out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("gain"), py::arg("eps"), py::arg("out_dtype"));
  ops.def_static(
      "linear",
      [](Backend& backend, const Floats& x, const Floats& weight, const std::string& dtype,
         const std::optional<Floats>& bias, const std::optional<Floats>& residual) {
        const auto packed = make_weight(backend, view_of(weight), parse_dtype(dtype));
        const Activation32 in(x, backend.activation_dtype(packed->dtype()));
        const TensorView shape(nullptr, DType::f32, in.view().size(0), packed->num_outputs());
        const Activation32 out =
            residual ? Activation32(*residual, DType::f32) : Activation32(shape, DType::f32);
        backend.linear(in.view(), *packed, view_of(bias), residual.has_value(), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("weight"), py::arg("dtype"),
      py::arg("bias") = py::none(), py::arg("residual") = py::none());
  ops.def_static(
      "gated_activation",
      [](Backend& backend, const Floats& gate_up, const std::string& activation,
         const std::string& out_dtype) {
        const TensorView in = view_of(gate_up);
        const Activation32 out(TensorView(nullptr, DType::f32, in.size(0), in.size(1) / 2),
                               parse_dtype(out_dtype));
        backend.gated_activation(in, parse_activation(activation), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("gate_up"), py::arg("activation"), py::arg("out_dtype"));
  ops.def_static(
      "residual_silu",
      [](Backend& backend, const Floats& y, const Floats& u) {
        const Activation32 sum(u, DType::f32);
        const Activation32 copy(view_of(u), DType::f32);
        backend.residual_silu(view_of(y), sum.view(), copy.view());
        MEDUSA_CHECK_INTERNAL(std::memcmp(sum.view().data, copy.view().data,
                                          static_cast<size_t>(sum.view().num_bytes())) == 0,
                              "residual_silu: the copy differs from the sum");
        return sum.values();
      },
      py::arg("backend"), py::arg("y"), py::arg("u"));
  ops.def_static(
      "gather_rows",
      [](Backend& backend, const Floats& x, const Ints& index, const std::string& out_dtype) {
        const Activation32 out(TensorView(nullptr, DType::f32, index.size(), view_of(x).size(1)),
                               parse_dtype(out_dtype));
        backend.gather_rows(view_of(x), view_of(index), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("index"), py::arg("out_dtype"));
  ops.def_static(
      "top_k",
      [](Backend& backend, const Floats& x, int k) {
        const std::vector<int64_t> size{view_of(x).size(0), k};
        Ints ids(size);
        Floats values(size);
        backend.top_k(view_of(x), view_of(ids), view_of(values));
        return std::make_pair(ids, values);
      },
      py::arg("backend"), py::arg("x"), py::arg("k"));
}

void bind_attention_ops(py::class_<Ops>& ops) {
  ops.def_static(
      "rope_table",
      [](Backend& backend, const Ints& positions, const Ints& prompt_len, const std::string& rope) {
        const RopeConfig config = RopeConfig::from_json(rope);
        const Rows rows{.num_rows = static_cast<int>(positions.size()),
                        .position = positions.data()};
        const std::vector<int64_t> size{positions.size(),
                                        static_cast<int64_t>(config.inv_freq.size())};
        Floats cos(size), sin(size);
        backend.rope_table(rows, config, view_of(prompt_len), view_of(cos), view_of(sin));
        return std::make_pair(cos, sin);
      },
      py::arg("backend"), py::arg("positions"), py::arg("prompt_len"), py::arg("rope"));
  ops.def_static(
      "rope_write",
      [](Backend& backend, const Floats& qkv, const py::dict& rows, const Floats& cos,
         const Floats& sin, const std::optional<Floats>& q_gain,
         const std::optional<Floats>& k_gain, float eps, TestCache& test, int layer) {
        const RowArrays arrays(rows);
        const KvShape& shape = test.cache.shape;
        const int64_t num_heads =
            view_of(qkv).size(1) / shape.head_dim - int64_t{2} * shape.num_kv_heads;
        MEDUSA_CHECK_ARG(num_heads > 0, "rope_write: qkv is ", shape_string(view_of(qkv)),
                         "; wanted more columns than ", int64_t{2} * shape.num_kv_heads,
                         " heads of ", shape.head_dim);
        const Activation32 q(
            TensorView(nullptr, DType::f32, arrays.rows.num_rows, num_heads, shape.head_dim),
            query_dtype(backend, test));
        backend.rope_write(view_of(qkv), arrays.rows, view_of(cos), view_of(sin), view_of(q_gain),
                           view_of(k_gain), eps, test.cache, layer, q.view());
        return q.values();
      },
      py::arg("backend"), py::arg("qkv"), py::arg("rows"), py::arg("cos"), py::arg("sin"),
      py::arg("q_gain"), py::arg("k_gain"), py::arg("eps"), py::arg("cache"), py::arg("layer"));
  ops.def_static(
      "tree_attention",
      [](Backend& backend, const Floats& q, const TestCache& test, int layer, const py::dict& rows,
         float scale, int window, const std::string& out_dtype) {
        const RowArrays arrays(rows);
        const Activation32 in(q, query_dtype(backend, test));
        const Activation32 out(in.view(), parse_dtype(out_dtype));
        backend.tree_attention(in.view(), test.cache, layer, arrays.rows, scale, window,
                               out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("q"), py::arg("cache"), py::arg("layer"), py::arg("rows"),
      py::arg("scale"), py::arg("window"), py::arg("out_dtype"));
  ops.def_static(
      "compact_kv",
      [](Backend& backend, TestCache& test,
         const std::vector<std::tuple<int32_t, int32_t, std::vector<int32_t>>>& moves) {
        std::vector<KvMove> items;
        for (const auto& [sequence, len, path] : moves) {
          items.push_back({sequence, len, static_cast<int32_t>(path.size()), path.data()});
        }
        backend.compact_kv(test.cache, items);
      },
      py::arg("backend"), py::arg("cache"), py::arg("moves"));
  ops.def_static(
      "copy_page",
      [](Backend& backend, TestCache& test, int src, int dst, int num_tokens) {
        backend.copy_page(test.cache, src, dst, num_tokens);
      },
      py::arg("backend"), py::arg("cache"), py::arg("src"), py::arg("dst"), py::arg("num_tokens"));
}

std::pair<std::vector<int>, std::vector<int32_t>> verify(
    Backend& backend, const Floats& logits, const std::vector<int32_t>& tokens,
    const std::vector<int>& parents, const SamplingParams& sampling, std::vector<int32_t> history,
    const std::vector<int32_t>& eos_ids, int max_tokens) {
  MEDUSA_CHECK_ARG(!tokens.empty() && tokens.size() == parents.size() && parents[0] == -1,
                   "verify: wanted as many parents as tokens, the root's -1 first");
  DraftTree tree(tokens[0]);
  for (size_t v = 1; v < tokens.size(); ++v) {
    MEDUSA_CHECK_ARG(tree.num_nodes() < kMaxTreeNodes, "verify: the tree has ", tokens.size(),
                     " nodes; at most ", kMaxTreeNodes);
    MEDUSA_CHECK_ARG(tree.add(parents[v], tokens[v]) == static_cast<int>(v), "verify: node ", v,
                     " repeats a sibling");
  }
  history.push_back(tokens[0]);
  Accepted accepted;
  const VerifyItem item{&tree, 0, &sampling, history, eos_ids, max_tokens, &accepted};
  backend.verify(view_of(logits), {&item, 1});
  return {accepted.path, accepted.tokens};
}

void bind_choice_ops(py::class_<Ops>& ops) {
  ops.def_static("verify", &verify, py::arg("backend"), py::arg("logits"), py::arg("tokens"),
                 py::arg("parents"), py::arg("sampling"), py::kw_only(),
                 py::arg("history") = py::tuple(), py::arg("eos_ids") = py::tuple(),
                 py::arg("max_tokens") = 1 << 30);
  ops.def_static(
      "philox",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const Philox4 out =
            philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
      },
      py::arg("counter"), py::arg("key"));
  ops.def_static(
      "gumbel",
      [](const Array<uint32_t>& x) {
        Floats out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
        std::transform(x.data(), x.data() + x.size(), out.mutable_data(), gumbel_from_bits);
        return out;
      },
      py::arg("x"));
  ops.def_static(
      "noise",
      [](uint64_t seed, uint32_t sample_index, uint32_t position, uint32_t vocab) {
        Array<uint32_t> out(vocab);
        for (uint32_t id = 0; id < vocab; ++id) {
          out.mutable_data()[id] = noise_word(seed, sample_index, position, id);
        }
        return out;
      },
      py::arg("seed"), py::arg("sample_index"), py::arg("position"), py::arg("vocab"));
}

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<TestCache>(m, "KvCache")
      .def(py::init(&make_cache), py::arg("backend").none(false), py::kw_only(),
           py::arg("num_layers"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"),
           py::arg("page_table"), py::arg("num_pages"))
      .def("read", &read_cache, py::arg("layer"), py::arg("sequence"), py::arg("slot"));
  py::class_<Ops> ops(m, "ops");
  bind_row_ops(ops);
  bind_attention_ops(ops);
  bind_choice_ops(ops);
}

}  // namespace medusa::python
