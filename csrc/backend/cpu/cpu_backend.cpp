// The backend object, and the ops that are loops over independent rows.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/cpu_backend.h"

#include <cstring>

#include "backend/cpu/choose.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/limits.h"
#include "backend/cpu/memory.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

char* row_of(const TensorView& view, int64_t row) {
  return view.as<char>() + row * view.size(1) * dtype_bytes(view.dtype);
}

}  // namespace

CpuBackend::CpuBackend(int num_threads, const std::string& isa)
    : kernels_(select_kernels(isa)), pool_(num_threads) {}

std::string CpuBackend::detail() const {
  const int count = pool_.num_threads();
  return concat(kernels_.name, ", ", count, count == 1 ? " thread" : " threads");
}

Backend::Memory CpuBackend::memory() const { return {free_memory(), usable_memory()}; }

std::unique_ptr<Buffer> CpuBackend::do_allocate(int64_t num_bytes) {
  return map_memory(num_bytes, false);
}

void CpuBackend::do_upload(void* dst, const void* src, int64_t num_bytes) {
  std::memcpy(dst, src, static_cast<size_t>(num_bytes));
}

void CpuBackend::do_download(void* dst, const void* src, int64_t num_bytes) {
  std::memcpy(dst, src, static_cast<size_t>(num_bytes));
}

void CpuBackend::do_rms_norm(TensorView x, TensorView gain, float eps, TensorView out) {
  const int64_t d = x.size(1);
  split(x.size(0), d, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels_.rms_norm(x.as<float>() + row * d, gain.as<float>(), eps, d, row_of(out, row),
                        out.dtype == DType::bf16);
    }
  });
}

void CpuBackend::do_gated_activation(TensorView gate_up, Activation activation, TensorView out) {
  const int64_t n = out.size(1);
  const Gate gate = gate_kernel(activation);
  split(out.size(0), 4 * n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* values = gate_up.as<float>() + row * 2 * n;
      gate(values, values + n, n, row_of(out, row), out.dtype == DType::bf16);
    }
  });
}

void CpuBackend::do_residual_silu(TensorView y, TensorView u, TensorView copy) {
  const int64_t d = y.size(1);
  split(y.size(0), 4 * d, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels_.residual_silu(y.as<float>() + row * d, u.as<float>() + row * d, d, row_of(copy, row),
                             copy.dtype == DType::bf16);
    }
  });
}

void CpuBackend::do_gather_rows(TensorView x, TensorView index, TensorView out) {
  const int64_t num_rows = x.size(0), d = x.size(1);
  for (int64_t i = 0; i < index.size(0); ++i) {
    const int32_t row = index.as<int32_t>()[i];
    MEDUSA_CHECK_ARG(row >= 0 && row < num_rows, "gather_rows: index[", i, "] is ", row, "; x has ",
                     num_rows, " rows");
  }
  split(index.size(0), d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      kernels_.convert(x.as<float>() + index.as<int32_t>()[i] * d, DType::f32, row_of(out, i),
                       out.dtype, d);
    }
  });
}

void CpuBackend::do_top_k(TensorView x, TensorView ids, TensorView values) {
  const int64_t n = x.size(1), k = ids.size(1);
  split(x.size(0), n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels_.top_k(x.as<float>() + row * n, n, static_cast<int>(k), ids.as<int32_t>() + row * k,
                     values.as<float>() + row * k);
    }
  });
}

void CpuBackend::do_verify(TensorView logits, std::span<const VerifyItem> items) {
  pool_.run(static_cast<int>(items.size()), [&](int item) {
    thread_local ChooseScratch scratch;
    const VerifyItem& one = items[static_cast<size_t>(item)];
    verify_tree(kernels_, logits.as<float>(), logits.size(1), one, scratch);
  });
}

}  // namespace medusa::cpu
