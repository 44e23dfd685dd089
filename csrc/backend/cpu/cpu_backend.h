// The CPU backend: plain loops over layouts here, arithmetic in kernels/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/thread_pool.h"
#include "medusa/backend.h"

namespace medusa::cpu {

class CpuBackend final : public Backend {
 public:
  CpuBackend(int num_threads, const std::string& isa);

  std::string name() const override { return "cpu"; }
  std::string detail() const override;
  void synchronize() override {}  // every op has finished when it returns
  int threads() const override { return pool_.num_threads(); }
  Memory memory() const override;

 protected:
  std::unique_ptr<Buffer> do_allocate(int64_t num_bytes) override;
  std::unique_ptr<Weight> do_make_weight(int64_t num_outputs, int64_t num_inputs,
                                         DType dtype) override;
  void do_pack(Weight& weight, int64_t first_output, TensorView src) override;
  void do_upload(void* dst, const void* src, int64_t num_bytes) override;
  void do_download(void* dst, const void* src, int64_t num_bytes) override;

 private:
  void do_prepare_rows(const Rows& /*rows*/, const KvCache& /*cache*/) override {}
  void do_embed(TensorView tokens, const Weight& weight, float scale, TensorView out) override;
  void do_rms_norm(TensorView x, TensorView gain, float eps, TensorView out) override;
  void do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                 TensorView out) override;
  void do_norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                      TensorView bias, TensorView normed, TensorView out) override;
  void do_gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                       TensorView bias, bool accumulate, TensorView gated, TensorView out) override;
  void do_rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len,
                     TensorView cos, TensorView sin) override;
  void do_rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                     TensorView q_gain, TensorView k_gain, float eps, KvCache& cache, int layer,
                     TensorView q) override;
  void do_tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                         float scale, int window, TensorView out) override;
  void do_gated_activation(TensorView gate_up, Activation activation, TensorView out) override;
  void do_residual_silu(TensorView y, TensorView u, TensorView copy) override;
  void do_gather_rows(TensorView x, TensorView index, TensorView out) override;
  void do_top_k(TensorView x, TensorView ids, TensorView values) override;
  void do_verify(TensorView logits, std::span<const VerifyItem> items) override;
  void do_compact_kv(KvCache& cache, std::span<const KvMove> moves) override;
  void do_copy_page(KvCache& cache, int src, int dst, int num_tokens) override;
  void do_read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k,
                  float* v) override;

  void pack_blocks(Weight& weight, int64_t first_output, TensorView src);

  template <class Make>
  void product(int64_t num_rows, const Make& make, const Weight& weight, TensorView bias,
               bool accumulate, TensorView out);

  // One row: out [n] = act(gate [n]) * up [n], as bf16 or f32.
  using Gate = void (*)(const float*, const float*, int64_t, void*, bool);
  Gate gate_kernel(Activation activation) const {
    return activation == Activation::silu   ? kernels_.silu_gate
           : activation == Activation::gelu ? kernels_.gelu_gate
                                            : kernels_.gelu_tanh_gate;
  }

  // body(first, last) over pieces of [0, count): one piece where the whole is less than about 5 us
  // of work.
  template <class Body>
  void split(int64_t count, int64_t work_per_item, const Body& body) {
    constexpr int64_t kWorth = 4096;  // elements of work that pay for waking another thread
    const int64_t pieces =
        std::min<int64_t>({count, 4 * pool_.num_threads(), count * work_per_item / kWorth});
    if (pieces <= 1) return pool_.run(1, [&](int) { body(0, count); });
    pool_.run(static_cast<int>(pieces),
              [&](int piece) { body(count * piece / pieces, count * (piece + 1) / pieces); });
  }

  const Kernels& kernels_;
  ThreadPool pool_;
};

}  // namespace medusa::cpu
