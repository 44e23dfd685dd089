// Rotary embedding and the write of K and V: rope_table, rope_write.
//
//   rope_table   angle = f32(position * frequency[i]); cos, sin of it times attention_scaling
//   rope_write   each q and k head: x = rms_norm(x) * gain where there is a gain, then
//                  out[i] = x[i] cos[i] - x[i + half] sin[i]
//                  out[i + half] = x[i + half] cos[i] + x[i] sin[i]
//                columns from 2 half on, and V, pass; q to q, K and V to the row's slot
//
// Shapes    cos, sin [R, half] f32; qkv [R, (H + 2 Hkv) D] f32; q [R, H, D] and the cache f32 |
//           f16 | bf16; half <= D / 2, D <= 1024
// Traffic   rope_write reads qkv once from memory and once more from the first-level cache, writes
//           it once: R=64, 96 heads of 128, bf16: 3.1 + 1.6 MB, 1.1 us at 4.3 TB/s; bound by its
//           launch
// Launch    rope_table: one thread per (row, pair). rope_write: one warp per (row, head), four
//           columns to a lane, grid (R, heads / 4). A thread reads its columns and those they pair
//           with, so that no exchange is needed.
// Exact     cos and sin of the f32 angle in f64: f32 angles of large positions leave no room for
//           further error. The frequencies travel with the launch, 2 KiB of the 4 that fit, so that
//           a captured graph keeps its own.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <cstring>

#include "backend/cuda/columns.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/gpu.h"
#include "backend/cuda/layout.h"
#include "backend/cuda/reduce.h"
#include "medusa/error.h"

namespace medusa::cuda {
namespace {

constexpr int kMaxPairs = 512, kTableThreads = 128;
constexpr int kHeadsPerBlock = 4, kWriteThreads = kHeadsPerBlock * kWarp;

struct RopeArgs {
  float frequency[kMaxPairs];
  int num_pairs, original_context;
  float attention_scaling, dynamic_factor, base;
};

// Frequency of pair i at `position` of a text whose prompt has prompt_len tokens.
__device__ __forceinline__ float frequency_of(const RopeArgs& rope, int i, int32_t position,
                                              int32_t prompt_len) {
  const int64_t reached = int64_t{position} + 1;
  const int64_t length = prompt_len > reached ? prompt_len : reached;
  if (!(rope.dynamic_factor > 0) || length <= rope.original_context) return rope.frequency[i];
  const double rotary_dim = 2.0 * rope.num_pairs, factor = rope.dynamic_factor;
  const double stretch =
      factor * static_cast<double>(length) / rope.original_context - (factor - 1);
  const double base = rope.base * pow(stretch, rotary_dim / (rotary_dim - 2));
  return static_cast<float>(1.0 / pow(base, 2.0 * i / rotary_dim));
}

__global__ void __launch_bounds__(kTableThreads)
    rope_table_kernel(const __grid_constant__ RopeArgs rope, int num_rows, const int32_t* positions,
                      const int32_t* prompt_len, float* cos_out, float* sin_out) {
  begin_overlapped();
  const int64_t index = int64_t{blockIdx.x} * kTableThreads + threadIdx.x;
  const int64_t row = index / rope.num_pairs;
  if (row >= num_rows) return;
  const int32_t position = positions[row];
  const int32_t prompt = prompt_len != nullptr ? prompt_len[row] : 0;
  const float angle =
      static_cast<float>(position) *
      frequency_of(rope, static_cast<int>(index % rope.num_pairs), position, prompt);
  double sine, cosine;
  sincos(double{angle}, &sine, &cosine);
  cos_out[index] = static_cast<float>(cosine) * rope.attention_scaling;
  sin_out[index] = static_cast<float>(sine) * rope.attention_scaling;
}

struct WriteArgs {
  const float *qkv, *cos, *sin, *q_gain, *k_gain;
  const int32_t *sequence, *slot;
  int num_heads, half, layer;
  float eps;
  CacheView cache;
  bool wide;  // four columns at a time
};

// 1 / rms of a head; every lane gets it.
__device__ __forceinline__ float inverse_rms(const float* head, int size, float eps, bool wide) {
  float squares = 0.0f;
  for (int column = 4 * (static_cast<int>(threadIdx.x) % kWarp); column < size;
       column += 4 * kWarp) {
    const Quad quad = load_quad(head, column, size, wide);
#pragma unroll
    for (int i = 0; i < 4; ++i) squares = fmaf(quad.value[i], quad.value[i], squares);
  }
  return 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(size) + eps);
}

template <int kWidth>
__device__ __forceinline__ Columns<kWidth> normed(const float* head, int column, const float* gain,
                                                  float inverse) {
  Columns<kWidth> x = load_columns<kWidth>(head + column);
  if (gain == nullptr) return x;
  const Columns<kWidth> factor = load_columns<kWidth>(gain + column);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x.value[i] = x.value[i] * inverse * factor.value[i];
  return x;
}

// The warp's head, rotated where `turns`, to `to` [D].
template <class T, int kWidth>
__device__ __forceinline__ void write_head(const WriteArgs& args, const float* head, bool turns,
                                           const float* gain, T* to) {
  const int size = args.cache.head_dim, half = args.half;
  const int64_t row = blockIdx.x;
  const float* cos_row = args.cos + row * half;
  const float* sin_row = args.sin + row * half;
  const float inverse = gain != nullptr ? inverse_rms(head, size, args.eps, args.wide) : 1.0f;
  for (int column = kWidth * (static_cast<int>(threadIdx.x) % kWarp); column < size;
       column += kWidth * kWarp) {
    Columns<kWidth> x = normed<kWidth>(head, column, gain, inverse);
    if (turns && column < 2 * half) {
      const bool first = column < half;
      const int pair = first ? column : column - half;
      const Columns<kWidth> other =
          normed<kWidth>(head, first ? column + half : pair, gain, inverse);
      const Columns<kWidth> c = load_columns<kWidth>(cos_row + pair);
      const Columns<kWidth> s = load_columns<kWidth>(sin_row + pair);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float turned = other.value[i] * s.value[i];
        x.value[i] = x.value[i] * c.value[i] + (first ? -turned : turned);
      }
    }
    store_columns(to + column, x);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kWriteThreads)
    rope_write_kernel(const __grid_constant__ WriteArgs args, T* q) {
  begin_overlapped();
  const CacheView& cache = args.cache;
  const int num_heads = args.num_heads, Hkv = cache.num_kv_heads, D = cache.head_dim;
  const int all_heads = num_heads + 2 * Hkv;
  const int64_t row = blockIdx.x;
  const int index = static_cast<int>(blockIdx.y * kHeadsPerBlock + threadIdx.x / kWarp);
  if (index >= all_heads) return;  // with its whole warp

  const float* head = args.qkv + (row * all_heads + index) * D;
  if (index < num_heads) {
    write_head<T, kWidth>(args, head, true, args.q_gain, q + (row * num_heads + index) * D);
    return;
  }
  const int slot = args.slot[row], page = cache.page_of(args.sequence[row], slot);
  if (page < 0) return;
  const bool is_key = index < num_heads + Hkv;
  const int kv_head = index - num_heads - (is_key ? 0 : Hkv);
  T* block = reinterpret_cast<T*>(cache.data + cache.block(args.layer, !is_key, page, kv_head));
  write_head<T, kWidth>(args, head, is_key, is_key ? args.k_gain : nullptr,
                        block + int64_t{slot % kPageTokens} * D);
}

}  // namespace

void CudaBackend::do_rope_table(const Rows& rows, const RopeConfig& rope, TensorView prompt_len,
                                TensorView cos, TensorView sin) {
  const auto num_pairs = static_cast<int64_t>(rope.inv_freq.size());
  if (num_pairs > kMaxPairs) {
    throw UnsupportedError(concat("rope_table: ", num_pairs, " frequencies; at most ", kMaxPairs));
  }
  RopeArgs args = {};
  std::memcpy(args.frequency, rope.inv_freq.data(), rope.inv_freq.size() * sizeof(float));
  args.num_pairs = static_cast<int>(num_pairs);
  args.original_context = rope.original_context;
  args.attention_scaling = rope.attention_scaling;
  args.dynamic_factor = rope.dynamic_factor;
  args.base = rope.base;
  const int64_t blocks = (rows.num_rows * num_pairs + kTableThreads - 1) / kTableThreads;
  launch_overlapped(rope_table_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTableThreads), 0,
                    stream_.get(), args, rows.num_rows, rows.position,
                    rope.dynamic_factor > 0 ? prompt_len.as<int32_t>() : nullptr, cos.as<float>(),
                    sin.as<float>());
}

void CudaBackend::do_rope_write(TensorView qkv, const Rows& rows, TensorView cos, TensorView sin,
                                TensorView q_gain, TensorView k_gain, float eps, KvCache& cache,
                                int layer, TensorView q) {
  WriteArgs args = {};
  args.qkv = qkv.as<float>();
  args.cos = cos.as<float>();
  args.sin = sin.as<float>();
  args.q_gain = q_gain.as<float>();
  args.k_gain = k_gain.as<float>();
  args.sequence = rows.sequence;
  args.slot = rows.slot;
  args.num_heads = static_cast<int>(q.size(1));
  args.half = static_cast<int>(cos.size(1));
  args.layer = layer;
  args.eps = eps;
  args.cache = view_of(cache);
  args.wide = is_wide(qkv.data, DType::f32, cache.shape.head_dim) && is_wide(cos) && is_wide(sin) &&
              is_wide(q) && is_wide(q_gain.data, DType::f32, 4) &&
              is_wide(k_gain.data, DType::f32, 4);
  const int all_heads = args.num_heads + 2 * cache.shape.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(rows.num_rows),
                  static_cast<unsigned>((all_heads + kHeadsPerBlock - 1) / kHeadsPerBlock));
  dispatch_float(cache.shape.dtype, "rope_write", [&]<class T>() {
    launch_overlapped(args.wide ? rope_write_kernel<T, 4> : rope_write_kernel<T, 1>, grid,
                      dim3(kWriteThreads), 0, stream_.get(), args, q.as<T>());
  });
}

}  // namespace medusa::cuda
