// SPDX-License-Identifier: Apache-2.0
#include "core/head_runner.h"

#include <algorithm>

#include "medusa/error.h"
#include "medusa/session.h"

namespace medusa {
namespace {

constexpr int64_t kRankedAtOnce = 64;  // rows of head_candidates(), so that their logits stay small

}  // namespace

HeadRunner::HeadRunner(std::shared_ptr<const Model> model)
    : model_(std::move(model)), ops_(*model_->backend) {
  const HeadsConfig& heads = model_->config.heads;
  MEDUSA_CHECK_ARG(heads.num_heads > 0, "Medusa heads: the model has no heads");
  const Head& first = model_->heads.front();
  for (const Head& head : model_->heads) {
    bool same = !head.lm_head || head.lm_head->dtype() == first.lm_head->dtype();
    for (const auto& block : head.blocks) same &= block->dtype() == first.blocks[0]->dtype();
    MEDUSA_CHECK_ARG(same, "Medusa heads: the heads are stored in different types");
  }
  head_vocab_ = heads.head_vocab > 0 ? heads.head_vocab : model_->config.vocab_size;
}

void* HeadRunner::memory(std::unique_ptr<Buffer>& buffer, int64_t num_bytes) {
  if (!buffer || buffer->num_bytes() < num_bytes) {
    if (buffer && recorded_) outgrown_.push_back(std::move(buffer));
    buffer.reset();  // before more is taken
    buffer = ops_.allocate(num_bytes);
  }
  return buffer->data();
}

HeadRunner::Candidates HeadRunner::run(TensorView hidden, int depth, int width) {
  recorded_ = true;
  return compute(hidden, depth, width);
}

HeadRunner::Candidates HeadRunner::compute(TensorView hidden, int depth, int width) {
  const int64_t batch = hidden.size(0), d = hidden.size(1);
  const int64_t rows = batch * depth;
  // Blocks of heads and what follows them may be stored in different types.
  const Head& first = model_->heads.front();
  const Weight& output = first.lm_head ? *first.lm_head : model_->draft_output();
  const DType act_out = ops_.activation_dtype(output.dtype());
  const DType act =
      first.blocks.empty() ? act_out : ops_.activation_dtype(first.blocks.front()->dtype());
  auto* u = static_cast<float*>(memory(u_, rows * d * 4));
  auto* y = static_cast<float*>(memory(y_, batch * d * 4));
  auto* normed = static_cast<std::byte*>(memory(copy_, rows * d * dtype_bytes(act)));
  auto* last = act == act_out
                   ? normed
                   : static_cast<std::byte*>(memory(last_, rows * d * dtype_bytes(act_out)));
  auto* logits = static_cast<float*>(memory(logits_, rows * head_vocab_ * 4));
  auto* found_ids = static_cast<int32_t*>(memory(ids_, rows * width * 4));
  auto* found_values = static_cast<float*>(memory(values_, rows * width * 4));
  const TensorView index = repeated(batch, rows);
  ops_.gather_rows(hidden, index, TensorView(u, DType::f32, rows, d));
  ops_.gather_rows(hidden, index, TensorView(normed, act, rows, d));
  for (int head = 0; head < depth; ++head) {
    const TensorView state(u + head * batch * d, DType::f32, batch, d);
    const TensorView update(y, DType::f32, batch, d);
    const TensorView copy(normed + head * batch * d * dtype_bytes(act), act, batch, d);
    const TensorView done(last + head * batch * d * dtype_bytes(act_out), act_out, batch, d);
    const Head& weights = model_->heads[static_cast<size_t>(head)];
    for (size_t layer = 0; layer < weights.blocks.size(); ++layer) {
      const TensorView bias(weights.biases[layer]->data(), DType::f32, d);
      ops_.linear(copy, *weights.blocks[layer], bias, false, update);
      ops_.residual_silu(update, state, layer + 1 == weights.blocks.size() ? done : copy);
    }
    if (weights.lm_head) {
      ops_.linear(done, *weights.lm_head, TensorView(), false,
                  TensorView(logits + head * batch * head_vocab_, DType::f32, batch, head_vocab_));
    }
  }
  if (model_->config.heads.shared_lm_head) {
    // All heads in one product: the shared matrix is read once.
    ops_.linear(TensorView(last, act_out, rows, d), model_->draft_output(), TensorView(), false,
                TensorView(logits, DType::f32, rows, head_vocab_));
  }
  const Candidates found{{found_ids, DType::i32, rows, width},
                         {found_values, DType::f32, rows, width}};
  ops_.top_k(TensorView(logits, DType::f32, rows, head_vocab_), found.ids, found.values);
  return found;
}

// 0, 1, ..., batch - 1, 0, 1, ... in backend memory. One piece for each batch, since recorded
// steps of several batches live side by side.
TensorView HeadRunner::repeated(int64_t batch, int64_t rows) {
  std::unique_ptr<Buffer>& index = indices_[batch];
  if (!index || index->num_bytes() < rows * 4) {
    std::vector<int32_t> all(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i)
      all[static_cast<size_t>(i)] = static_cast<int32_t>(i % batch);
    ops_.upload(memory(index, rows * 4), all.data(), rows * 4);
  }
  return {index->data(), DType::i32, rows};
}

void HeadRunner::read(const std::vector<const float*>& hidden, int depth, int width) {
  const int64_t d = model_->config.hidden_size;
  const auto batch = static_cast<int64_t>(hidden.size());
  auto* rows = static_cast<float*>(memory(hidden_, batch * d * 4));
  for (int64_t b = 0; b < batch; ++b) {
    ops_.upload(rows + b * d, hidden[static_cast<size_t>(b)], d * 4);
  }
  const Candidates found = compute(TensorView(rows, DType::f32, batch, d), depth, width);
  ids.resize(static_cast<size_t>(batch * depth * width));
  values.resize(ids.size());
  ops_.download(ids.data(), found.ids.data, found.ids.num_bytes());
  ops_.download(values.data(), found.values.data, found.values.num_bytes());
  for (int32_t& id : ids) {
    if (!model_->token_map.empty()) id = model_->token_map[static_cast<size_t>(id)];
  }
}

void head_candidates(std::shared_ptr<const Model> model, const float* hidden, int64_t num_rows,
                     int width, int32_t* ids, float* logits) {
  HeadRunner runner(std::move(model));
  const int most = std::min(runner.vocab_size(), kMaxTreeNodes), depth = runner.num_heads();
  MEDUSA_CHECK_ARG(width >= 1 && width <= most, "head candidates: ", width,
                   " are wanted of each head, allowed is 1 to ", most);
  const int64_t d = runner.model().config.hidden_size;
  for (int64_t start = 0; start < num_rows; start += kRankedAtOnce) {
    const int64_t n = std::min(kRankedAtOnce, num_rows - start);
    std::vector<const float*> rows;
    for (int64_t i = 0; i < n; ++i) rows.push_back(hidden + (start + i) * d);
    runner.read(rows, depth, width);
    for (int head = 0; head < depth; ++head) {
      const int64_t from = head * n * width, to = (head * num_rows + start) * width;
      std::copy_n(runner.ids.data() + from, n * width, ids + to);
      std::copy_n(runner.values.data() + from, n * width, logits + to);
    }
  }
}

}  // namespace medusa
