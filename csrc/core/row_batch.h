// The rows of one step as they are put together on the host, and their way to the backend.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "core/forward.h"
#include "medusa/tree.h"

namespace medusa {

class RowBatch {
 public:
  std::vector<int32_t> hidden_rows, logit_rows;  // see PassInput

  int num_rows() const { return static_cast<int>(ancestors_.size()); }

  // Tokens of a prompt at positions start, start + 1, ...; prompt_len: of the request, for dynamic
  // RoPE scaling.
  void add_chunk(int sequence, int prompt_len, std::span<const int32_t> tokens, int start) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int position = start + static_cast<int>(i);
      add({tokens[i], sequence, position, position, position + 1, prompt_len}, AncestorBits{});
    }
  }

  // A tree whose root stands at position `len`, the number of tokens in the cache. Returns the
  // root's row.
  int add_tree(int sequence, int prompt_len, const DraftTree& tree, int len) {
    const int first = num_rows();
    for (int node = 0; node < tree.num_nodes(); ++node) {
      add({tree.token(node), sequence, len + tree.depth(node), len + node, len, prompt_len},
          tree.ancestors(node));
    }
    return first;
  }

  // Backend memory that upload() wants for this many rows.
  static int64_t bytes(int max_rows) {
    return max_rows * static_cast<int64_t>(sizeof(AncestorBits) + (kFields + 2) * sizeof(int32_t));
  }

  // Everything in one copy. `memory` is backend memory.
  PassInput upload(Backend& backend, void* memory) const {
    const size_t rows = ancestors_.size(), ancestor_bytes = rows * sizeof(AncestorBits);
    std::vector<std::byte> blob(ancestor_bytes +
                                (kFields * rows + hidden_rows.size() + logit_rows.size()) *
                                    sizeof(int32_t));
    std::byte* end = blob.data();
    const auto append = [&](const void* values, size_t num_bytes) {
      if (num_bytes > 0) std::memcpy(end, values, num_bytes);
      void* at = static_cast<std::byte*>(memory) + (end - blob.data());
      end += num_bytes;
      return at;
    };
    const auto append_ints = [&](const std::vector<int32_t>& values) {
      return TensorView(append(values.data(), values.size() * sizeof(int32_t)), DType::i32,
                        static_cast<int64_t>(values.size()));
    };
    PassInput input;
    input.rows.num_rows = num_rows();
    input.rows.ancestors = static_cast<AncestorBits*>(append(ancestors_.data(), ancestor_bytes));
    input.rows.token = append_ints(fields_[0]).as<int32_t>();
    input.rows.sequence = append_ints(fields_[1]).as<int32_t>();
    input.rows.position = append_ints(fields_[2]).as<int32_t>();
    input.rows.slot = append_ints(fields_[3]).as<int32_t>();
    input.rows.prefix_len = append_ints(fields_[4]).as<int32_t>();
    input.prompt_len = append_ints(fields_[5]);
    input.hidden_rows = append_ints(hidden_rows);
    input.logit_rows = append_ints(logit_rows);
    backend.upload(memory, blob.data(), static_cast<int64_t>(blob.size()));
    return input;
  }

 private:
  // token, sequence, position, slot, prefix_len, prompt_len
  static constexpr size_t kFields = 6;

  void add(const std::array<int32_t, kFields>& row, const AncestorBits& ancestors) {
    for (size_t i = 0; i < kFields; ++i) fields_[i].push_back(row[i]);
    ancestors_.push_back(ancestors);
  }

  std::array<std::vector<int32_t>, kFields> fields_;
  std::vector<AncestorBits> ancestors_;
};

}  // namespace medusa
