// The public half of every op: check the arguments once, then compute. Nothing is launched for an
// empty input.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/backend.h"

#include <initializer_list>
#include <limits>
#include <set>
#include <sstream>

#include "medusa/error.h"
#include "medusa/resident.h"

namespace medusa {
namespace {

constexpr int64_t kAny = -1;
constexpr int64_t kMaxElements = int64_t{1} << 46;  // keeps every byte count far from overflow

// The view must hold one of `dtypes` and have this shape (kAny matches every size).
void check_view(const char* op, const char* name, const TensorView& view,
                std::initializer_list<DType> dtypes, std::initializer_list<int64_t> shape) {
  bool ok = view.rank == static_cast<int>(shape.size());
  int axis = 0;
  for (const int64_t wanted : shape) {
    if (!ok) break;
    ok = view.size(axis) >= 0 && (wanted == kAny || view.size(axis) == wanted);
    ++axis;
  }
  bool known = false;
  for (const DType dtype : dtypes) known = known || view.dtype == dtype;
  if (ok && known && (view.data != nullptr || view.num_elements() == 0)) return;

  std::ostringstream wanted;
  const char* separator = "";
  std::set<DType> distinct;
  for (const DType dtype : dtypes) {
    if (!distinct.insert(dtype).second) continue;
    wanted << separator << dtype_name(dtype);
    separator = "|";
  }
  separator = " [";
  for (const int64_t size : shape) {
    wanted << separator;
    size == kAny ? wanted << "any" : wanted << size;
    separator = ", ";
  }
  throw ArgumentError(concat(op, ": ", name, " is ", dtype_name(view.dtype), " ",
                             shape_string(view), ok && known ? " without data" : "", "; want ",
                             wanted.str(), "]"));
}

void check_float(const char* op, DType dtype) {
  MEDUSA_CHECK_ARG(dtype != DType::i32 && !is_block(dtype), op, ": dtype is ", dtype_name(dtype),
                   "; choose bf16, f16 or f32");
}

void check_rows(const char* op, const Rows& rows, int64_t num_rows) {
  MEDUSA_CHECK_ARG(rows.num_rows == num_rows, op, ": rows describe ", rows.num_rows,
                   " rows, the tensors hold ", num_rows);
  MEDUSA_CHECK_ARG(num_rows == 0 || (rows.sequence && rows.position && rows.slot &&
                                     rows.prefix_len && rows.ancestors),
                   op, ": rows lack sequence, position, slot, prefix_len or ancestors");
}

void check_cache(const char* op, const KvCache& cache, int layer) {
  MEDUSA_CHECK_ARG(
      cache.buffer && cache.page_table && cache.max_pages > 0 && cache.num_sequences > 0, op,
      ": the cache has no memory or no page table");
  MEDUSA_CHECK_ARG(layer >= 0 && layer < cache.shape.num_layers, op, ": layer is ", layer,
                   "; the cache has ", cache.shape.num_layers);
}

void check_sequence(const char* op, const KvCache& cache, int sequence) {
  MEDUSA_CHECK_ARG(sequence >= 0 && sequence < cache.num_sequences, op, ": sequence is ", sequence,
                   "; the page table has ", cache.num_sequences, " lines");
}

}  // namespace

std::unique_ptr<Buffer> Backend::allocate(int64_t num_bytes) {
  MEDUSA_CHECK_ARG(num_bytes >= 0, "allocate: num_bytes is ", num_bytes, "; must not be negative");
  return do_allocate(num_bytes);
}

std::unique_ptr<Weight> Backend::make_weight(int64_t num_outputs, int64_t num_inputs, DType dtype) {
  if (!is_block(dtype)) check_float("make_weight", dtype);
  MEDUSA_CHECK_ARG(num_inputs % block_elements(dtype) == 0, "make_weight: ", dtype_name(dtype),
                   " holds blocks of ", block_elements(dtype), " inputs, the weight has ",
                   num_inputs);
  MEDUSA_CHECK_ARG(num_outputs > 0 && num_inputs > 0 && num_outputs < kMaxElements / num_inputs,
                   "make_weight: shape is [", num_outputs, ", ", num_inputs,
                   "]; both must be positive and fit in memory");
  return do_make_weight(num_outputs, num_inputs, dtype);
}

void Backend::pack(Weight& weight, int64_t first_output, TensorView src) {
  const DType own = is_block(weight.dtype()) ? weight.dtype() : DType::f32;  // a block as it is
  check_view("pack", "src", src, {DType::f32, DType::f16, DType::bf16, own},
             {kAny, weight.num_inputs()});
  MEDUSA_CHECK_ARG(own != DType::q4_k || src.dtype == own, "pack: src is ", dtype_name(src.dtype),
                   "; a q4_k weight takes q4_k blocks only");
  MEDUSA_CHECK_ARG(first_output >= 0 && first_output <= weight.num_outputs() - src.size(0),
                   "pack: rows [", first_output, ", ", first_output + src.size(0),
                   ") are outside the weight's ", weight.num_outputs());
  if (src.size(0) > 0) do_pack(weight, first_output, src);
}

KvCache Backend::make_kv_cache(const KvShape& shape) {
  check_float("make_kv_cache", shape.dtype);
  constexpr int kMaxSize = 65536;  // of an axis, so that page_bytes() cannot overflow
  MEDUSA_CHECK_ARG(shape.num_layers > 0 && shape.num_layers <= kMaxSize && shape.num_kv_heads > 0 &&
                       shape.num_kv_heads <= kMaxSize,
                   "make_kv_cache: ", shape.num_layers, " layers of ", shape.num_kv_heads,
                   " heads; each must be 1 to ", kMaxSize);
  MEDUSA_CHECK_ARG(shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= 1024,
                   "make_kv_cache: head_dim is ", shape.head_dim, "; must be even, 2 to 1024");
  MEDUSA_CHECK_ARG(shape.num_pages > 0, "make_kv_cache: ", shape.num_pages,
                   " pages; must be positive");
  MEDUSA_CHECK_ARG(shape.num_pages < kMaxElements / shape.page_bytes(),
                   "make_kv_cache: ", shape.num_pages, " pages of ", shape.page_bytes(),
                   " bytes exceed the address space");
  KvCache cache;
  cache.shape = shape;
  cache.buffer = allocate(shape.num_pages * shape.page_bytes());
  return cache;
}

DType Backend::activation_dtype(DType weight_dtype) const {
  return weight_dtype == DType::bf16 ? DType::bf16 : DType::f32;
}

std::unique_ptr<Resident> Backend::make_resident(const ResidentShape& /*shape*/) { return nullptr; }

void Backend::upload(void* dst, const void* src, int64_t num_bytes) {
  MEDUSA_CHECK_ARG(num_bytes >= 0 && (num_bytes == 0 || (dst && src)), "upload: ", num_bytes,
                   " bytes from or to nowhere");
  if (num_bytes > 0) do_upload(dst, src, num_bytes);
}

void Backend::download(void* dst, const void* src, int64_t num_bytes) {
  MEDUSA_CHECK_ARG(num_bytes >= 0 && (num_bytes == 0 || (dst && src)), "download: ", num_bytes,
                   " bytes from or to nowhere");
  if (num_bytes > 0) do_download(dst, src, num_bytes);
}

void Backend::prepare_rows(const Rows& rows, const KvCache& cache) {
  check_cache("prepare_rows", cache, 0);
  check_rows("prepare_rows", rows, rows.num_rows);
  if (rows.num_rows > 0) do_prepare_rows(rows, cache);
}

void Backend::embed(TensorView tokens, const Weight& weight, float scale, TensorView out) {
  check_view("embed", "tokens", tokens, {DType::i32}, {kAny});
  check_view("embed", "out", out, {DType::f32}, {tokens.size(0), weight.num_inputs()});
  if (tokens.size(0) > 0) do_embed(tokens, weight, scale, out);
}

void Backend::rms_norm(TensorView x, TensorView gain, float eps, TensorView out) {
  check_view("rms_norm", "x", x, {DType::f32}, {kAny, kAny});
  check_view("rms_norm", "gain", gain, {DType::f32}, {x.size(1)});
  check_view("rms_norm", "out", out,
             {DType::f32, activation_dtype(DType::bf16), activation_dtype(DType::f16)},
             {x.size(0), x.size(1)});
  if (x.num_elements() > 0) do_rms_norm(x, gain, eps, out);
}

void Backend::linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                     TensorView out) {
  check_view("linear", "x", x, {activation_dtype(weight.dtype())}, {kAny, weight.num_inputs()});
  check_view("linear", "out", out, {DType::f32}, {x.size(0), weight.num_outputs()});
  if (bias.data != nullptr)
    check_view("linear", "bias", bias, {DType::f32}, {weight.num_outputs()});
  if (x.size(0) > 0) do_linear(x, weight, bias, accumulate, out);
}

void Backend::norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                          TensorView bias, TensorView normed, TensorView out) {
  const int64_t R = x.size(0), K = weight.num_inputs();
  check_view("norm_linear", "x", x, {DType::f32}, {kAny, K});
  check_view("norm_linear", "gain", gain, {DType::f32}, {K});
  check_view("norm_linear", "normed", normed, {activation_dtype(weight.dtype())}, {R, K});
  check_view("norm_linear", "out", out, {DType::f32}, {R, weight.num_outputs()});
  if (bias.data != nullptr) {
    check_view("norm_linear", "bias", bias, {DType::f32}, {weight.num_outputs()});
  }
  if (R > 0) do_norm_linear(x, gain, eps, weight, bias, normed, out);
}

void Backend::gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                           TensorView bias, bool accumulate, TensorView gated, TensorView out) {
  const int64_t R = gate_up.size(0), K = weight.num_inputs();
  check_view("gated_linear", "gate_up", gate_up, {DType::f32}, {kAny, 2 * K});
  check_view("gated_linear", "gated", gated, {activation_dtype(weight.dtype())}, {R, K});
  check_view("gated_linear", "out", out, {DType::f32}, {R, weight.num_outputs()});
  if (bias.data != nullptr) {
    check_view("gated_linear", "bias", bias, {DType::f32}, {weight.num_outputs()});
  }
  if (R > 0) do_gated_linear(gate_up, activation, weight, bias, accumulate, gated, out);
}

void Backend::do_norm_linear(TensorView x, TensorView gain, float eps, const Weight& weight,
                             TensorView bias, TensorView normed, TensorView out) {
  do_rms_norm(x, gain, eps, normed);
  do_linear(normed, weight, bias, false, out);
}

void Backend::do_gated_linear(TensorView gate_up, Activation activation, const Weight& weight,
                              TensorView bias, bool accumulate, TensorView gated, TensorView out) {
  do_gated_activation(gate_up, activation, gated);
  do_linear(gated, weight, bias, accumulate, out);
}

void Backend::rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len,
                         TensorView cos, TensorView sin) {
  const auto half = static_cast<int64_t>(rope.inv_freq.size());
  MEDUSA_CHECK_ARG(half > 0, "rope_table: inv_freq is empty; want rotary_dim / 2 frequencies");
  check_view("rope_table", "cos", cos, {DType::f32}, {rows.num_rows, half});
  check_view("rope_table", "sin", sin, {DType::f32}, {rows.num_rows, half});
  MEDUSA_CHECK_ARG(rows.num_rows == 0 || rows.position != nullptr,
                   "rope_table: rows lack position");
  if (rope.dynamic_factor > 0) {
    check_view("rope_table", "prompt_len", prompt_len, {DType::i32}, {rows.num_rows});
    MEDUSA_CHECK_ARG(rope.original_context > 0,
                     "rope_table: dynamic scaling needs original_context > 0");
  }
  if (rows.num_rows > 0) do_rope_table(rows, rope, prompt_len, cos, sin);
}

void Backend::rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                         TensorView q_gain, TensorView k_gain, float eps, KvCache& cache, int layer,
                         TensorView q) {
  const KvShape& shape = cache.shape;
  const int64_t R = rows.num_rows, D = shape.head_dim;
  check_cache("rope_write", cache, layer);
  check_view("rope_write", "q", q, {activation_dtype(shape.dtype)}, {R, kAny, D});
  check_rows("rope_write", rows, R);
  MEDUSA_CHECK_ARG(q.size(1) > 0 && q.size(1) % shape.num_kv_heads == 0, "rope_write: q has ",
                   q.size(1), " heads, the cache has ", shape.num_kv_heads,
                   "; the first must be a multiple of the second");
  check_view("rope_write", "qkv", qkv, {DType::f32}, {R, (q.size(1) + 2 * shape.num_kv_heads) * D});
  check_view("rope_write", "cos", cos, {DType::f32}, {R, kAny});
  check_view("rope_write", "sin", sin, {DType::f32}, {R, cos.size(1)});
  MEDUSA_CHECK_ARG(2 * cos.size(1) <= D, "rope_write: cos has ", cos.size(1),
                   " columns, head_dim is ", D, "; at most half of it");
  if (q_gain.data != nullptr) check_view("rope_write", "q_gain", q_gain, {DType::f32}, {D});
  if (k_gain.data != nullptr) check_view("rope_write", "k_gain", k_gain, {DType::f32}, {D});
  if (R > 0) do_rope_write(qkv, rows, cos, sin, q_gain, k_gain, eps, cache, layer, q);
}

void Backend::tree_attention(TensorView q, const KvCache& cache, int layer, const Rows& rows,
                             float scale, int window, TensorView out) {
  const KvShape& shape = cache.shape;
  check_cache("tree_attention", cache, layer);
  check_view("tree_attention", "q", q, {activation_dtype(shape.dtype)},
             {kAny, kAny, shape.head_dim});
  check_view("tree_attention", "out", out,
             {DType::f32, activation_dtype(DType::bf16), activation_dtype(DType::f16)},
             {q.size(0), q.size(1), shape.head_dim});
  check_rows("tree_attention", rows, q.size(0));
  MEDUSA_CHECK_ARG(q.size(1) > 0 && q.size(1) % shape.num_kv_heads == 0, "tree_attention: q has ",
                   q.size(1), " heads, the cache has ", shape.num_kv_heads,
                   "; the first must be a multiple of the second");
  MEDUSA_CHECK_ARG(window >= 0, "tree_attention: window is ", window,
                   "; must be 0 (all) or positive");
  if (q.size(0) > 0) do_tree_attention(q, cache, layer, rows, scale, window, out);
}

void Backend::gated_activation(TensorView gate_up, Activation activation, TensorView out) {
  check_view("gated_activation", "out", out,
             {DType::f32, activation_dtype(DType::bf16), activation_dtype(DType::f16)},
             {kAny, kAny});
  check_view("gated_activation", "gate_up", gate_up, {DType::f32}, {out.size(0), 2 * out.size(1)});
  if (out.num_elements() > 0) do_gated_activation(gate_up, activation, out);
}

void Backend::residual_silu(TensorView y, TensorView u, TensorView copy) {
  check_view("residual_silu", "y", y, {DType::f32}, {kAny, kAny});
  check_view("residual_silu", "u", u, {DType::f32}, {y.size(0), y.size(1)});
  check_view("residual_silu", "copy", copy,
             {DType::f32, activation_dtype(DType::bf16), activation_dtype(DType::f16)},
             {y.size(0), y.size(1)});
  if (y.num_elements() > 0) do_residual_silu(y, u, copy);
}

void Backend::gather_rows(TensorView x, TensorView index, TensorView out) {
  check_view("gather_rows", "x", x, {DType::f32}, {kAny, kAny});
  check_view("gather_rows", "index", index, {DType::i32}, {kAny});
  check_view("gather_rows", "out", out,
             {DType::f32, activation_dtype(DType::bf16), activation_dtype(DType::f16)},
             {index.size(0), x.size(1)});
  if (out.num_elements() > 0) do_gather_rows(x, index, out);
}

void Backend::top_k(TensorView x, TensorView ids, TensorView values) {
  check_view("top_k", "x", x, {DType::f32}, {kAny, kAny});
  check_view("top_k", "ids", ids, {DType::i32}, {x.size(0), kAny});
  check_view("top_k", "values", values, {DType::f32}, {x.size(0), ids.size(1)});
  const int64_t k = ids.size(1);
  MEDUSA_CHECK_ARG(k >= 1 && k <= 256 && k <= x.size(1), "top_k: k is ", k, " of ", x.size(1),
                   " columns; choose 1 to 256, at most the columns");
  if (x.size(0) > 0) do_top_k(x, ids, values);
}

void Backend::verify(TensorView logits, std::span<const VerifyItem> items) {
  check_view("verify", "logits", logits, {DType::f32}, {kAny, kAny});
  const int64_t vocab = logits.size(1);
  MEDUSA_CHECK_ARG(vocab > 0 && vocab <= std::numeric_limits<int32_t>::max(),
                   "verify: logits have ", vocab, " columns; want one per vocabulary id");
  for (const VerifyItem& item : items) {
    MEDUSA_CHECK_ARG(item.tree && item.sampling && item.accepted,
                     "verify: an item lacks its tree, sampling or accepted");
    MEDUSA_CHECK_ARG(
        item.first_row >= 0 && int64_t{item.first_row} + item.tree->num_nodes() <= logits.size(0),
        "verify: a tree of ", item.tree->num_nodes(), " nodes starts at row ", item.first_row,
        "; logits have ", logits.size(0), " rows");
    MEDUSA_CHECK_ARG(item.max_tokens >= 1, "verify: max_tokens is ", item.max_tokens,
                     "; want 1 or more");
    MEDUSA_CHECK_ARG(!item.tokens.empty() && item.tokens.back() == item.tree->token(0),
                     "verify: the last token of the text must be the root of its tree");
    for (int node = 0; node < item.tree->num_nodes(); ++node) {
      const int32_t token = item.tree->token(node);
      MEDUSA_CHECK_ARG(token >= 0 && token < vocab, "verify: node ", node, " holds token ", token,
                       "; the vocabulary has ", vocab);
    }
  }
  if (!items.empty()) do_verify(logits, items);
}

void Backend::compact_kv(KvCache& cache, std::span<const KvMove> moves) {
  check_cache("compact_kv", cache, 0);
  for (const KvMove& move : moves) {
    check_sequence("compact_kv", cache, move.sequence);
    MEDUSA_CHECK_ARG(move.len >= 0 && move.n >= 0 && (move.n == 0 || move.path),
                     "compact_kv: a move has len ", move.len, ", n ", move.n);
    for (int i = 0; i < move.n; ++i) {
      MEDUSA_CHECK_ARG(move.path[i] > (i == 0 ? -1 : move.path[i - 1]), "compact_kv: path[", i,
                       "] is ", move.path[i], "; a path must rise strictly");
    }
    MEDUSA_CHECK_ARG(
        move.n == 0 || (int64_t{move.len} + move.path[move.n - 1]) / kPageTokens < cache.max_pages,
        "compact_kv: slot ", int64_t{move.len} + move.path[move.n - 1],
        " is beyond the page table's ", cache.max_pages, " pages");
  }
  if (!moves.empty()) do_compact_kv(cache, moves);
}

void Backend::copy_page(KvCache& cache, int src, int dst, int num_tokens) {
  check_cache("copy_page", cache, 0);
  const int num_pages = cache.shape.num_pages;
  MEDUSA_CHECK_ARG(src >= 0 && src < num_pages && dst >= 0 && dst < num_pages && src != dst,
                   "copy_page: pages ", src, " to ", dst, "; want two of the ", num_pages);
  MEDUSA_CHECK_ARG(num_tokens >= 0 && num_tokens <= kPageTokens, "copy_page: num_tokens is ",
                   num_tokens, "; a page holds ", kPageTokens);
  if (num_tokens > 0) do_copy_page(cache, src, dst, num_tokens);
}

void Backend::read_kv(const KvCache& cache, int layer, int sequence, int slot, float* k, float* v) {
  check_cache("read_kv", cache, layer);
  check_sequence("read_kv", cache, sequence);
  MEDUSA_CHECK_ARG(slot >= 0 && slot / kPageTokens < cache.max_pages && k && v, "read_kv: slot is ",
                   slot, "; a sequence has ", cache.max_pages, " pages");
  do_read_kv(cache, layer, sequence, slot, k, v);
}

}  // namespace medusa
