// The rows of one step as they are put together on the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/forward.h"
#include "medusa/tree.h"

namespace medusa {

class RowBatch {
 public:
  int num_rows() const { return static_cast<int>(token_.size()); }

  // Tokens of a prompt at positions start, start + 1, ...; prompt_len: of the request, for dynamic
  // RoPE scaling.
  void add_chunk(int sequence, int prompt_len, std::span<const int32_t> tokens, int start) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int position = start + static_cast<int>(i);
      add(tokens[i], sequence, position, position, position + 1, AncestorBits{}, prompt_len);
    }
  }

  // A tree whose root stands at position `len`, the number of tokens in the cache. Returns the
  // root's row.
  int add_tree(int sequence, int prompt_len, const DraftTree& tree, int len) {
    const int first = num_rows();
    for (int node = 0; node < tree.num_nodes(); ++node) {
      add(tree.token(node), sequence, len + tree.depth(node), len + node, len, tree.ancestors(node),
          prompt_len);
    }
    return first;
  }

  PassInput pass_input() const {
    PassInput input;
    input.rows = {num_rows(),   token_.data(),      sequence_.data(), position_.data(),
                  slot_.data(), prefix_len_.data(), ancestors_.data()};
    input.prompt_len = prompt_len_.data();
    return input;
  }

 private:
  void add(int32_t token, int sequence, int position, int slot, int prefix_len,
           const AncestorBits& ancestors, int prompt_len) {
    token_.push_back(token);
    sequence_.push_back(sequence);
    position_.push_back(position);
    slot_.push_back(slot);
    prefix_len_.push_back(prefix_len);
    ancestors_.push_back(ancestors);
    prompt_len_.push_back(prompt_len);
  }

  std::vector<int32_t> token_, sequence_, position_, slot_, prefix_len_, prompt_len_;
  std::vector<AncestorBits> ancestors_;
};

}  // namespace medusa
