// A backend that computes with another one and takes the time of every op, for --parts. What a
// thread waits at the ends of an op counts as that op's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "medusa/backend.h"

namespace medusa::bench {

class TimedBackend final : public Backend {
 public:
  explicit TimedBackend(std::shared_ptr<Backend> inner) : inner_(std::move(inner)) {}

  // Seconds by part since the last call.
  std::map<std::string, double> take() { return std::exchange(seconds_, {}); }

  std::string name() const override { return inner_->name(); }
  std::string detail() const override { return inner_->detail(); }
  int threads() const override { return inner_->threads(); }
  int max_tree_depth() const override { return inner_->max_tree_depth(); }
  Memory memory() const override { return inner_->memory(); }
  DType activation_dtype(DType weight_dtype) const override {
    return inner_->activation_dtype(weight_dtype);
  }
  void synchronize() override { inner_->synchronize(); }

 protected:
  std::unique_ptr<Buffer> do_allocate(int64_t num_bytes) override {
    return inner_->allocate(num_bytes);
  }
  std::unique_ptr<Weight> do_make_weight(int64_t num_outputs, int64_t num_inputs,
                                         DType dtype) override {
    return inner_->make_weight(num_outputs, num_inputs, dtype);
  }
  void do_pack(Weight& weight, int64_t first_output, TensorView src) override {
    inner_->pack(weight, first_output, src);
  }
  void do_upload(void* dst, const void* src, int64_t num_bytes) override {
    inner_->upload(dst, src, num_bytes);
  }
  void do_download(void* dst, const void* src, int64_t num_bytes) override {
    inner_->download(dst, src, num_bytes);
  }

 private:
  template <class Op>
  void timed(const char* part, const Op& op) {
    const auto start = std::chrono::steady_clock::now();
    op();
    seconds_[part] +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void do_prepare_rows(const Rows& rows, const KvCache& cache) override {
    timed("other", [&] { inner_->prepare_rows(rows, cache); });
  }
  void do_embed(TensorView tokens, const Weight& weight, float scale, TensorView out) override {
    timed("other", [&] { inner_->embed(tokens, weight, scale, out); });
  }
  void do_rms_norm(TensorView x, TensorView gain, float eps, TensorView out) override {
    timed("other", [&] { inner_->rms_norm(x, gain, eps, out); });
  }
  void do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                 TensorView out) override {
    after_o_ = accumulate;
    timed(accumulate ? "o" : "lm_head, heads",
          [&] { inner_->linear(x, weight, bias, accumulate, out); });
  }
  void do_norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                      TensorView bias, TensorView normed, TensorView out) override {
    timed(std::exchange(after_o_, false) ? "gate, up" : "qkv",
          [&] { inner_->norm_linear(x, gain, eps, weight, bias, normed, out); });
  }
  void do_gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                       TensorView bias, bool accumulate, TensorView gated,
                       TensorView out) override {
    timed("down",
          [&] { inner_->gated_linear(gate_up, activation, weight, bias, accumulate, gated, out); });
  }
  void do_rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len,
                     TensorView cos, TensorView sin) override {
    timed("rope", [&] { inner_->rope_table(rows, rope, prompt_len, cos, sin); });
  }
  void do_rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                     TensorView q_gain, TensorView k_gain, float eps, KvCache& cache, int layer,
                     TensorView q) override {
    timed("rope",
          [&] { inner_->rope_write(qkv, rows, cos, sin, q_gain, k_gain, eps, cache, layer, q); });
  }
  void do_tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                         float scale, int window, TensorView out) override {
    timed("attention", [&] { inner_->tree_attention(q, cache, layer, rows, scale, window, out); });
  }
  void do_gated_activation(TensorView gate_up, Activation activation, TensorView out) override {
    timed("other", [&] { inner_->gated_activation(gate_up, activation, out); });
  }
  void do_residual_silu(TensorView y, TensorView u, TensorView copy) override {
    timed("other", [&] { inner_->residual_silu(y, u, copy); });
  }
  void do_gather_rows(TensorView x, TensorView index, TensorView out) override {
    timed("other", [&] { inner_->gather_rows(x, index, out); });
  }
  void do_top_k(TensorView x, TensorView ids, TensorView values) override {
    timed("choose", [&] { inner_->top_k(x, ids, values); });
  }
  void do_verify(TensorView logits, std::span<const VerifyItem> items) override {
    timed("choose", [&] { inner_->verify(logits, items); });
  }
  void do_compact_kv(KvCache& cache, std::span<const KvMove> moves) override {
    timed("cache", [&] { inner_->compact_kv(cache, moves); });
  }
  void do_copy_page(KvCache& cache, int src, int dst, int num_tokens) override {
    timed("cache", [&] { inner_->copy_page(cache, src, dst, num_tokens); });
  }
  void do_read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k,
                  float* v) override {
    inner_->read_kv(cache, layer, sequence, slot, k, v);
  }

  std::shared_ptr<Backend> inner_;
  std::map<std::string, double> seconds_;
  bool after_o_ = false;  // what a layer does next is its MLP
};

}  // namespace medusa::bench
