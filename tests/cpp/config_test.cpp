// ModelConfig as JSON: what is written reads back equal, and every lie is refused by name.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/config.h"

#include "check.h"
#include "medusa/error.h"
#include "tiny_model.h"

using medusa::ArgumentError;
using medusa::ModelConfig;

namespace {

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error("the JSON has no " + from);
  return text.replace(at, from.size(), to);
}

}  // namespace

TEST(json_round_trip) {
  ModelConfig config = test::tiny_config();
  config.family = "quote \" backslash \\ newline \n e-acute \xC3\xA9";
  config.rms_norm_eps = 1e-5f;
  config.activation = medusa::Activation::gelu_tanh;
  config.qk_norm = true;
  config.windows = {0, 128};
  const ModelConfig back = ModelConfig::from_json(config.to_json());
  CHECK(back.to_json() == config.to_json());
  CHECK(back.family == config.family);
  CHECK(back.rms_norm_eps == config.rms_norm_eps);
  CHECK(back.rope.inv_freq == config.rope.inv_freq);
  CHECK(back.windows == config.windows);
  CHECK(back.heads.num_heads == 3);
}

TEST(json_refuses_syntax_errors) {
  const std::string good = test::tiny_config().to_json();
  for (size_t length = 0; length < good.size(); ++length) {
    CHECK_THROWS(ArgumentError, "", ModelConfig::from_json(good.substr(0, length)));
  }
  CHECK_THROWS(ArgumentError, "", ModelConfig::from_json(good + "x"));
  CHECK_THROWS(ArgumentError, "", ModelConfig::from_json("[]"));
  CHECK_THROWS(ArgumentError, "", ModelConfig::from_json(std::string(100000, '[')));
  CHECK_THROWS(ArgumentError, "", ModelConfig::from_json(std::string("{\"a\0b\": 1}", 10)));
  CHECK_THROWS(ArgumentError, "", ModelConfig::from_json("{\"a\": \"\xC3\"}"));
}

TEST(json_refuses_wrong_members) {
  const std::string good = test::tiny_config().to_json();
  const auto with = [&](const std::string& from, const std::string& to) {
    return ModelConfig::from_json(replaced(good, from, to));
  };
  CHECK_THROWS(ArgumentError, "hidden_size", with("hidden_size", "hidden_sise"));
  CHECK_THROWS(ArgumentError, "surplus",
               with("\"vocab_size\": 61", "\"vocab_size\": 61, \"surplus\": 1"));
  CHECK_THROWS(ArgumentError, "vocab_size", with("\"vocab_size\": 61, ", ""));
  CHECK_THROWS(ArgumentError, "",
               with("\"vocab_size\": 61", "\"vocab_size\": 61, \"vocab_size\": 61"));
  CHECK_THROWS(ArgumentError, "vocab_size", with("\"vocab_size\": 61", "\"vocab_size\": \"61\""));
  CHECK_THROWS(ArgumentError, "vocab_size", with("\"vocab_size\": 61", "\"vocab_size\": 61.5"));
  CHECK_THROWS(ArgumentError, "vocab_size", with("\"vocab_size\": 61", "\"vocab_size\": 0"));
  CHECK_THROWS(ArgumentError, "vocab_size",
               with("\"vocab_size\": 61", "\"vocab_size\": 99999999999999999999"));
  CHECK_THROWS(ArgumentError, "num_heads", with("\"num_heads\": 4", "\"num_heads\": 3"));
  CHECK_THROWS(ArgumentError, "windows", with("\"windows\": [0, 0]", "\"windows\": [0]"));
  CHECK_THROWS(ArgumentError, "head_dim", with("\"head_dim\": 8", "\"head_dim\": 7"));
  CHECK_THROWS(ArgumentError, "activation", with("\"silu\"", "\"swish\""));
}
