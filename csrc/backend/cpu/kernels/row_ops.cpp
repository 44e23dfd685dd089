// Loops over one row: RMSNorm, gated activations, a Medusa head's block, rotation, conversion.
//
// Traffic   each element is read and written once; at most about 20 flops each (exp)
// Bits      every loop starts at the row's first element: vectors and tail fall alike in every row
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/simd.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

MEDUSA_INLINE void store_as(void* out, bool bf16, int64_t i, V x, int64_t n) {
  if (bf16) {
    store_some(static_cast<Bf16*>(out) + i, x, n);
  } else {
    store_some(static_cast<float*>(out) + i, x, n);
  }
}

MEDUSA_INLINE V silu(V x) { return div(x, add(splat(1.0f), exp(sub(zero(), x)))); }

// 0.5 x (1 + tanh u) = x / (1 + e^(-2u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)
MEDUSA_INLINE V gelu_tanh(V x) {
  const V cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
  return div(x, add(splat(1.0f), exp(mul(cubic, splat(-1.59576912f)))));
}

MEDUSA_INLINE V
gelu(V x) {  // 0.5 x (1 + erf(x / sqrt 2)); erfc keeps the small values of the left tail
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = 0.5f * lane * __builtin_erfcf(lane * -0.707106781f);
  return load(lanes);
}

template <V (*act)(V)>
void gate(const float* gate, const float* up, int64_t n, void* out, bool out_bf16) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const V value = mul(act(load_some(gate + i, n - i)), load_some(up + i, n - i));
    store_as(out, out_bf16, i, value, n - i);
  }
}

template <class From, class To>
void convert_row(const void* src, void* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store_some(static_cast<To*>(dst) + i, load_some(static_cast<const From*>(src) + i, n - i),
               n - i);
  }
}

template <class From>
void convert_from(const void* src, void* dst, DType dst_dtype, int64_t n) {
  if (dst_dtype == DType::bf16) return convert_row<From, Bf16>(src, dst, n);
  if (dst_dtype == DType::f16) return convert_row<From, F16>(src, dst, n);
  convert_row<From, float>(src, dst, n);
}

}  // namespace

void rms_norm(const float* x, const float* gain, float eps, int64_t d, void* out, bool out_bf16) {
  V squares = zero();
  for (int64_t i = 0; i < d; i += kLanes) {
    const V value = load_some(x + i, d - i);
    squares = fma(value, value, squares);
  }
  const V inverse = splat(1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(d) + eps));
  for (int64_t i = 0; i < d; i += kLanes) {
    const V value = mul(mul(load_some(x + i, d - i), inverse), load_some(gain + i, d - i));
    store_as(out, out_bf16, i, value, d - i);
  }
}

void silu_gate(const float* gate_row, const float* up, int64_t n, void* out, bool out_bf16) {
  gate<silu>(gate_row, up, n, out, out_bf16);
}
void gelu_gate(const float* gate_row, const float* up, int64_t n, void* out, bool out_bf16) {
  gate<gelu>(gate_row, up, n, out, out_bf16);
}
void gelu_tanh_gate(const float* gate_row, const float* up, int64_t n, void* out, bool out_bf16) {
  gate<gelu_tanh>(gate_row, up, n, out, out_bf16);
}

void residual_silu(const float* y, float* u, int64_t n, void* copy, bool copy_bf16) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const V value = add(load_some(u + i, n - i), silu(load_some(y + i, n - i)));
    store_some(u + i, value, n - i);
    store_as(copy, copy_bf16, i, value, n - i);
  }
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void convert(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n) {
  if (src_dtype == DType::bf16) return convert_from<Bf16>(src, dst, dst_dtype, n);
  if (src_dtype == DType::f16) return convert_from<F16>(src, dst, dst_dtype, n);
  convert_from<float>(src, dst, dst_dtype, n);
}

}  // namespace medusa::cpu::MEDUSA_ISA
