// What the products of a step fetch ahead: every weight names the one that is read after it.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/model.h"

#include <vector>

#include "check.h"
#include "tiny_model.h"

using medusa::Model;
using medusa::ModelConfig;
using medusa::Weight;

namespace {

// The weights in the order in which a step that drafts reads them.
std::vector<const Weight*> order_of(const Model& model) {
  std::vector<const Weight*> order;
  for (const medusa::Layer& layer : model.layers) {
    for (const auto* weight : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      order.push_back(weight->get());
    }
  }
  order.push_back(&model.output());
  for (const medusa::Head& head : model.heads) {
    for (const auto& block : head.blocks) order.push_back(block.get());
    if (head.lm_head) order.push_back(head.lm_head.get());
  }
  if (model.draft_lm_head) order.push_back(model.draft_lm_head.get());
  return order;
}

void check_chain(const ModelConfig& config, size_t num_weights) {
  const auto model = test::tiny_model(1, medusa::DType::f32, config);
  const std::vector<const Weight*> order = order_of(*model);
  CHECK(order.size() == num_weights);
  for (size_t i = 0; i < order.size(); ++i) {
    CHECK(order[i]->next == order[(i + 1) % order.size()]);
  }
}

}  // namespace

TEST(weights_are_chained_as_a_step_reads_them) {
  ModelConfig config = test::tiny_config();
  check_chain(config, 2 * 4 + 1 + 3);
  config.heads.head_vocab = 7;  // some rows of the model's own
  check_chain(config, 2 * 4 + 1 + 3 + 1);
  config.heads.shared_lm_head = false;
  check_chain(config, 2 * 4 + 1 + 3 * 2);
  config.heads = {};
  for (const bool tied : {true, false}) {
    config.tied_embeddings = tied;
    check_chain(config, 2 * 4 + 1);
  }
}
