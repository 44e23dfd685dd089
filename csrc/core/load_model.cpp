// Models that C++ gets by itself: from the one-file export form, or random ones for benchmarks.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
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

DType block_type(const std::string& word, const std::string& where) {
  for (const DType dtype : {DType::q8_0, DType::q4_0, DType::q4_1, DType::q4_k}) {
    if (word == dtype_name(dtype)) return dtype;
  }
  throw ArgumentError(
      concat(where, ": found ", json::quote(word), ", wanted q8_0, q4_0, q4_1 or q4_k"));
}

// The types of tensors that lie in blocks, each checked against its tensor.
std::map<std::string, DType> read_blocks(const SafetensorsFile& file) {
  const std::string key = "medusa_ext.blocks";
  std::map<std::string, DType> blocks;
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) return blocks;
  const json::Value value = json::parse(found->second, key);
  for (const auto& [name, type] : value.as_object(key)) {
    MEDUSA_CHECK_ARG(std::count(file.names().begin(), file.names().end(), name) == 1, key,
                     " names the tensor ", json::quote(name), ", which the file does not hold");
    const std::string& word = type.as_string(concat("tensor ", name, ": ", key));
    const SafetensorsTensor& tensor = file.tensor(name);
    const DType dtype = block_type(word, concat("tensor ", name, ": ", key));
    MEDUSA_CHECK_ARG(tensor.dtype == "U8" && tensor.shape.size() == 2 &&
                         tensor.shape[1] % block_bytes(dtype) == 0,
                     "tensor ", name, ": found dtype ", tensor.dtype, " in rows of ",
                     tensor.shape.empty() ? 0 : tensor.shape.back(), "; wanted ", word,
                     " blocks as U8 [rows, a multiple of ", block_bytes(dtype), "]");
    blocks[name] = dtype;
  }
  return blocks;
}

TensorView block_view(const SafetensorsTensor& tensor, DType dtype) {
  return {const_cast<std::byte*>(tensor.data), dtype, tensor.shape[0],
          tensor.shape[1] / block_bytes(dtype) * block_elements(dtype)};
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
    const std::map<std::string, DType> blocks = read_blocks(file);
    if (const auto found = file.metadata().find("medusa_ext.dtype");
        !dtype && found != file.metadata().end()) {
      dtype = parse_dtype(found->second);
    }
    if (!dtype) {
      const std::string name = "embed_tokens.weight";
      dtype = view_of(name, file.tensor(name)).dtype;
    }
    ModelBuilder builder(config, *dtype, std::move(backend), blocks);
    for (const std::string& name : file.names()) {
      const SafetensorsTensor& tensor = file.tensor(name);
      const auto type = blocks.find(name);
      builder.add(name,
                  type == blocks.end() ? view_of(name, tensor) : block_view(tensor, type->second));
      file.release(name);  // packed now: the copy in the mapping must not stay resident
    }
    std::unique_ptr<Model> model = builder.finish();
    model->eos_ids = std::move(eos_ids);
    return model;
  } catch (const ArgumentError& error) {
    throw ArgumentError(concat(path, ": ", error.what()));
  }
}

namespace {

// The matrices of a model whose rows whole blocks fill, by name.
std::map<std::string, DType> matrices_in_blocks(const ModelConfig& config, DType type) {
  std::map<std::string, DType> blocks;
  const auto put = [&](const std::string& name, int64_t num_inputs) {
    if (num_inputs % block_elements(type) == 0) blocks[name + ".weight"] = type;
  };
  const int64_t d = config.hidden_size;
  put("embed_tokens", d);
  if (!config.tied_embeddings) put("lm_head", d);
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string layer = concat("layers.", i, ".");
    for (const char* part : {"q", "k", "v", "gate", "up"}) put(layer + part + "_proj", d);
    put(layer + "o_proj", int64_t{config.num_heads} * config.head_dim);
    put(layer + "down_proj", config.intermediate_size);
  }
  if (config.heads.shared_lm_head && config.heads.cut(config.vocab_size)) {
    put("heads.draft_lm_head", d);
  }
  for (int h = 0; h < config.heads.num_heads; ++h) {
    for (int l = 0; l < config.heads.num_layers; ++l) put(concat("heads.", h, ".", l), d);
    if (!config.heads.shared_lm_head) put(concat("heads.", h, ".lm_head"), d);
  }
  return blocks;
}

// The bits of a positive f16 number.
uint16_t positive_f16(float value) {
  const int exponent = std::max(std::ilogb(value), -14);
  const auto digits = static_cast<int>(std::lround(std::ldexp(value, 10 - exponent)));
  return static_cast<uint16_t>((exponent + 14) * 1024 + digits);
}

// q4_k blocks of random scales, minima and values, about N(0, scale^2): d s q - n t with s and t
// in [0, 63] and q in [0, 15] has mean 0 where n = 7.5 d, and then the deviation 258 d.
TensorView random_q4_k(std::vector<uint8_t>& storage, const std::vector<int64_t>& shape,
                       float scale, NormalValues& normal) {
  TensorView view(nullptr, DType::q4_k, shape[0], shape[1]);
  const auto num_bytes = static_cast<size_t>(view.num_bytes());
  if (storage.size() < num_bytes) storage.resize(num_bytes);
  view.data = storage.data();
  normal.fill(storage.data(), view.num_bytes(), [](float value) {
    return static_cast<uint8_t>(std::bit_cast<uint32_t>(value) >> 8);
  });
  const uint16_t head[2] = {positive_f16(scale / 258.0f), positive_f16(7.5f * scale / 258.0f)};
  for (size_t at = 0; at < num_bytes; at += static_cast<size_t>(block_bytes(DType::q4_k))) {
    std::memcpy(storage.data() + at, head, sizeof(head));
  }
  return view;
}

}  // namespace

std::unique_ptr<Model> random_model(const ModelConfig& config, DType dtype, uint64_t seed,
                                    std::shared_ptr<Backend> backend,
                                    std::optional<DType> weights) {
  std::map<std::string, DType> blocks;
  if (weights && is_block(*weights)) blocks = matrices_in_blocks(config, *weights);
  MEDUSA_CHECK_ARG(!weights || is_block(*weights) || *weights == dtype,
                   "random_model: weights are ", dtype_name(*weights), ", dtype is ",
                   dtype_name(dtype), "; give the same type, or blocks");
  ModelBuilder builder(config, dtype, std::move(backend), blocks);
  NormalValues normal(seed);
  std::vector<float> f32;
  std::vector<uint8_t> bytes;
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
    const auto block = blocks.find(name);
    if (block != blocks.end() && block->second == DType::q4_k) {
      builder.add(name, random_q4_k(bytes, shape, scale, normal));
      continue;
    }
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
