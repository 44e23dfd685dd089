// The smallest use of the C++ API: continue token ids with a model that `medusa-ext export` wrote.
//
//   generate MODEL.safetensors MAX_NEW_TOKENS ID [ID ...]
//
// Text goes to ids and back in Python: AutoTokenizer, or the tokenizer inside the exported file.
// SPDX-License-Identifier: Apache-2.0
#include <exception>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

#include "medusa/error.h"
#include "medusa/session.h"

namespace {

int parse_int(const std::string& text) {
  size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  MEDUSA_CHECK_ARG(!text.empty() && used == text.size(), "found \"", text, "\", wanted a number");
  return value;
}

void generate(const std::string& path, medusa::Request request) {
  const std::shared_ptr<medusa::Backend> backend = medusa::make_backend({});
  const std::shared_ptr<const medusa::Model> model =
      medusa::load_model(path, std::nullopt, backend);  // nullopt: as the file stores it

  // Guesses change the speed, never the ids: without heads in the file, those of prompt lookup.
  std::shared_ptr<medusa::Drafter> drafter = medusa::make_prompt_lookup_drafter({});
  if (model->config.heads.num_heads >= 2) {
    const auto tree = medusa::TreeSpec::from_paths({{0}, {1}, {2}, {0, 0}, {0, 1}, {1, 0}});
    drafter = medusa::make_medusa_drafter(model, tree);
  }

  medusa::Session session(model, drafter, {.max_batch = 1});
  request.eos_ids = model->eos_ids;
  session.submit(std::move(request));
  while (!session.idle()) {
    for (const medusa::Event& event : session.step()) {
      for (const int32_t token : event.tokens) std::cout << token << ' ' << std::flush;
    }
  }
  std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate MODEL.safetensors MAX_NEW_TOKENS ID [ID ...]\n";
    return 2;
  }
  try {
    medusa::Request request;
    request.max_new_tokens = parse_int(argv[2]);
    for (int i = 3; i < argc; ++i) request.tokens.push_back(parse_int(argv[i]));
    generate(argv[1], std::move(request));
    return 0;
  } catch (const medusa::ArgumentError& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
  }
}
