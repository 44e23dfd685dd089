// SPDX-License-Identifier: Apache-2.0
#include "medusa/model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "medusa/error.h"

namespace medusa {
namespace {

int64_t bytes_of(const std::unique_ptr<Weight>& weight) { return weight ? weight->num_bytes() : 0; }

int64_t bytes_of(const std::unique_ptr<Buffer>& buffer) { return buffer ? buffer->num_bytes() : 0; }

float widen_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(mantissa), -24);  // subnormal
  if (exponent == 31) {
    magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent > 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Element i of an array that may lie at any address.
float float_at(const TensorView& tensor, int64_t i) {
  const std::byte* at = tensor.as<const std::byte>() + i * dtype_bytes(tensor.dtype);
  if (tensor.dtype == DType::f32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return tensor.dtype == DType::f16 ? widen_f16(bits)
                                    : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace

int64_t Model::weight_bytes() const {
  int64_t total = bytes_of(embedding) + bytes_of(lm_head) + bytes_of(final_norm);
  total += bytes_of(draft_lm_head);
  for (const Layer& layer : layers) {
    for (const auto* buffer :
         {&layer.attn_norm, &layer.mlp_norm, &layer.q_norm, &layer.k_norm, &layer.qkv_bias,
          &layer.o_bias, &layer.gate_up_bias, &layer.down_bias}) {
      total += bytes_of(*buffer);
    }
    for (const auto* weight : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      total += bytes_of(*weight);
    }
  }
  for (const Head& head : heads) {
    for (const auto& weight : head.blocks) total += bytes_of(weight);
    for (const auto& buffer : head.biases) total += bytes_of(buffer);
    total += bytes_of(head.lm_head);
  }
  return total;
}

KvShape Model::kv_shape(int num_pages) const {
  return {config.num_layers, config.num_kv_heads, config.head_dim, dtype, num_pages};
}

// Where one named tensor goes: rows of a weight, elements of a buffer, or the token map (neither).
struct ModelBuilder::Slot {
  TensorSpec wanted;
  Weight* weight = nullptr;
  Buffer* buffer = nullptr;
  int64_t first = 0;  // row of the weight, element of the buffer
  bool given = false;
};

struct ModelBuilder::State {
  std::unique_ptr<Model> model = std::make_unique<Model>();
  std::map<std::string, Slot> slots;
  std::map<std::string, DType> blocks;  // by tensor name

  DType stored_as(const std::string& name) const {
    const auto found = blocks.find(name);
    return found == blocks.end() ? model->dtype : found->second;
  }

  void expect(const std::string& name, std::vector<int64_t> shape, Weight* weight, Buffer* buffer,
              int64_t first) {
    slots.emplace(name, Slot{{name, std::move(shape)}, weight, buffer, first});
  }

  // One stored matrix (and bias) made of several named ones, stacked by rows.
  void matrix(const std::vector<std::pair<std::string, int64_t>>& parts, int64_t num_inputs,
              bool has_bias, std::unique_ptr<Weight>& weight, std::unique_ptr<Buffer>* bias) {
    int64_t num_outputs = 0;
    const DType dtype = stored_as(parts.front().first + ".weight");
    for (const auto& [name, rows] : parts) {
      num_outputs += rows;
      const DType other = stored_as(name + ".weight");
      MEDUSA_CHECK_ARG(other == dtype, "model: ", name, ".weight is stored as ", dtype_name(other),
                       ", ", parts.front().first, ".weight of the same matrix as ",
                       dtype_name(dtype));
    }
    weight = model->backend->make_weight(num_outputs, num_inputs, dtype);
    if (has_bias) *bias = model->backend->allocate(num_outputs * dtype_bytes(DType::f32));

    int64_t first = 0;
    for (const auto& [name, rows] : parts) {
      expect(name + ".weight", {rows, num_inputs}, weight.get(), nullptr, first);
      if (has_bias) expect(name + ".bias", {rows}, nullptr, bias->get(), first);
      first += rows;
    }
  }

  void vector(const std::string& name, int64_t size, std::unique_ptr<Buffer>& buffer) {
    buffer = model->backend->allocate(size * dtype_bytes(DType::f32));
    expect(name, {size}, nullptr, buffer.get(), 0);
  }

  void expect_layer(int index) {
    const ModelConfig& config = model->config;
    const int64_t d = config.hidden_size, f = config.intermediate_size;
    const int64_t q_rows = int64_t{config.num_heads} * config.head_dim;
    const int64_t kv_rows = int64_t{config.num_kv_heads} * config.head_dim;
    const std::string at = "layers." + std::to_string(index) + ".";
    Layer& layer = model->layers[static_cast<size_t>(index)];

    vector(at + "attn_norm.weight", d, layer.attn_norm);
    vector(at + "mlp_norm.weight", d, layer.mlp_norm);
    if (config.qk_norm) {
      vector(at + "q_norm.weight", config.head_dim, layer.q_norm);
      vector(at + "k_norm.weight", config.head_dim, layer.k_norm);
    }
    matrix({{at + "q_proj", q_rows}, {at + "k_proj", kv_rows}, {at + "v_proj", kv_rows}}, d,
           config.qkv_bias, layer.qkv, &layer.qkv_bias);
    matrix({{at + "o_proj", d}}, q_rows, config.o_bias, layer.o, &layer.o_bias);
    matrix({{at + "gate_proj", f}, {at + "up_proj", f}}, d, config.mlp_bias, layer.gate_up,
           &layer.gate_up_bias);
    matrix({{at + "down_proj", d}}, f, config.mlp_bias, layer.down, &layer.down_bias);
  }

  void expect_head(int index) {
    const HeadsConfig& config = model->config.heads;
    const int64_t d = model->config.hidden_size;
    const std::string at = "heads." + std::to_string(index) + ".";
    const auto num_layers = static_cast<size_t>(config.num_layers);
    Head& head = model->heads[static_cast<size_t>(index)];

    head.blocks.resize(num_layers);
    head.biases.resize(num_layers);
    for (size_t i = 0; i < num_layers; ++i) {
      matrix({{at + std::to_string(i), d}}, d, true, head.blocks[i], &head.biases[i]);
    }
    if (!config.shared_lm_head) {
      matrix({{at + "lm_head", config.head_vocab}}, d, false, head.lm_head, nullptr);
    }
  }

  void fill_token_map(const TensorView& tensor) {
    std::vector<int32_t> map(static_cast<size_t>(tensor.num_elements()));
    std::memcpy(map.data(), tensor.data, map.size() * sizeof map[0]);
    const int vocab_size = model->config.vocab_size;
    std::vector<bool> seen(static_cast<size_t>(vocab_size));
    for (size_t i = 0; i < map.size(); ++i) {
      MEDUSA_CHECK_ARG(map[i] >= 0 && map[i] < vocab_size, "tensor heads.token_map: element ", i,
                       " is ", map[i], ", wanted 0 to ", vocab_size - 1);
      MEDUSA_CHECK_ARG(!seen[static_cast<size_t>(map[i])], "tensor heads.token_map: token ", map[i],
                       " is listed twice");
      seen[static_cast<size_t>(map[i])] = true;
    }
    model->token_map = std::move(map);
  }

  // The backend reads whole elements, so rows at an odd address are moved to an even one first, a
  // few at a time.
  void fill_weight(const Slot& slot, const TensorView& tensor) {
    Backend& backend = *model->backend;
    // Blocks are read byte by byte.
    const int64_t element_bytes = dtype_bytes(tensor.dtype);
    if (is_block(tensor.dtype) ||
        reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(element_bytes) == 0) {
      backend.pack(*slot.weight, slot.first, tensor);
      return;
    }
    constexpr int64_t kChunkBytes = int64_t{16} << 20;
    const int64_t row_bytes = tensor.size(1) * element_bytes;
    const int64_t chunk = std::clamp<int64_t>(kChunkBytes / row_bytes, 1, tensor.size(0));
    std::vector<float> copy(static_cast<size_t>(chunk * row_bytes / 4 + 1));
    for (int64_t row = 0; row < tensor.size(0); row += chunk) {
      const int64_t rows = std::min(chunk, tensor.size(0) - row);
      std::memcpy(copy.data(), tensor.as<const std::byte>() + row * row_bytes,
                  static_cast<size_t>(rows * row_bytes));
      backend.pack(*slot.weight, slot.first + row,
                   TensorView(copy.data(), tensor.dtype, rows, tensor.size(1)));
    }
  }
};

ModelBuilder::ModelBuilder(ModelConfig config, DType dtype, std::shared_ptr<Backend> backend,
                           const std::map<std::string, DType>& blocks)
    : state_(std::make_unique<State>()) {
  config.check();
  MEDUSA_CHECK_ARG(dtype != DType::i32 && !is_block(dtype), "model: dtype ", dtype_name(dtype),
                   ", wanted bf16, f16 or f32");
  MEDUSA_CHECK_ARG(backend != nullptr, "model: no backend given");

  Model& model = *state_->model;
  const int64_t d = config.hidden_size, vocab = config.vocab_size;
  model.dtype = dtype;
  model.backend = std::move(backend);
  model.layers.resize(static_cast<size_t>(config.num_layers));
  model.heads.resize(static_cast<size_t>(config.heads.num_heads));
  model.config = std::move(config);
  state_->blocks = blocks;

  state_->matrix({{"embed_tokens", vocab}}, d, false, model.embedding, nullptr);
  if (!model.config.tied_embeddings) {
    state_->matrix({{"lm_head", vocab}}, d, false, model.lm_head, nullptr);
  }
  state_->vector("norm.weight", d, model.final_norm);
  for (int i = 0; i < model.config.num_layers; ++i) state_->expect_layer(i);

  const HeadsConfig& heads = model.config.heads;
  for (int i = 0; i < heads.num_heads; ++i) state_->expect_head(i);
  if (heads.cut(model.config.vocab_size)) {
    if (heads.shared_lm_head) {
      state_->matrix({{"heads.draft_lm_head", heads.head_vocab}}, d, false, model.draft_lm_head,
                     nullptr);
    }
    state_->expect("heads.token_map", {heads.head_vocab}, nullptr, nullptr, 0);
  }
  for (const auto& [name, dtype_of_blocks] : blocks) {
    const auto slot = state_->slots.find(name);
    MEDUSA_CHECK_ARG(slot != state_->slots.end() && slot->second.weight != nullptr, "model: ", name,
                     " cannot be stored as ", dtype_name(dtype_of_blocks), ": it is no matrix");
  }
}

ModelBuilder::~ModelBuilder() = default;

void ModelBuilder::add(const std::string& name, TensorView tensor) {
  MEDUSA_CHECK_ARG(state_->model != nullptr, "tensor ", name, ": the model is already finished");
  const auto found = state_->slots.find(name);
  MEDUSA_CHECK_ARG(found != state_->slots.end(), "tensor ", name,
                   ": unknown; the configuration has no place for it");
  Slot& slot = found->second;
  MEDUSA_CHECK_ARG(!slot.given, "tensor ", name, ": given twice");

  const std::vector<int64_t>& shape = slot.wanted.shape;
  TensorView wanted = tensor;
  wanted.rank = static_cast<int>(shape.size());
  wanted.shape = {1, 1, 1};
  std::copy(shape.begin(), shape.end(), wanted.shape.begin());
  MEDUSA_CHECK_ARG(tensor.rank == wanted.rank && tensor.shape == wanted.shape, "tensor ", name,
                   ": found shape ", shape_string(tensor), ", wanted ", shape_string(wanted));
  const bool is_map = slot.weight == nullptr && slot.buffer == nullptr;
  const bool own_blocks = slot.weight != nullptr && tensor.dtype == slot.weight->dtype();
  MEDUSA_CHECK_ARG(
      (tensor.dtype == DType::i32) == is_map && (!is_block(tensor.dtype) || own_blocks), "tensor ",
      name, ": found dtype ", dtype_name(tensor.dtype), ", wanted ",
      is_map ? "i32" : "f32, f16, bf16 or the blocks it is stored in");
  MEDUSA_CHECK_ARG(tensor.data != nullptr, "tensor ", name, ": its data is null");

  if (is_map) {
    state_->fill_token_map(tensor);
  } else if (slot.weight != nullptr) {
    try {
      state_->fill_weight(slot, tensor);
    } catch (const ArgumentError& error) {
      throw ArgumentError(concat("tensor ", name, ": ", error.what()));
    }
  } else {
    std::vector<float> values(static_cast<size_t>(tensor.size(0)));
    for (int64_t i = 0; i < tensor.size(0); ++i) {
      values[static_cast<size_t>(i)] = float_at(tensor, i);
    }
    state_->model->backend->upload(static_cast<float*>(slot.buffer->data()) + slot.first,
                                   values.data(), tensor.size(0) * dtype_bytes(DType::f32));
  }
  slot.given = true;
}

std::vector<TensorSpec> ModelBuilder::missing() const {
  std::vector<TensorSpec> specs;
  for (const auto& [name, slot] : state_->slots) {
    if (!slot.given) specs.push_back(slot.wanted);
  }
  return specs;
}

// In the order in which a step that drafts reads them, and the next step again.
static void chain_weights(Model& model) {
  Weight* output = model.lm_head ? model.lm_head.get() : model.embedding.get();
  std::vector<Weight*> order;
  for (const Layer& layer : model.layers) {
    order.insert(order.end(),
                 {layer.qkv.get(), layer.o.get(), layer.gate_up.get(), layer.down.get()});
  }
  order.push_back(output);
  for (const Head& head : model.heads) {
    for (const auto& block : head.blocks) order.push_back(block.get());
    if (head.lm_head) order.push_back(head.lm_head.get());
  }
  if (model.draft_lm_head) order.push_back(model.draft_lm_head.get());
  for (size_t i = 0; i < order.size(); ++i) order[i]->next = order[(i + 1) % order.size()];
}

std::unique_ptr<Model> ModelBuilder::finish() {
  MEDUSA_CHECK_ARG(state_->model != nullptr, "the model is already finished");
  constexpr size_t kMaxListed = 8;
  const std::vector<TensorSpec> absent = missing();
  std::string list;
  for (size_t i = 0; i < std::min(absent.size(), kMaxListed); ++i) {
    list += (i == 0 ? "" : ", ") + absent[i].name;
  }
  if (absent.size() > kMaxListed) {
    list += " and " + std::to_string(absent.size() - kMaxListed) + " more";
  }
  MEDUSA_CHECK_ARG(absent.empty(), absent.size(), " tensors are missing: ", list);
  chain_weights(*state_->model);
  return std::move(state_->model);
}

}  // namespace medusa
