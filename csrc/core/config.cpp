// SPDX-License-Identifier: Apache-2.0
#include "medusa/config.h"

#include <array>
#include <cmath>
#include <string_view>
#include <utility>

#include "core/json.h"
#include "medusa/error.h"

namespace medusa {
namespace {

constexpr int kMaxSize = 1 << 24;  // of any axis: products of three still fit 64 bits with room
constexpr int kMaxLayers = 4096;
constexpr int kMaxHeads = 64, kMaxHeadLayers = 64;  // Medusa heads and the blocks of one

constexpr std::array<std::pair<Activation, std::string_view>, 3> kActivations{{
    {Activation::silu, "silu"},
    {Activation::gelu, "gelu"},
    {Activation::gelu_tanh, "gelu_tanh"},
}};

// Reads the members of one JSON object by name and counts them, so that what nobody asked for is
// found.
class Reader {
 public:
  Reader(const json::Value& value, std::string where)
      : where_(std::move(where)), object_(value.as_object(where_)) {}

  void operator()(const char* key, bool& out) { out = get(key).as_bool(name(key)); }
  void operator()(const char* key, float& out) { out = get(key).as_float(name(key)); }
  void operator()(const char* key, std::string& out) { out = get(key).as_string(name(key)); }
  void operator()(const char* key, int& out) { out = to_int(get(key), name(key)); }

  void operator()(const char* key, std::vector<int>& out) {
    out.clear();
    for (const json::Value& item : get(key).as_array(name(key))) {
      out.push_back(to_int(item, name(key)));
    }
  }

  void operator()(const char* key, std::vector<float>& out) {
    out.clear();
    for (const json::Value& item : get(key).as_array(name(key))) {
      out.push_back(item.as_float(name(key)));
    }
  }

  void operator()(const char* key, Activation& out) {
    const std::string& text = get(key).as_string(name(key));
    for (const auto& [activation, word] : kActivations) {
      if (word == text) {
        out = activation;
        return;
      }
    }
    throw ArgumentError(concat(name(key), ": found ", json::quote(text),
                               ", wanted \"silu\", \"gelu\" or \"gelu_tanh\""));
  }

  template <class Nested>
  void operator()(const char* key, Nested& out) {
    Reader reader(get(key), name(key));
    fields(reader, out);
    reader.finish();
  }

  void finish() const {
    for (const json::Member& member : object_) {
      bool asked = false;
      for (const std::string_view key : asked_) asked |= key == member.key;
      MEDUSA_CHECK_ARG(asked, where_, ": unknown key ", json::quote(member.key));
    }
  }

 private:
  std::string name(const char* key) const { return where_ + "." + key; }

  const json::Value& get(const char* key) {
    const json::Value* value = json::find(object_, key);
    MEDUSA_CHECK_ARG(value != nullptr, where_, ": the key \"", key, "\" is missing");
    asked_.push_back(key);
    return *value;
  }

  static int to_int(const json::Value& value, const std::string& where) {
    const int64_t wide = value.as_int(where);
    MEDUSA_CHECK_ARG(wide >= -kMaxSize && wide <= kMaxSize, where, ": found ", wide,
                     ", wanted at most ", kMaxSize);
    return static_cast<int>(wide);
  }

  std::string where_;
  const json::Value::Object& object_;
  std::vector<std::string_view> asked_;
};

class Writer {
 public:
  void operator()(const char* key, bool value) { put(key, value ? "true" : "false"); }
  void operator()(const char* key, float value) { put(key, json::number(value)); }
  void operator()(const char* key, int value) { put(key, std::to_string(value)); }
  void operator()(const char* key, const std::string& value) { put(key, json::quote(value)); }

  void operator()(const char* key, Activation value) {
    for (const auto& [activation, word] : kActivations) {
      if (activation == value) put(key, json::quote(word));
    }
  }

  void operator()(const char* key, const std::vector<int>& values) {
    std::string list;
    for (const int value : values) list += (list.empty() ? "" : ", ") + std::to_string(value);
    put(key, "[" + list + "]");
  }

  void operator()(const char* key, const std::vector<float>& values) {
    std::string list;
    for (const float value : values) list += (list.empty() ? "" : ", ") + json::number(value);
    put(key, "[" + list + "]");
  }

  template <class Nested>
  void operator()(const char* key, const Nested& value) {
    Writer writer;
    fields(writer, value);
    put(key, writer.text());
  }

  std::string text() const { return "{" + members_ + "}"; }

 private:
  void put(const char* key, const std::string& value) {
    members_ += (members_.empty() ? "" : ", ") + json::quote(key) + ": " + value;
  }

  std::string members_;
};

// The one list of keys, for reading and for writing.
template <class Visitor, class Rope>
  requires std::is_same_v<std::remove_const_t<Rope>, RopeConfig>
void fields(Visitor& visit, Rope& rope) {
  visit("inv_freq", rope.inv_freq);
  visit("attention_scaling", rope.attention_scaling);
  visit("dynamic_factor", rope.dynamic_factor);
  visit("base", rope.base);
  visit("original_context", rope.original_context);
}

template <class Visitor, class Heads>
  requires std::is_same_v<std::remove_const_t<Heads>, HeadsConfig>
void fields(Visitor& visit, Heads& heads) {
  visit("num_heads", heads.num_heads);
  visit("num_layers", heads.num_layers);
  visit("shared_lm_head", heads.shared_lm_head);
  visit("head_vocab", heads.head_vocab);
}

template <class Visitor, class Config>
  requires std::is_same_v<std::remove_const_t<Config>, ModelConfig>
void fields(Visitor& visit, Config& config) {
  visit("family", config.family);
  visit("vocab_size", config.vocab_size);
  visit("hidden_size", config.hidden_size);
  visit("intermediate_size", config.intermediate_size);
  visit("num_layers", config.num_layers);
  visit("num_heads", config.num_heads);
  visit("num_kv_heads", config.num_kv_heads);
  visit("head_dim", config.head_dim);
  visit("max_context", config.max_context);
  visit("rms_norm_eps", config.rms_norm_eps);
  visit("activation", config.activation);
  visit("qkv_bias", config.qkv_bias);
  visit("o_bias", config.o_bias);
  visit("mlp_bias", config.mlp_bias);
  visit("qk_norm", config.qk_norm);
  visit("tied_embeddings", config.tied_embeddings);
  visit("embedding_scale", config.embedding_scale);
  visit("attention_scale", config.attention_scale);
  visit("windows", config.windows);
  visit("rope", config.rope);
  visit("heads", config.heads);
}

template <class Config>
Config read(const std::string& text, const char* what) {
  const json::Value value = json::parse(text, what);
  Config config;
  Reader reader(value, what);
  fields(reader, config);
  reader.finish();
  return config;
}

template <class Config>
std::string write(const Config& config) {
  Writer writer;
  fields(writer, config);
  return writer.text();
}

void check_range(const char* key, int value, int least, int most) {
  MEDUSA_CHECK_ARG(value >= least && value <= most, key, ": found ", value, ", wanted ", least,
                   " to ", most);
}

void check_positive(const char* key, float value) {
  MEDUSA_CHECK_ARG(std::isfinite(value) && value > 0, key, ": found ", value,
                   ", wanted a finite number above 0");
}

void check_not_negative(const char* key, float value) {
  MEDUSA_CHECK_ARG(std::isfinite(value) && value >= 0, key, ": found ", value,
                   ", wanted a finite number of at least 0");
}

void check_heads(const HeadsConfig& heads, int vocab_size) {
  check_range("config.heads.num_heads", heads.num_heads, 0, kMaxHeads);
  check_range("config.heads.num_layers", heads.num_layers, 0, kMaxHeadLayers);
  if (heads.num_heads == 0) return;
  check_range("config.heads.head_vocab", heads.head_vocab, heads.shared_lm_head ? 0 : 1,
              vocab_size);
}

}  // namespace

RopeConfig RopeConfig::from_json(const std::string& text) { return read<RopeConfig>(text, "rope"); }

std::string RopeConfig::to_json() const { return write(*this); }

void RopeConfig::check(int head_dim) const {
  MEDUSA_CHECK_ARG(!inv_freq.empty() && 2 * inv_freq.size() <= static_cast<size_t>(head_dim),
                   "config.rope.inv_freq: found ", inv_freq.size(),
                   " values, wanted 1 to head_dim / 2 (head_dim is ", head_dim, ")");
  for (const float frequency : inv_freq) {
    check_not_negative("config.rope.inv_freq", frequency);
  }
  check_positive("config.rope.attention_scaling", attention_scaling);
  check_not_negative("config.rope.dynamic_factor", dynamic_factor);
  if (dynamic_factor == 0) return;
  MEDUSA_CHECK_ARG(dynamic_factor >= 1, "config.rope.dynamic_factor: found ", dynamic_factor,
                   ", wanted 0 (off) or at least 1");
  MEDUSA_CHECK_ARG(inv_freq.size() >= 2,
                   "config.rope.inv_freq: found 1 value, wanted 2 or more "
                   "with dynamic scaling");
  check_positive("config.rope.base", base);
  check_range("config.rope.original_context", original_context, 1, kMaxSize);
}

ModelConfig ModelConfig::from_json(const std::string& text) {
  ModelConfig config = read<ModelConfig>(text, "config");
  config.check();
  return config;
}

std::string ModelConfig::to_json() const { return write(*this); }

void ModelConfig::check() const {
  check_range("config.vocab_size", vocab_size, 1, kMaxSize);
  check_range("config.hidden_size", hidden_size, 1, 1 << 20);
  check_range("config.intermediate_size", intermediate_size, 1, 1 << 20);
  check_range("config.num_layers", num_layers, 1, kMaxLayers);
  check_range("config.num_heads", num_heads, 1, 4096);
  check_range("config.num_kv_heads", num_kv_heads, 1, 4096);
  MEDUSA_CHECK_ARG(num_heads % num_kv_heads == 0, "config.num_heads: found ", num_heads,
                   ", wanted a multiple of num_kv_heads (", num_kv_heads, ")");
  MEDUSA_CHECK_ARG(head_dim >= 2 && head_dim <= 4096 && head_dim % 2 == 0,
                   "config.head_dim: found ", head_dim, ", wanted an even number, 2 to 4096");
  check_range("config.max_context", max_context, 2, kMaxSize);
  check_not_negative("config.rms_norm_eps", rms_norm_eps);
  check_positive("config.embedding_scale", embedding_scale);
  check_not_negative("config.attention_scale", attention_scale);
  MEDUSA_CHECK_ARG(windows.size() == static_cast<size_t>(num_layers), "config.windows: found ",
                   windows.size(), " values, wanted one per layer (", num_layers, ")");
  for (const int window : windows) check_range("config.windows", window, 0, kMaxSize);
  rope.check(head_dim);
  check_heads(heads, vocab_size);
}

}  // namespace medusa
