// The only list of ops, and the only place an op's contract is written. The public method checks
// its arguments (core/backend.cpp); the private do_ method computes. Ops run in call order on the
// backend's queue; synchronize() waits for them. Every pointer that an op takes (TensorView, Rows,
// page table) is backend memory unless marked host; on the CPU the two are one. What every op
// promises: the bits of a row depend on that row's inputs alone, not on the rows beside it, their
// number, the tree, the batch or the number of threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "medusa/config.h"
#include "medusa/sampling.h"
#include "medusa/tensor.h"
#include "medusa/tree.h"

namespace medusa {

constexpr int kPageTokens = 64;

// Memory of one role (weights, cache, workspace), committed by the system as it is touched.
class Buffer {
 public:
  virtual ~Buffer() = default;
  void* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }

 protected:
  void* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

// A matrix [N, K] in the layout that the backend's product streams. Opaque outside the backend.
class Weight {
 public:
  virtual ~Weight() = default;
  int64_t num_outputs() const { return num_outputs_; }  // N
  int64_t num_inputs() const { return num_inputs_; }    // K
  DType dtype() const { return dtype_; }
  virtual int64_t num_bytes() const = 0;

  // The weight that a step most likely multiplies by after this one, so that it may be fetched
  // ahead; null: unknown. A hint: it changes no result, but must point to nothing that is gone.
  const Weight* next = nullptr;

 protected:
  int64_t num_outputs_ = 0, num_inputs_ = 0;
  DType dtype_ = DType::f32;
};

// R ragged rows of one step: chunks of prompts and trees of several sequences side by side.
// Row r sees the slots [0, prefix_len) and the slots prefix_len + j for each bit j of its ancestors
// (itself included), in that order; that order is the logical one: prefix_len + popcount(ancestors)
// == position + 1. A row of a prompt chunk has slot == position, prefix_len == position + 1 and no
// ancestor bits. Rows of one sequence are adjacent.
struct Rows {
  int num_rows = 0;
  const int32_t* token = nullptr;           // [R]
  const int32_t* sequence = nullptr;        // [R] line of the page table
  const int32_t* position = nullptr;        // [R] logical position
  const int32_t* slot = nullptr;            // [R] of its K and V, from the sequence's start
  const int32_t* prefix_len = nullptr;      // [R]
  const AncestorBits* ancestors = nullptr;  // [R]
};

struct KvShape {
  int num_layers = 0, num_kv_heads = 0, head_dim = 0;
  DType dtype = DType::f32;
  int num_pages = 0;
  int64_t page_bytes() const {  // K and V of one page, all layers
    return int64_t{2} * num_layers * num_kv_heads * kPageTokens * head_dim * dtype_bytes(dtype);
  }
};

// Paged cache [layer][K|V][page][kv_head][64 * D]; the order inside a (page, head) block is the
// backend's own.
struct KvCache {
  KvShape shape;
  std::unique_ptr<Buffer> buffer;
  const int32_t* page_table = nullptr;  // [sequences, max_pages]; slot s: [s / 64]
  int num_sequences = 0;                // lines of the page table
  int max_pages = 0;                    // per sequence
};

struct KvMove {  // host; row(len + i) = row(len + path[i]) for i in [0, n)
  int32_t sequence = 0, len = 0, n = 0;
  const int32_t* path = nullptr;  // strictly increasing
};

struct VerifyItem {  // host; one sequence's tree and the logits that judge it
  const DraftTree* tree = nullptr;
  int first_row = 0;  // row first_row + v of the logits is node v
  const SamplingParams* sampling = nullptr;
  std::span<const int32_t> tokens;  // prompt and all emitted tokens; the last one is the root
  std::span<const int32_t> eos_ids;
  int max_tokens = 1;            // emit no more than this, >= 1
  Accepted* accepted = nullptr;  // out; cut after the first end-of-sequence token
};

class Resident;
struct ResidentShape;

// One caller at a time: two Sessions of one model may not step in two threads.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;    // "cpu"
  virtual std::string detail() const = 0;  // "avx512, 2 threads"
  virtual int threads() const = 0;         // 1 on a device that has its own
  // Deepest tree node (the root has 0) that keeps its bits; no deeper one may be given.
  virtual int max_tree_depth() const { return kMaxTreeNodes - 1; }
  struct Memory {
    int64_t free = 0, total = 0;  // bytes: what nobody has taken now, and all there is
  };
  virtual Memory memory() const = 0;
  // Element type in which `linear` wants its input for this weight type, and attention its queries
  // for this cache type: the "act" of the ops below is any of them.
  virtual DType activation_dtype(DType weight_dtype) const;
  virtual void synchronize() = 0;
  // Null where the backend needs the host between steps; see medusa/resident.h.
  virtual std::unique_ptr<Resident> make_resident(const ResidentShape& shape);

  // Host to backend memory, in call order; src may change on return.
  void upload(void* dst, const void* src, int64_t num_bytes);
  // Backend to host memory, after all earlier ops; waits.
  void download(void* dst, const void* src, int64_t num_bytes);
  std::unique_ptr<Buffer> allocate(int64_t num_bytes);  // zero-filled, 64-byte aligned; OutOfMemory
  // An empty [N, K] matrix stored as `dtype`; fill every row with pack(). UnsupportedError where
  // the backend has no product for the type.
  std::unique_ptr<Weight> make_weight(int64_t num_outputs, int64_t num_inputs, DType dtype);
  // Rows [first_output, first_output + src.size(0)) = src [n, K] (f32 | f16 | bf16, host), rounded
  // to nearest even; into a block type quantised as GGUF defines it (q4_k is not), or the weight's
  // own blocks, taken as they are.
  void pack(Weight& weight, int64_t first_output, TensorView src);
  KvCache make_kv_cache(const KvShape& shape);

  // Call after the rows or the page table were written, before rope_write and tree_attention get
  // these rows: a device plans its work here, once for all layers.
  void prepare_rows(const Rows& rows, const KvCache& cache);

  // out [R, d] f32 = scale * weight[tokens[r], :].  weight [V, d]; tokens [R] i32, each in [0, V).
  void embed(TensorView tokens, const Weight& weight, float scale, TensorView out);

  // out [R, d] f32 | act = x * rsqrt(mean(x^2) + eps) * gain.   x [R, d] f32, gain [d] f32
  void rms_norm(TensorView x, TensorView gain, float eps, TensorView out);

  // out [R, N] f32 = (accumulate ? out : 0) + x W^T + bias.   x [R, K] activation_dtype(W), bias
  // [N] f32 or null. One fixed order over K for every (row, output), whatever R is; f32 sums.
  void linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate, TensorView out);

  // linear(rms_norm(x, gain, eps)), bit for bit; normed [R, K] activation_dtype(W) may be used as
  // scratch. A backend may do both in one pass.
  void norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight, TensorView bias,
                   TensorView normed, TensorView out);

  // linear(gated_activation(gate_up)), bit for bit; gated [R, K] activation_dtype(W) may be used as
  // scratch.
  void gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                    TensorView bias, bool accumulate, TensorView gated, TensorView out);

  // cos, sin [R, rotary_dim / 2] f32 at each row's position. prompt_len [R] i32 is read by dynamic
  // scaling only.
  void rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len, TensorView cos,
                  TensorView sin);

  // Splits qkv [R, (H + 2 Hkv) D] f32, norms q and k heads (gains [D] f32, or null), rotates them,
  // writes q [R, H, D] (activation dtype of the cache's dtype) and puts K and V into the cache at
  // each row's slot, rounded to the cache's dtype.
  void rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                  TensorView q_gain, TensorView k_gain, float eps, KvCache& cache, int layer,
                  TensorView q);

  // Attention of each row over what it sees (struct Rows), scale * q.k, softmax and sums in f32.
  // q [R, H, D] as rope_write left it; out [R, H, D] f32 | act. window: row at p sees positions >
  // p - window; 0: all.
  void tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows, float scale,
                      int window, TensorView out);

  // out [R, F] f32 | act = act(gate) * up.   gate_up [R, 2F] f32, gate first
  void gated_activation(TensorView gate_up, Activation activation, TensorView out);

  // u [R, d] f32 += silu(y [R, d] f32); copy [R, d] f32 | act = u. The block of a Medusa head.
  void residual_silu(TensorView y, TensorView u, TensorView copy);

  // out [n, d] = x[index[i], :], converting f32 to out's dtype (f32 | act).   index [n] i32
  void gather_rows(TensorView x, TensorView index, TensorView out);

  // ids, values [R, k]: the k greatest of each row of x [R, V] f32, ties to the lower id, in
  // falling order. k <= 256.
  void top_k(TensorView x, TensorView ids, TensorView values);

  // Walks each tree along the model's own choices (exact), or takes the deepest typical path.
  // logits [N, V] f32; waits.
  void verify(TensorView logits, std::span<const VerifyItem> items);

  // Accepted rows slide down to the end of the committed cache, all layers, K and V.
  void compact_kv(KvCache& cache, std::span<const KvMove> moves);

  // The first num_tokens slots of page src to page dst, all layers.
  void copy_page(KvCache& cache, int src, int dst, int num_tokens);

  // K and V [Hkv, D] f32 (host) of one slot, whatever the cache's layout: for tests. Waits.
  void read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k, float* v);

 protected:
  virtual std::unique_ptr<Buffer> do_allocate(int64_t num_bytes) = 0;
  virtual std::unique_ptr<Weight> do_make_weight(int64_t num_outputs, int64_t num_inputs,
                                                 DType dtype) = 0;
  virtual void do_pack(Weight& weight, int64_t first_output, TensorView src) = 0;
  virtual void do_upload(void* dst, const void* src, int64_t num_bytes) = 0;
  virtual void do_download(void* dst, const void* src, int64_t num_bytes) = 0;

 private:
  virtual void do_prepare_rows(const Rows& rows, const KvCache& cache) = 0;
  virtual void do_embed(TensorView tokens, const Weight& weight, float scale, TensorView out) = 0;
  virtual void do_rms_norm(TensorView x, TensorView gain, float eps, TensorView out) = 0;
  virtual void do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                         TensorView out) = 0;
  virtual void do_norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                              TensorView bias, TensorView normed, TensorView out);
  virtual void do_gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                               TensorView bias, bool accumulate, TensorView gated, TensorView out);
  virtual void do_rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len,
                             TensorView cos, TensorView sin) = 0;
  virtual void do_rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                             TensorView q_gain, TensorView k_gain, float eps, KvCache& cache,
                             int layer, TensorView q) = 0;
  virtual void do_tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                                 float scale, int window, TensorView out) = 0;
  virtual void do_gated_activation(TensorView gate_up, Activation activation, TensorView out) = 0;
  virtual void do_residual_silu(TensorView y, TensorView u, TensorView copy) = 0;
  virtual void do_gather_rows(TensorView x, TensorView index, TensorView out) = 0;
  virtual void do_top_k(TensorView x, TensorView ids, TensorView values) = 0;
  virtual void do_verify(TensorView logits, std::span<const VerifyItem> items) = 0;
  virtual void do_compact_kv(KvCache& cache, std::span<const KvMove> moves) = 0;
  virtual void do_copy_page(KvCache& cache, int src, int dst, int num_tokens) = 0;
  virtual void do_read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k,
                          float* v) = 0;
};

struct BackendOptions {
  std::string device = "cpu";  // "cpu" | "cuda" | "cuda:N" | "auto" (cuda where it can be used)
  int threads = 0;             // 0: all processors this process may use
  std::string isa;             // "" picks the best; "generic" | "avx2" | "avx512"
};

std::shared_ptr<Backend> make_backend(const BackendOptions& options);

// What make_backend takes here, "cpu" first: "cuda" where this build has it and a device is there.
std::vector<std::string> available_devices();

// CPU instruction sets that this build has and this machine runs, slowest first.
std::vector<std::string> available_isas();

}  // namespace medusa
