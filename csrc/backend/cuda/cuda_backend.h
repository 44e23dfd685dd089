// The CUDA backend: one .cu per op holds its kernels and its do_ method.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <string>

#include "backend/cuda/runtime.h"
#include "medusa/backend.h"

namespace medusa::cuda {

// Deepest tree node; attention's arithmetic is laid out for it (tree_attention.cu).
constexpr int kMaxTreeDepth = 64;

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int device);
  ~CudaBackend() override;

  std::string name() const override { return name_; }
  std::string detail() const override { return detail_; }
  int threads() const override { return 1; }
  Memory memory() const override;
  int max_tree_depth() const override { return kMaxTreeDepth; }
  DType activation_dtype(DType weight_dtype) const override { return weight_dtype; }
  std::unique_ptr<Resident> make_resident(const ResidentShape& shape) override;
  void synchronize() override;

 protected:
  std::unique_ptr<Buffer> do_allocate(int64_t num_bytes) override;
  std::unique_ptr<Weight> do_make_weight(int64_t num_outputs, int64_t num_inputs,
                                         DType dtype) override;
  void do_pack(Weight& weight, int64_t first_output, TensorView src) override;
  void do_upload(void* dst, const void* src, int64_t num_bytes) override;
  void do_download(void* dst, const void* src, int64_t num_bytes) override;

 private:
  void do_prepare_rows(const Rows& rows, const KvCache& cache) override;
  void do_embed(TensorView tokens, const Weight& weight, float scale, TensorView out) override;
  void do_rms_norm(TensorView x, TensorView gain, float eps, TensorView out) override;
  void do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                 TensorView out) override;
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

  void plan_attention(const Rows& rows, const KvCache& cache);

  int device_ = 0, num_sms_ = 1;
  int attention_group_ = 1;  // query heads per kv head, as tree_attention last had them
  std::string name_, detail_;
  Stream stream_;
  Staging staging_;
  // Of one op each; uploads of weights borrow linear_partials_.
  Scratch linear_partials_, linear_tickets_, attention_plan_, attention_partials_, top_k_parts_,
      verify_state_, verify_parts_, moves_;
};

}  // namespace medusa::cuda
