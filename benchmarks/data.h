// Random numbers on the host that are exact in their type, arrays in the backend's memory, trees.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/random_values.h"
#include "medusa/backend.h"
#include "medusa/error.h"
#include "medusa/tree.h"

namespace medusa::bench {

// Toward zero; values below the least normal one become zero. |value| < 65504.
inline uint16_t cut_f16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  constexpr uint32_t kLeast = 113u << 23, kBias = 112u << 23;
  return static_cast<uint16_t>(sign | (magnitude < kLeast ? 0 : (magnitude - kBias) >> 13));
}

// The number that the element at `data`[i] is; no infinities, NaNs or subnormals in f16.
inline float element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::bf16) return std::bit_cast<float>(bits << 16);
  const uint32_t magnitude = bits & 0x7FFF;
  return std::bit_cast<float>((bits & 0x8000) << 16 |
                              (magnitude == 0 ? 0 : (magnitude << 13) + (112u << 23)));
}

// About N(0, scale^2).
class HostArray {
 public:
  HostArray(NormalValues& normal, DType dtype, int64_t count, float scale)
      : dtype_(dtype), bytes_(static_cast<size_t>(count * dtype_bytes(dtype))) {
    if (dtype == DType::f32) {
      normal.fill(reinterpret_cast<float*>(bytes_.data()), count,
                  [scale](float value) { return scale * value; });
    } else if (dtype == DType::bf16) {
      normal.fill(reinterpret_cast<uint16_t*>(bytes_.data()), count,
                  [scale](float value) { return cut_bf16(scale * value); });
    } else {
      normal.fill(reinterpret_cast<uint16_t*>(bytes_.data()), count,
                  [scale](float value) { return cut_f16(scale * value); });
    }
  }

  void* data() const { return const_cast<std::byte*>(bytes_.data()); }
  int64_t num_bytes() const { return static_cast<int64_t>(bytes_.size()); }
  float at(int64_t i) const { return element(bytes_.data(), dtype_, i); }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

class DeviceArray {
 public:
  DeviceArray(Backend& backend, const TensorView& shape) : backend_(backend), view_(shape) {
    memory_ = backend.allocate(view_.num_bytes());
    view_.data = memory_->data();
  }
  DeviceArray(Backend& backend, const TensorView& shape, const void* host)
      : DeviceArray(backend, shape) {
    backend.upload(view_.data, host, view_.num_bytes());
  }

  const TensorView& view() const { return view_; }

  // All bits set is a NaN in every type: what an op leaves out shows.
  void poison() const {
    const std::vector<uint8_t> ones(static_cast<size_t>(view_.num_bytes()), 0xFF);
    backend_.upload(view_.data, ones.data(), view_.num_bytes());
  }

  std::vector<std::byte> read() const {
    std::vector<std::byte> bytes(static_cast<size_t>(view_.num_bytes()));
    backend_.download(bytes.data(), view_.data, view_.num_bytes());
    return bytes;
  }

 private:
  Backend& backend_;
  TensorView view_;
  std::unique_ptr<Buffer> memory_;
};

// Nothing wrong is timed.
inline void check_close(const char* op, const std::string& shape, double found, double wanted,
                        double bound) {
  MEDUSA_CHECK_INTERNAL(std::abs(found - wanted) <= bound, op, " ", shape, ": found ", found,
                        ", wanted ", wanted, " within ", bound, "; nothing was timed");
}

// Random tokens below random nodes of depth at most `max_depth`; fewer nodes where the vocabulary
// is too small for them.
inline void grow_tree(DraftTree& tree, int num_nodes, int max_depth, int vocab_size,
                      std::mt19937& random) {
  std::uniform_int_distribution<int32_t> token(0, vocab_size - 1);
  for (int tries = 64 * kMaxTreeNodes; tree.num_nodes() < num_nodes && tries > 0; --tries) {
    const int parent = std::uniform_int_distribution<int>(0, tree.num_nodes() - 1)(random);
    if (tree.depth(parent) < max_depth) tree.add(parent, token(random));
  }
}

}  // namespace medusa::bench
