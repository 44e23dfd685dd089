// The twins of the PTX wrappers in backend/cuda/gpu.h, in the same order.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/cuda_emulator.h"

namespace emu {

inline void check_aligned16(const void* address, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) & 15) {
    fail(std::string(what) + ": address is not 16-byte aligned", site);
  }
}

struct MatrixRow {
  uint32_t* registers;
  uint16_t elements[8];
};

// A function, since a lambda would be traced.
EMU_NOT_TRACED inline uint32_t matrix_element(void* const* args, int matrix, int row, int column) {
  return static_cast<MatrixRow*>(args[8 * matrix + row])->elements[column];
}

template <bool kTranspose>
EMU_NOT_TRACED void finish_ldmatrix(uint32_t, void* const* args) {
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m) {
      const uint32_t low =
          kTranspose ? matrix_element(args, m, column, row) : matrix_element(args, m, row, column);
      const uint32_t high = kTranspose ? matrix_element(args, m, column + 1, row)
                                       : matrix_element(args, m, row, column + 1);
      static_cast<MatrixRow*>(args[lane])->registers[m] = low | high << 16;
    }
  }
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int half) {
  const auto bits = static_cast<unsigned short>(half ? pair >> 16 : pair);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(uint32_t{bits} << 16);
  return __half2float(__half_raw{bits});
}

// The sum of 16 products is rounded otherwise than on hardware, which keeps to no documented
// order; like there it is the same at every place of the tile.
template <class T>
EMU_NOT_TRACED void finish_mma(uint32_t, void* const* args) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<Product*>(args[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = half_of<T>(own->a[i], half);
      }
      for (int i = 0; i < 2; ++i) b[g][2 * t + half + 8 * i] = half_of<T>(own->b[i], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<Product*>(args[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const float* row = a[lane / 4 + 8 * (i / 2)];
      const float* column = b[2 * (lane % 4) + i % 2];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[i] += sum;
    }
  }
}

}  // namespace emu

namespace medusa::cuda {

inline void grid_dependency_wait() { *emu::current.dependency_waited = true; }

inline void grid_launch_dependents() {}

inline void cp_async16(void* shared, const void* global, bool valid = true, EMU_SITE) {
  emu::check_aligned16(shared, "cp_async16", EMU_HERE);
  emu::check_aligned16(global, "cp_async16", EMU_HERE);
  std::memset(shared, 0xFF, 16);  // whoever reads before the wait sees NaN
  emu::current.async->copies.push_back({shared, global, valid});
}

inline void cp_async_commit() {
  emu::AsyncCopies& async = *emu::current.async;
  async.group_ends.push_back(async.copies.size());
}

template <int kPending>
inline void cp_async_wait() {
  emu::AsyncCopies& async = *emu::current.async;
  if (async.group_ends.size() <= kPending) return;
  const size_t groups = async.group_ends.size() - kPending;
  const size_t count = async.group_ends[groups - 1];
  for (size_t i = 0; i < count; ++i) {
    const emu::AsyncCopy& copy = async.copies[i];
    if (copy.valid) {
      std::memcpy(copy.dst, copy.src, 16);
    } else {
      std::memset(copy.dst, 0, 16);
    }
  }
  async.copies.erase(async.copies.begin(), async.copies.begin() + static_cast<ptrdiff_t>(count));
  async.group_ends.erase(async.group_ends.begin(),
                         async.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : async.group_ends) end -= count;
}

template <bool kTranspose>
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMU_SITE) {
  emu::check_aligned16(row, "ldmatrix_x4", EMU_HERE);
  emu::MatrixRow own{r, {}};
  std::memcpy(own.elements, row, 16);  // in the lane itself, so that the sanitizers see it
  emu::warp_collective(~0u, "ldmatrix_x4", EMU_HERE, &own, emu::finish_ldmatrix<kTranspose>);
}

template <class T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emu::Product own{d, a, {b0, b1}};
  emu::warp_collective(~0u, "mma_16816", EMU_HERE, &own, emu::finish_mma<T>);
}

inline float exp2_approx(float x) {
  const auto flushed = [](float v) { return std::fpclassify(v) == FP_SUBNORMAL ? 0.0f : v; };
  return flushed(std::exp2(flushed(x)));
}

inline uint32_t take_ticket(uint32_t* counter) {
  emu::fence();
  const uint32_t old = atomicAdd(counter, 1u);
  emu::fence();
  return old;
}

inline uint64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::nanoseconds(now).count());
}

}  // namespace medusa::cuda
