// Every op on NumPy arrays, and test access to a paged cache. Nothing here is on the hot path.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <numeric>
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

// A copy of an array in the backend's memory, in the element type that the op wants. Python sees
// f32; 16-bit values are rounded to nearest even on the way in and widened on the way out.
class Staged {
 public:
  // Memory for an op's output.
  Staged(Backend& backend, const TensorView& shape, DType dtype) : backend_(backend), view_(shape) {
    view_.dtype = dtype;
    memory_ = backend.allocate(std::max<int64_t>(view_.num_bytes(), 1));
    view_.data = memory_->data();
  }

  Staged(Backend& backend, const TensorView& host)  // in the type it has
      : Staged(backend, host, host.dtype) {
    backend.upload(view_.data, host.data, host.num_bytes());
  }

  Staged(Backend& backend, const Floats& values, DType dtype)
      : Staged(backend, view_of(values), dtype) {
    if (dtype == DType::f32) {
      backend.upload(view_.data, values.data(), view_.num_bytes());
      return;
    }
    if (dtype == DType::f16) {
      const py::array half = values.attr("astype")("float16");
      backend.upload(view_.data, half.data(), view_.num_bytes());
      return;
    }
    std::vector<uint16_t> rounded(static_cast<size_t>(view_.num_elements()));
    std::transform(values.data(), values.data() + rounded.size(), rounded.begin(), round_bf16);
    backend.upload(view_.data, rounded.data(), view_.num_bytes());
  }

  const TensorView& view() const { return view_; }

  Floats values() const {
    Floats out(shape());
    if (view_.dtype == DType::f32) {
      backend_.download(out.mutable_data(), view_.data, view_.num_bytes());
      return out;
    }
    if (view_.dtype == DType::f16) {
      py::array half(py::dtype("float16"), shape());
      backend_.download(half.mutable_data(), view_.data, view_.num_bytes());
      return half.attr("astype")("float32").cast<Floats>();
    }
    std::vector<uint16_t> narrow(static_cast<size_t>(view_.num_elements()));
    backend_.download(narrow.data(), view_.data, view_.num_bytes());
    std::transform(narrow.begin(), narrow.end(), out.mutable_data(),
                   [](uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); });
    return out;
  }

  Ints ints() const {
    Ints out(shape());
    backend_.download(out.mutable_data(), view_.data, view_.num_bytes());
    return out;
  }

 private:
  std::vector<int64_t> shape() const {
    return {view_.shape.begin(), view_.shape.begin() + view_.rank};
  }

  static uint16_t round_bf16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }

  Backend& backend_;
  TensorView view_;
  std::unique_ptr<Buffer> memory_;
};

// A view of an optional argument: null where it is absent.
struct StagedOptional {
  StagedOptional(Backend& backend, const std::optional<Floats>& values) {
    if (values) staged.emplace(backend, *values, DType::f32);
  }
  TensorView view() const { return staged ? staged->view() : TensorView(); }
  std::optional<Staged> staged;
};

std::unique_ptr<Weight> make_weight(Backend& backend, const TensorView& values, DType dtype) {
  MEDUSA_CHECK_ARG(values.rank == 2, "weight is ", shape_string(values), "; wanted [N, K]");
  std::unique_ptr<Weight> weight = backend.make_weight(values.size(0), values.size(1), dtype);
  backend.pack(*weight, 0, values);
  return weight;
}

Floats embed(Backend& backend, const TensorView& tokens, const Weight& weight, float scale) {
  const Staged in(backend, tokens);
  const Staged out(backend, TensorView(nullptr, DType::f32, tokens.size(0), weight.num_inputs()),
                   DType::f32);
  backend.embed(in.view(), weight, scale, out.view());
  return out.values();
}

struct TestCache {
  std::shared_ptr<Backend> backend;
  KvCache cache;
  std::unique_ptr<Staged> page_table;
};

std::unique_ptr<TestCache> make_cache(std::shared_ptr<Backend> backend, int num_layers,
                                      int num_kv_heads, int head_dim, const std::string& dtype,
                                      const Ints& page_table, int num_pages) {
  const TensorView pages = view_of(page_table);
  MEDUSA_CHECK_ARG(pages.rank == 2, "page_table is ", shape_string(pages),
                   "; wanted [sequences, max_pages]");
  auto test = std::make_unique<TestCache>();
  test->cache =
      backend->make_kv_cache({num_layers, num_kv_heads, head_dim, parse_dtype(dtype), num_pages});
  test->page_table = std::make_unique<Staged>(*backend, pages);
  test->cache.page_table = test->page_table->view().as<int32_t>();
  test->cache.num_sequences = static_cast<int>(pages.size(0));
  test->cache.max_pages = static_cast<int>(pages.size(1));
  // All bits set is a NaN in f32, f16 and bf16.
  const std::vector<uint8_t> ones(static_cast<size_t>(test->cache.buffer->num_bytes()), 0xFF);
  backend->upload(test->cache.buffer->data(), ones.data(), test->cache.buffer->num_bytes());
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

// The rows of a step, as arrays in the backend's memory.
struct RowArrays {
  RowArrays(Backend& backend, const py::dict& fields)
      : ancestors(backend, bits_of(fields)),
        token(backend, field(fields, "token")),
        sequence(backend, field(fields, "sequence")),
        position(backend, field(fields, "position")),
        slot(backend, field(fields, "slot")),
        prefix_len(backend, field(fields, "prefix_len")) {
    const int64_t num_rows = token.view().size(0);
    MEDUSA_CHECK_ARG(
        sequence.view().size(0) == num_rows && position.view().size(0) == num_rows &&
            slot.view().size(0) == num_rows && prefix_len.view().size(0) == num_rows &&
            ancestors.view().num_bytes() == num_rows * static_cast<int64_t>(sizeof(AncestorBits)),
        "rows: the arrays disagree with ", num_rows, " tokens");
    rows = {static_cast<int>(num_rows),         token.view().as<int32_t>(),
            sequence.view().as<int32_t>(),      position.view().as<int32_t>(),
            slot.view().as<int32_t>(),          prefix_len.view().as<int32_t>(),
            ancestors.view().as<AncestorBits>()};
  }

  static const py::handle item(const py::dict& fields, const char* name) {
    MEDUSA_CHECK_ARG(fields.contains(name), "rows: the array ", name, " is missing");
    return fields[name];
  }
  // The casts below may copy: what they return lives in `kept`.
  TensorView field(const py::dict& fields, const char* name) {
    kept.push_back(item(fields, name).cast<Ints>());
    return borrow(kept.back(), std::nullopt, name);
  }
  TensorView bits_of(const py::dict& fields) {  // as pairs of i32
    kept.push_back(item(fields, "ancestors").cast<Array<uint64_t>>());
    return {const_cast<void*>(kept.back().data()), DType::i32, 2 * kept.back().size()};
  }

  std::vector<py::array> kept;  // first: the initialisers fill it
  Staged ancestors, token, sequence, position, slot, prefix_len;
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

// Floats, or rows of uint8 that hold blocks of the type `dtype`.
std::unique_ptr<Weight> pack_of(Backend& backend, const py::array& weight,
                                const std::string& dtype) {
  const bool blocks = py::str(weight.dtype()).cast<std::string>() == "uint8";
  const std::optional<std::string> name = blocks ? std::optional(dtype) : std::nullopt;
  return make_weight(backend, borrow(weight, name, "weight"), parse_weight_dtype(dtype));
}

void bind_row_ops(py::class_<Ops>& ops) {
  ops.def_static(
      "pack_unpack",
      [](Backend& backend, const py::array& weight, const std::string& dtype,
         const std::optional<std::string>& src_dtype) {
        const auto packed =
            make_weight(backend, borrow(weight, src_dtype, "weight"), parse_weight_dtype(dtype));
        std::vector<int32_t> all(static_cast<size_t>(packed->num_outputs()));
        std::iota(all.begin(), all.end(), 0);
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
        const Staged in(backend, view_of(x)), gains(backend, view_of(gain));
        const Staged out(backend, view_of(x), parse_dtype(out_dtype));
        backend.rms_norm(in.view(), gains.view(), eps, out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("gain"), py::arg("eps"), py::arg("out_dtype"));
  ops.def_static(
      "linear",
      [](Backend& backend, const Floats& x, const py::array& weight, const std::string& dtype,
         const std::optional<Floats>& bias, const std::optional<Floats>& residual) {
        const auto packed = pack_of(backend, weight, dtype);
        const Staged in(backend, x, backend.activation_dtype(packed->dtype()));
        const TensorView shape(nullptr, DType::f32, in.view().size(0), packed->num_outputs());
        const Staged out =
            residual ? Staged(backend, view_of(*residual)) : Staged(backend, shape, DType::f32);
        const StagedOptional biases(backend, bias);
        backend.linear(in.view(), *packed, biases.view(), residual.has_value(), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("weight"), py::arg("dtype"),
      py::arg("bias") = py::none(), py::arg("residual") = py::none());
  ops.def_static(
      "norm_linear",
      [](Backend& backend, const Floats& x, const Floats& gain, float eps, const py::array& weight,
         const std::string& dtype, const std::optional<Floats>& bias) {
        const auto packed = pack_of(backend, weight, dtype);
        const DType act = backend.activation_dtype(packed->dtype());
        const Staged in(backend, view_of(x)), gains(backend, view_of(gain));
        const Staged normed(backend, view_of(x), act);
        const TensorView shape(nullptr, DType::f32, x.shape(0), packed->num_outputs());
        const Staged out(backend, shape, DType::f32);
        const StagedOptional biases(backend, bias);
        backend.norm_linear(in.view(), gains.view(), eps, *packed, biases.view(), normed.view(),
                            out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("gain"), py::arg("eps"), py::arg("weight"),
      py::arg("dtype"), py::arg("bias") = py::none());
  ops.def_static(
      "gated_linear",
      [](Backend& backend, const Floats& gate_up, const std::string& activation,
         const py::array& weight, const std::string& dtype, const std::optional<Floats>& bias,
         const std::optional<Floats>& residual) {
        const auto packed = pack_of(backend, weight, dtype);
        const Staged in(backend, view_of(gate_up));
        const TensorView inputs(nullptr, DType::f32, gate_up.shape(0), packed->num_inputs());
        const Staged gated(backend, inputs, backend.activation_dtype(packed->dtype()));
        const TensorView shape(nullptr, DType::f32, gate_up.shape(0), packed->num_outputs());
        const Staged out =
            residual ? Staged(backend, view_of(*residual)) : Staged(backend, shape, DType::f32);
        const StagedOptional biases(backend, bias);
        backend.gated_linear(in.view(), parse_activation(activation), *packed, biases.view(),
                             residual.has_value(), gated.view(), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("gate_up"), py::arg("activation"), py::arg("weight"),
      py::arg("dtype"), py::arg("bias") = py::none(), py::arg("residual") = py::none());
  ops.def_static(
      "gated_activation",
      [](Backend& backend, const Floats& gate_up, const std::string& activation,
         const std::string& out_dtype) {
        const Staged in(backend, view_of(gate_up));
        const TensorView shape(nullptr, DType::f32, in.view().size(0), in.view().size(1) / 2);
        const Staged out(backend, shape, parse_dtype(out_dtype));
        backend.gated_activation(in.view(), parse_activation(activation), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("gate_up"), py::arg("activation"), py::arg("out_dtype"));
  ops.def_static(
      "residual_silu",
      [](Backend& backend, const Floats& y, const Floats& u) {
        const Staged in(backend, view_of(y)), sum(backend, view_of(u));
        const Staged copy(backend, view_of(u), DType::f32);
        backend.residual_silu(in.view(), sum.view(), copy.view());
        const Floats values = sum.values();
        MEDUSA_CHECK_INTERNAL(std::memcmp(values.data(), copy.values().data(),
                                          static_cast<size_t>(sum.view().num_bytes())) == 0,
                              "residual_silu: the copy differs from the sum");
        return values;
      },
      py::arg("backend"), py::arg("y"), py::arg("u"));
  ops.def_static(
      "gather_rows",
      [](Backend& backend, const Floats& x, const Ints& index, const std::string& out_dtype) {
        const Staged in(backend, view_of(x)), from(backend, view_of(index));
        const TensorView shape(nullptr, DType::f32, index.size(), in.view().size(1));
        const Staged out(backend, shape, parse_dtype(out_dtype));
        backend.gather_rows(in.view(), from.view(), out.view());
        return out.values();
      },
      py::arg("backend"), py::arg("x"), py::arg("index"), py::arg("out_dtype"));
  ops.def_static(
      "top_k",
      [](Backend& backend, const Floats& x, int k) {
        const Staged in(backend, view_of(x));
        const TensorView shape(nullptr, DType::f32, in.view().size(0), k);
        const Staged ids(backend, shape, DType::i32), values(backend, shape, DType::f32);
        backend.top_k(in.view(), ids.view(), values.view());
        return std::make_pair(ids.ints(), values.values());
      },
      py::arg("backend"), py::arg("x"), py::arg("k"));
}

void bind_attention_ops(py::class_<Ops>& ops) {
  ops.def_static(
      "rope_table",
      [](Backend& backend, const Ints& positions, const Ints& prompt_len, const std::string& rope) {
        const RopeConfig config = RopeConfig::from_json(rope);
        const Staged at(backend, view_of(positions)), lengths(backend, view_of(prompt_len));
        const Rows rows{.num_rows = static_cast<int>(positions.size()),
                        .position = at.view().as<int32_t>()};
        const TensorView shape(nullptr, DType::f32, positions.size(),
                               static_cast<int64_t>(config.inv_freq.size()));
        const Staged cos(backend, shape, DType::f32), sin(backend, shape, DType::f32);
        backend.rope_table(rows, config, lengths.view(), cos.view(), sin.view());
        return std::make_pair(cos.values(), sin.values());
      },
      py::arg("backend"), py::arg("positions"), py::arg("prompt_len"), py::arg("rope"));
  ops.def_static(
      "rope_write",
      [](Backend& backend, const Floats& qkv, const py::dict& rows, const Floats& cos,
         const Floats& sin, const std::optional<Floats>& q_gain,
         const std::optional<Floats>& k_gain, float eps, TestCache& test, int layer) {
        const RowArrays arrays(backend, rows);
        const KvShape& shape = test.cache.shape;
        const int64_t num_heads =
            view_of(qkv).size(1) / shape.head_dim - int64_t{2} * shape.num_kv_heads;
        MEDUSA_CHECK_ARG(num_heads > 0, "rope_write: qkv is ", shape_string(view_of(qkv)),
                         "; wanted more columns than ", int64_t{2} * shape.num_kv_heads,
                         " heads of ", shape.head_dim);
        const Staged q(
            backend,
            TensorView(nullptr, DType::f32, arrays.rows.num_rows, num_heads, shape.head_dim),
            query_dtype(backend, test));
        const Staged in(backend, view_of(qkv)), cosines(backend, view_of(cos)),
            sines(backend, view_of(sin));
        const StagedOptional q_gains(backend, q_gain), k_gains(backend, k_gain);
        backend.prepare_rows(arrays.rows, test.cache);
        backend.rope_write(in.view(), arrays.rows, cosines.view(), sines.view(), q_gains.view(),
                           k_gains.view(), eps, test.cache, layer, q.view());
        return q.values();
      },
      py::arg("backend"), py::arg("qkv"), py::arg("rows"), py::arg("cos"), py::arg("sin"),
      py::arg("q_gain"), py::arg("k_gain"), py::arg("eps"), py::arg("cache"), py::arg("layer"));
  ops.def_static(
      "tree_attention",
      [](Backend& backend, const Floats& q, const TestCache& test, int layer, const py::dict& rows,
         float scale, int window, const std::string& out_dtype) {
        const RowArrays arrays(backend, rows);
        const Staged in(backend, q, query_dtype(backend, test));
        const Staged out(backend, in.view(), parse_dtype(out_dtype));
        backend.prepare_rows(arrays.rows, test.cache);
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
  const Staged in(backend, view_of(logits));
  backend.verify(in.view(), {&item, 1});
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
