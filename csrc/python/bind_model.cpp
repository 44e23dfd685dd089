// Backends, checkpoint files and models.
// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <map>
#include <memory>
#include <string_view>
#include <utility>

#include "core/safetensors.h"
#include "medusa/backend.h"
#include "medusa/model.h"
#include "medusa/session.h"
#include "python/bindings.h"

namespace medusa::python {
namespace {

// The element type that NumPy shows a file's type as; null: NumPy has none.
const char* numpy_name(std::string_view dtype) {
  constexpr std::array<std::pair<std::string_view, const char*>, 13> kNames{{
      {"F64", "float64"},
      {"F32", "float32"},
      {"F16", "float16"},
      {"BF16", "uint16"},
      {"I64", "int64"},
      {"I32", "int32"},
      {"I16", "int16"},
      {"I8", "int8"},
      {"U64", "uint64"},
      {"U32", "uint32"},
      {"U16", "uint16"},
      {"U8", "uint8"},
      {"BOOL", "bool"},
  }};
  for (const auto& [file, numpy] : kNames) {
    if (file == dtype) return numpy;
  }
  return nullptr;
}

// A read-only view of the mapping that `file` keeps alive; a copy where the file left the tensor
// unaligned.
py::array file_array(const std::shared_ptr<SafetensorsFile>& file, const std::string& name) {
  const SafetensorsTensor& tensor = file->tensor(name);
  std::vector<int64_t> shape = tensor.shape;
  const char* numpy = numpy_name(tensor.dtype);
  if (numpy == nullptr) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    if (count != 0 && tensor.num_bytes % count != 0) {
      throw UnsupportedError(concat("tensor ", name, " is stored as ", tensor.dtype,
                                    ", whose elements are smaller than a byte"));
    }
    shape.push_back(count == 0 ? 1 : tensor.num_bytes / count);
    numpy = "uint8";
  }
  py::array array(py::dtype(numpy), shape, tensor.data, py::cast(file));
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    array = array.attr("copy")().cast<py::array>();
  }
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

// The destination of score(): f32, writable, [tokens, columns].
float* output(const std::optional<py::array>& array, const char* name, int64_t rows,
              int64_t columns) {
  if (!array) return nullptr;
  const TensorView view = borrow(*array, "f32", name);
  MEDUSA_CHECK_ARG(view.rank == 2 && view.size(0) == rows && view.size(1) == columns,
                   "score: ", name, " is ", shape_string(view), "; wanted [", rows, ", ", columns,
                   "]");
  MEDUSA_CHECK_ARG(array->writeable(), "score: ", name, " is read-only");
  return view.as<float>();
}

void bind_backend(py::module_& m) {
  const BackendOptions options;
  py::class_<Backend, std::shared_ptr<Backend>>(m, "Backend")
      .def(py::init([](const std::string& device, int threads, const std::string& isa) {
             return make_backend({device, threads, isa});
           }),
           py::arg("device") = options.device, py::kw_only(), py::arg("threads") = options.threads,
           py::arg("isa") = options.isa, Release())
      .def_property_readonly("name", &Backend::name)
      .def_property_readonly("detail", &Backend::detail)
      .def_property_readonly("threads", &Backend::threads)
      .def_property_readonly("max_tree_depth", &Backend::max_tree_depth)
      .def(
          "memory",
          [](const Backend& backend) {
            const Backend::Memory memory = backend.memory();
            return std::make_pair(memory.free, memory.total);
          },
          Release());
  m.def("available_isas", &available_isas);
  m.def("available_devices", &available_devices);
}

void bind_safetensors(py::module_& m) {
  py::class_<SafetensorsFile, std::shared_ptr<SafetensorsFile>>(m, "SafetensorsFile")
      .def(py::init<const std::string&>(), py::arg("path"), Release())
      .def_property_readonly("metadata", &SafetensorsFile::metadata)
      .def("names", &SafetensorsFile::names)
      .def(
          "dtype",
          [](const SafetensorsFile& file, const std::string& name) {
            return file.tensor(name).dtype;
          },
          py::arg("name"))
      .def(
          "shape",
          [](const SafetensorsFile& file, const std::string& name) {
            return file.tensor(name).shape;
          },
          py::arg("name"))
      .def("array", &file_array, py::arg("name"))
      .def(
          "release",
          [](const SafetensorsFile& file, const std::string& name) { file.release(name); },
          py::arg("name"), Release());
}

}  // namespace

void bind_model(py::module_& m) {
  bind_backend(m);
  bind_safetensors(m);

  py::class_<Model, std::shared_ptr<Model>>(m, "Model")
      .def_property_readonly("config", [](const Model& model) { return model.config.to_json(); })
      .def_property_readonly("dtype", [](const Model& model) { return dtype_name(model.dtype); })
      .def_property_readonly("weight_bytes", &Model::weight_bytes)
      .def_property_readonly(
          "kv_bytes_per_token",
          [](const Model& model) { return model.kv_shape(1).page_bytes() / kPageTokens; })
      .def_property_readonly("backend", [](const Model& model) { return model.backend; });

  py::class_<ModelBuilder>(m, "ModelBuilder")
      .def(py::init([](const std::string& config, const std::string& dtype,
                       std::shared_ptr<Backend> backend,
                       const std::map<std::string, std::string>& blocks) {
             std::map<std::string, DType> types;
             for (const auto& [name, type] : blocks) types[name] = parse_weight_dtype(type);
             return std::make_unique<ModelBuilder>(ModelConfig::from_json(config),
                                                   parse_dtype(dtype), std::move(backend), types);
           }),
           py::arg("config"), py::arg("dtype"), py::arg("backend").none(false),
           py::arg("blocks") = std::map<std::string, std::string>(), Release())
      .def(
          "add",
          [](ModelBuilder& builder, const std::string& name, const py::array& array,
             const std::optional<std::string>& dtype) {
            const TensorView view = borrow(array, dtype, name);
            const ReleasedLock release;
            builder.add(name, view);
          },
          py::arg("name"), py::arg("array"), py::arg("dtype") = py::none())
      .def(
          "finish", [](ModelBuilder& builder) { return std::shared_ptr<Model>(builder.finish()); },
          Release());

  m.def(
      "load_model",
      [](const std::string& path, const std::string& dtype, std::shared_ptr<Backend> backend) {
        return std::shared_ptr<Model>(load_model(path, parse_dtype(dtype), std::move(backend)));
      },
      py::arg("path"), py::arg("dtype"), py::arg("backend").none(false), Release());
  m.def(
      "random_model",
      [](const std::string& config, const std::string& dtype, uint64_t seed,
         std::shared_ptr<Backend> backend, const std::string& weights) {
        std::optional<DType> stored;
        if (!weights.empty()) stored = parse_weight_dtype(weights);
        return std::shared_ptr<Model>(random_model(
            ModelConfig::from_json(config), parse_dtype(dtype), seed, std::move(backend), stored));
      },
      py::arg("config"), py::arg("dtype"), py::arg("seed"), py::arg("backend").none(false),
      py::arg("weights") = "", Release());
  m.def(
      "score",
      [](const Model& model, const std::vector<int64_t>& tokens, int chunk,
         const std::optional<py::array>& logits, const std::optional<py::array>& hidden) {
        const std::vector<int32_t> ids = token_ids(tokens);
        const auto rows = static_cast<int64_t>(ids.size());
        float* logits_out = output(logits, "logits", rows, model.config.vocab_size);
        float* hidden_out = output(hidden, "hidden", rows, model.config.hidden_size);
        const ReleasedLock release;
        score(model, ids, chunk, logits_out, hidden_out);
      },
      py::arg("model"), py::arg("tokens"), py::arg("chunk"), py::arg("logits"), py::arg("hidden"));
  m.def(
      "head_candidates",
      [](const std::shared_ptr<Model>& model, const py::array& hidden, const py::array& ids,
         const py::array& logits) {
        const TensorView rows = borrow(hidden, "f32", "hidden");
        const TensorView found = borrow(ids, "i32", "ids"),
                         scores = borrow(logits, "f32", "logits");
        MEDUSA_CHECK_ARG(rows.rank == 2 && rows.size(1) == model->config.hidden_size,
                         "head_candidates: hidden is ", shape_string(rows), "; wanted [R, ",
                         model->config.hidden_size, "]");
        for (const TensorView& out : {found, scores}) {
          MEDUSA_CHECK_ARG(out.rank == 3 && out.size(0) == model->config.heads.num_heads &&
                               out.size(1) == rows.size(0) && out.size(2) == found.size(2) &&
                               out.size(2) <= kMaxTreeNodes,
                           "head_candidates: ids are ", shape_string(found), ", logits ",
                           shape_string(scores), "; wanted [", model->config.heads.num_heads, ", ",
                           rows.size(0), ", up to ", kMaxTreeNodes, "] of both");
        }
        MEDUSA_CHECK_ARG(ids.writeable() && logits.writeable(),
                         "head_candidates: ids or logits are read-only");
        const ReleasedLock release;
        head_candidates(model, rows.as<float>(), rows.size(0), static_cast<int>(found.size(2)),
                        found.as<int32_t>(), scores.as<float>());
      },
      py::arg("model"), py::arg("hidden"), py::arg("ids"), py::arg("logits"));
}

}  // namespace medusa::python
