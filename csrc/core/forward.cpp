// SPDX-License-Identifier: Apache-2.0
#include "core/forward.h"

#include <cmath>

#include "core/row_batch.h"
#include "medusa/error.h"

namespace medusa {
namespace {

TensorView vector_of(const std::unique_ptr<Buffer>& buffer, int64_t n) {
  return buffer ? TensorView(buffer->data(), DType::f32, n) : TensorView();
}

}  // namespace

void* Workspace::take(Backend& backend, int64_t num_bytes) {
  buffers_.push_back(backend.allocate(num_bytes));
  return buffers_.back()->data();
}

Workspace::Workspace(const Model& model, int max_rows, int max_logit_rows)
    : max_rows_(max_rows), max_logit_rows_(max_logit_rows) {
  const ModelConfig& c = model.config;
  Backend& backend = *model.backend;
  const int64_t rows = max_rows;
  const int64_t q_size = int64_t{c.num_heads} * c.head_dim;
  const int64_t qkv_size = q_size + int64_t{2} * c.num_kv_heads * c.head_dim;
  const auto rotary = static_cast<int64_t>(c.rope.inv_freq.size());
  x_ = take(backend, rows * c.hidden_size * 4);
  normed_ = take(backend, rows * c.hidden_size * 4);
  qkv_ = take(backend, rows * qkv_size * 4);
  q_ = take(backend, rows * q_size * 4);
  attention_ = take(backend, rows * q_size * 4);
  gate_up_ = take(backend, rows * 2 * c.intermediate_size * 4);
  gated_ = take(backend, rows * c.intermediate_size * 4);
  cos_ = take(backend, rows * rotary * 4);
  sin_ = take(backend, rows * rotary * 4);
  gathered_ = take(backend, rows * c.hidden_size * 4);
  hidden_ = take(backend, rows * c.hidden_size * 4);
  hidden_logit_ = take(backend, int64_t{max_logit_rows} * c.hidden_size * 4);
  logits_ = take(backend, int64_t{max_logit_rows} * c.vocab_size * 4);
  rows_ = take(backend, RowBatch::bytes(max_rows));
}

int64_t Workspace::num_bytes() const {
  int64_t total = 0;
  for (const auto& buffer : buffers_) total += buffer->num_bytes();
  return total;
}

class Pass {
 public:
  Pass(const Model& model, KvCache& cache, const PassInput& input, Workspace& workspace)
      : model_(model),
        config_(model.config),
        ops_(*model.backend),
        cache_(cache),
        input_(input),
        ws_(workspace),
        rows_(input.rows.num_rows) {
    MEDUSA_CHECK_INTERNAL(rows_ > 0 && rows_ <= ws_.max_rows(), "forward: ", rows_,
                          " rows, workspace for ", ws_.max_rows());
    MEDUSA_CHECK_INTERNAL(input.logit_rows.size(0) <= ws_.max_logit_rows(),
                          "forward: ", input.logit_rows.size(0), " logit rows, workspace for ",
                          ws_.max_logit_rows());
  }

  PassOutput run() {
    const TensorView x = view(ws_.x_, DType::f32, config_.hidden_size);
    const auto rotary = static_cast<int64_t>(config_.rope.inv_freq.size());
    const TensorView cos = view(ws_.cos_, DType::f32, rotary);
    const TensorView sin = view(ws_.sin_, DType::f32, rotary);

    const TensorView tokens(const_cast<int32_t*>(input_.rows.token), DType::i32, rows_);
    ops_.prepare_rows(input_.rows, cache_);
    ops_.embed(tokens, *model_.embedding, config_.embedding_scale, x);
    ops_.rope_table(input_.rows, config_.rope, input_.prompt_len, cos, sin);
    for (int layer = 0; layer < config_.num_layers; ++layer) {
      attention(layer, x, cos, sin);
      mlp(layer, x);
    }
    return finish(x);
  }

 private:
  DType act_of(const Weight& weight) const { return ops_.activation_dtype(weight.dtype()); }

  TensorView view(void* memory, DType dtype, int64_t columns) const {
    return {memory, dtype, rows_, columns};
  }

  void attention(int index, const TensorView& x, const TensorView& cos, const TensorView& sin) {
    const Layer& layer = model_.layers[static_cast<size_t>(index)];
    const int64_t q_size = int64_t{config_.num_heads} * config_.head_dim;
    const int64_t qkv_size = q_size + int64_t{2} * config_.num_kv_heads * config_.head_dim;
    const TensorView normed = view(ws_.normed_, act_of(*layer.qkv), config_.hidden_size);
    const TensorView qkv = view(ws_.qkv_, DType::f32, qkv_size);
    const TensorView q(ws_.q_, ops_.activation_dtype(model_.dtype), rows_, config_.num_heads,
                       config_.head_dim);
    const TensorView mixed(ws_.attention_, act_of(*layer.o), rows_, config_.num_heads,
                           config_.head_dim);
    const float scale = config_.attention_scale != 0.0f
                            ? config_.attention_scale
                            : 1.0f / std::sqrt(static_cast<float>(config_.head_dim));

    ops_.norm_linear(x, vector_of(layer.attn_norm, config_.hidden_size), config_.rms_norm_eps,
                     *layer.qkv, vector_of(layer.qkv_bias, qkv_size), normed, qkv);
    ops_.rope_write(qkv, input_.rows, cos, sin, vector_of(layer.q_norm, config_.head_dim),
                    vector_of(layer.k_norm, config_.head_dim), config_.rms_norm_eps, cache_, index,
                    q);
    ops_.tree_attention(q, cache_, index, input_.rows, scale,
                        config_.windows[static_cast<size_t>(index)], mixed);
    ops_.linear(view(ws_.attention_, act_of(*layer.o), q_size), *layer.o,
                vector_of(layer.o_bias, config_.hidden_size), true, x);
  }

  void mlp(int index, const TensorView& x) {
    const Layer& layer = model_.layers[static_cast<size_t>(index)];
    const int64_t width = config_.intermediate_size;
    const TensorView normed = view(ws_.normed_, act_of(*layer.gate_up), config_.hidden_size);
    const TensorView gate_up = view(ws_.gate_up_, DType::f32, 2 * width);
    const TensorView gated = view(ws_.gated_, act_of(*layer.down), width);

    ops_.norm_linear(x, vector_of(layer.mlp_norm, config_.hidden_size), config_.rms_norm_eps,
                     *layer.gate_up, vector_of(layer.gate_up_bias, 2 * width), normed, gate_up);
    ops_.gated_linear(gate_up, config_.activation, *layer.down,
                      vector_of(layer.down_bias, config_.hidden_size), true, gated, x);
  }

  PassOutput finish(const TensorView& x) {
    const int64_t d = config_.hidden_size;
    const int64_t num_hidden = input_.hidden_rows.size(0), num_logits = input_.logit_rows.size(0);
    PassOutput out;
    if (num_hidden == 0) return out;

    const TensorView gathered(ws_.gathered_, DType::f32, num_hidden, d);
    out.hidden = TensorView(ws_.hidden_, DType::f32, num_hidden, d);
    ops_.gather_rows(x, input_.hidden_rows, gathered);
    ops_.rms_norm(gathered, vector_of(model_.final_norm, d), config_.rms_norm_eps, out.hidden);
    if (num_logits == 0) return out;

    const TensorView wanted(ws_.hidden_logit_, act_of(model_.output()), num_logits, d);
    out.logits = TensorView(ws_.logits_, DType::f32, num_logits, config_.vocab_size);
    ops_.gather_rows(out.hidden, input_.logit_rows, wanted);
    ops_.linear(wanted, model_.output(), TensorView(), false, out.logits);
    return out;
  }

  const Model& model_;
  const ModelConfig& config_;
  Backend& ops_;
  KvCache& cache_;
  const PassInput& input_;
  Workspace& ws_;
  const int64_t rows_;
};

PassOutput forward(const Model& model, KvCache& cache, const PassInput& input,
                   Workspace& workspace) {
  return Pass(model, cache, input, workspace).run();
}

}  // namespace medusa
