// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <numeric>

#include "core/forward.h"
#include "core/row_batch.h"
#include "medusa/error.h"
#include "medusa/session.h"

namespace medusa {

void score(const Model& model, std::span<const int32_t> tokens, int chunk, float* logits,
           float* hidden) {
  const ModelConfig& config = model.config;
  const auto num_tokens = static_cast<int>(tokens.size());
  MEDUSA_CHECK_ARG(!tokens.empty(), "score: no tokens given; give at least one");
  MEDUSA_CHECK_ARG(num_tokens <= config.max_context, "score: ", num_tokens,
                   " tokens given, the model's context holds ", config.max_context);
  MEDUSA_CHECK_ARG(chunk >= 1, "score: chunk is ", chunk, ", allowed is 1 or more");
  for (const int32_t token : tokens) {
    MEDUSA_CHECK_ARG(token >= 0 && token < config.vocab_size, "score: token ", token,
                     " is outside the vocabulary of ", config.vocab_size);
  }

  const int num_pages = (num_tokens + kPageTokens - 1) / kPageTokens;
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  Backend& backend = *model.backend;
  KvCache cache = backend.make_kv_cache(model.kv_shape(num_pages));
  const auto table_bytes = static_cast<int64_t>(pages.size() * sizeof(int32_t));
  const std::unique_ptr<Buffer> page_table = backend.allocate(table_bytes);
  backend.upload(page_table->data(), pages.data(), table_bytes);
  cache.page_table = static_cast<const int32_t*>(page_table->data());
  cache.num_sequences = 1;
  cache.max_pages = num_pages;

  const int max_rows = std::min(chunk, num_tokens);
  Workspace workspace(model, max_rows, logits ? max_rows : 0);
  for (int start = 0; start < num_tokens; start += max_rows) {
    const int n = std::min(max_rows, num_tokens - start);
    RowBatch rows;
    rows.add_chunk(0, num_tokens,
                   tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(n)), start);
    for (int i = 0; i < n; ++i) rows.hidden_rows.push_back(i);
    if (logits) rows.logit_rows = rows.hidden_rows;
    const PassOutput out =
        forward(model, cache, rows.upload(backend, workspace.row_memory()), workspace);
    if (logits) {
      backend.download(logits + int64_t{start} * config.vocab_size, out.logits.data,
                       out.logits.num_bytes());
    }
    if (hidden) {
      backend.download(hidden + int64_t{start} * config.hidden_size, out.hidden.data,
                       out.hidden.num_bytes());
    }
  }
}

}  // namespace medusa
