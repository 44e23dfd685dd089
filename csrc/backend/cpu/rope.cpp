// Rotary embedding and the write of K and V: rope_table, rope_write.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstring>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/layout.h"
#include "backend/cpu/memory.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

// Frequency of pair i at `position` of a text whose prompt has prompt_len tokens.
float frequency(const RopeConfig& rope, size_t i, int32_t position, int32_t prompt_len) {
  const int64_t length = std::max<int64_t>(prompt_len, int64_t{position} + 1);
  if (!(rope.dynamic_factor > 0) || length <= rope.original_context) return rope.inv_freq[i];
  const double rotary_dim = 2.0 * static_cast<double>(rope.inv_freq.size());
  const double factor = rope.dynamic_factor;
  const double stretch =
      factor * static_cast<double>(length) / rope.original_context - (factor - 1);
  const double base = rope.base * std::pow(stretch, rotary_dim / (rotary_dim - 2));
  return static_cast<float>(1.0 / std::pow(base, 2.0 * static_cast<double>(i) / rotary_dim));
}

}  // namespace

// The angle is an f32 product, as transformers computes it; cos and sin are those of that angle,
// correctly rounded but for rare ties, since f32 angles of large positions leave no room for
// further error.
void CpuBackend::do_rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len,
                               TensorView cos, TensorView sin) {
  const auto half = static_cast<int64_t>(rope.inv_freq.size());
  split(rows.num_rows, 64 * half, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int32_t position = rows.position[row];
      const int32_t prompt = rope.dynamic_factor > 0 ? prompt_len.as<int32_t>()[row] : 0;
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position) *
                            frequency(rope, static_cast<size_t>(i), position, prompt);
        cos.as<float>()[row * half + i] =
            static_cast<float>(std::cos(double{angle})) * rope.attention_scaling;
        sin.as<float>()[row * half + i] =
            static_cast<float>(std::sin(double{angle})) * rope.attention_scaling;
      }
    }
  });
}

// Traffic: qkv once, q once, one slot of K and V for every row; K is written with a stride (a lane
// of its block is a key). Two rows never share a slot, so threads never write the same bytes.
void CpuBackend::do_rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                               TensorView q_gain, TensorView k_gain, float eps, KvCache& cache,
                               int layer, TensorView q) {
  const int64_t H = q.size(1), Hkv = cache.shape.num_kv_heads, D = cache.shape.head_dim,
                half = cos.size(1);
  const DType dtype = cache.shape.dtype;
  const int64_t bytes = dtype_bytes(dtype), pair = pair_of(dtype);
  for (int row = 0; row < rows.num_rows; ++row) {
    const int32_t sequence = rows.sequence[row], slot = rows.slot[row];
    MEDUSA_CHECK_ARG(sequence >= 0 && sequence < cache.num_sequences && slot >= 0 &&
                         slot / kPage < cache.max_pages,
                     "rope_write: row ", row, " has sequence ", sequence, ", slot ", slot,
                     "; the page table has ", cache.num_sequences, " lines of ", cache.max_pages,
                     " pages");
    const int32_t page = cache.page_table[int64_t{sequence} * cache.max_pages + slot / kPage];
    MEDUSA_CHECK_ARG(page >= 0 && page < cache.shape.num_pages, "rope_write: row ", row,
                     " writes slot ", slot, " of sequence ", sequence, " to page ", page,
                     "; the cache has ", cache.shape.num_pages);
  }
  split(rows.num_rows, 4 * qkv.size(1), [&](int64_t first, int64_t last) {
    thread_local std::vector<float> head_values;
    float* head = at_least(head_values, 2 * D);  // a head, and the same in the cache's type
    auto* rounded = reinterpret_cast<char*>(head + D);
    for (int64_t row = first; row < last; ++row) {
      const float* from = qkv.as<float>() + row * qkv.size(1);
      const float *row_cos = cos.as<float>() + row * half, *row_sin = sin.as<float>() + row * half;
      const auto turn = [&](const float* values, const TensorView& gain) {
        if (gain.data != nullptr) {
          kernels_.rms_norm(values, gain.as<float>(), eps, D, head, false);
        } else {
          std::memcpy(head, values, static_cast<size_t>(D) * sizeof(float));
        }
        kernels_.rotate(head, row_cos, row_sin, half);
      };
      for (int64_t h = 0; h < H; ++h, from += D) {
        turn(from, q_gain);
        kernels_.convert(head, DType::f32, q.as<char>() + (row * H + h) * D * dtype_bytes(q.dtype),
                         q.dtype, D);
      }

      const int32_t slot = rows.slot[row] % kPage;
      const int32_t page =
          cache.page_table[int64_t{rows.sequence[row]} * cache.max_pages + rows.slot[row] / kPage];
      for (int64_t h = 0; h < Hkv; ++h, from += D) {
        turn(from, k_gain);
        kernels_.convert(head, DType::f32, rounded, dtype, D);
        char* keys = cache_block(cache, layer, 0, page, h) + slot * pair * bytes;
        for (int64_t d = 0; d < D; d += pair) {
          std::memcpy(keys + d * kPage * bytes, rounded + d * bytes,
                      static_cast<size_t>(pair * bytes));
        }
        char* value = cache_block(cache, layer, 1, page, h) + slot * D * bytes;
        kernels_.convert(from + Hkv * D, DType::f32, value, dtype, D);
      }
    }
  });
}

}  // namespace medusa::cpu
