// Models that C++ gets by itself: from the one-file export form, or random ones for benchmarks.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <utility>

#include "core/json.h"
#include "core/random_values.h"
#include "core/safetensors.h"
#include "medusa/error.h"
#include "medusa/model.h"

namespace medusa {
namespace {

const std::string& metadata_value(const SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  MEDUSA_CHECK_ARG(found != file.metadata().end(), file.path(), ": its metadata has no \"", key,
                   "\"; wanted a file that `medusa-ext export` wrote");
  return found->second;
}

TensorView view_of(const std::string& name, const SafetensorsTensor& tensor) {
  constexpr std::pair<const char*, DType> kDTypes[] = {
      {"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}, {"I32", DType::i32}};
  TensorView view;
  view.data = const_cast<std::byte*>(tensor.data);  // views are not const; nobody writes this one
  view.rank = static_cast<int>(tensor.shape.size());
  MEDUSA_CHECK_ARG(view.rank >= 1 && view.rank <= 3, "tensor ", name, ": found ",
                   tensor.shape.size(), " axes, wanted 1 or 2");
  std::copy(tensor.shape.begin(), tensor.shape.end(), view.shape.begin());
  for (const auto& [text, dtype] : kDTypes) {
    if (tensor.dtype == text) {
      view.dtype = dtype;
      return view;
    }
  }
  throw ArgumentError(
      concat("tensor ", name, ": found dtype ", tensor.dtype, ", wanted F32, F16, BF16 or I32"));
}

std::vector<int32_t> read_eos_ids(const SafetensorsFile& file, int vocab_size) {
  const std::string key = "medusa_ext.eos_ids";
  std::vector<int32_t> ids;
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) return ids;
  const json::Value value = json::parse(found->second, key);
  for (const json::Value& item : value.as_array(key)) {
    const int64_t id = item.as_int(key);
    MEDUSA_CHECK_ARG(id >= 0 && id < vocab_size, key, ": found ", id, ", wanted 0 to ",
                     vocab_size - 1);
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

// `storage` with room for a tensor of this shape.
template <class T>
TensorView sized(std::vector<T>& storage, DType dtype, const std::vector<int64_t>& shape) {
  TensorView view;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  const auto size = static_cast<size_t>(view.num_elements());
  if (storage.size() < size) storage.resize(size);
  view.data = storage.data();
  return view;
}

}  // namespace

std::unique_ptr<Model> load_model(const std::string& path, std::optional<DType> dtype,
                                  std::shared_ptr<Backend> backend) {
  const SafetensorsFile file(path);
  const std::string& format = metadata_value(file, "medusa_ext.format");
  MEDUSA_CHECK_ARG(format == "1", path, ": found medusa_ext.format ", format,
                   ", wanted 1; a newer medusa_ext wrote this file");
  try {
    const ModelConfig config = ModelConfig::from_json(metadata_value(file, "medusa_ext.config"));
    std::vector<int32_t> eos_ids = read_eos_ids(file, config.vocab_size);
    if (!dtype) {
      const std::string name = "embed_tokens.weight";
      dtype = view_of(name, file.tensor(name)).dtype;
    }
    ModelBuilder builder(config, *dtype, std::move(backend));
    for (const std::string& name : file.names()) {
      builder.add(name, view_of(name, file.tensor(name)));
      file.release(name);  // packed now: the copy in the mapping must not stay resident
    }
    std::unique_ptr<Model> model = builder.finish();
    model->eos_ids = std::move(eos_ids);
    return model;
  } catch (const ArgumentError& error) {
    throw ArgumentError(concat(path, ": ", error.what()));
  }
}

std::unique_ptr<Model> random_model(const ModelConfig& config, DType dtype, uint64_t seed,
                                    std::shared_ptr<Backend> backend) {
  ModelBuilder builder(config, dtype, std::move(backend));
  NormalValues normal(seed);
  std::vector<float> f32;
  std::vector<uint16_t> bf16;
  std::vector<int32_t> i32;
  for (const auto& [name, shape] : builder.missing()) {
    if (name == "heads.token_map") {  // spread over the vocabulary, all distinct
      const TensorView view = sized(i32, DType::i32, shape);
      for (int64_t i = 0; i < shape[0]; ++i) {
        view.as<int32_t>()[i] = static_cast<int32_t>(i * config.vocab_size / shape[0]);
      }
      builder.add(name, view);
      continue;
    }
    const bool matrix = shape.size() == 2;
    const float scale = matrix ? 1.0f / std::sqrt(static_cast<float>(shape[1])) : 0.02f;
    if (matrix && dtype == DType::bf16) {
      const TensorView view = sized(bf16, DType::bf16, shape);
      normal.fill(view.as<uint16_t>(), view.num_elements(),
                  [scale](float value) { return cut_bf16(scale * value); });
      builder.add(name, view);
      continue;
    }
    const TensorView view = sized(f32, DType::f32, shape);
    if (name.ends_with("norm.weight")) {
      std::fill_n(view.as<float>(), shape[0], 1.0f);
    } else {
      normal.fill(view.as<float>(), view.num_elements(),
                  [scale](float value) { return scale * value; });
    }
    builder.add(name, view);
  }
  return builder.finish();
}

}  // namespace medusa
