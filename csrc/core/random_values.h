// Random numbers in bulk, for models and benchmarks whose values do not matter.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace medusa {

// Values about N(0, 1): each the sum of four uniform 16-bit parts of a hash of its index. The
// stream repeats after a prime number of them, so that the rows of a matrix still differ and
// gigabytes cost little more than their copy.
class NormalValues {
 public:
  explicit NormalValues(uint64_t seed) : state_(seed) {}

  // The next `count` values, each put through `convert`.
  template <class T, class Convert>
  void fill(T* out, int64_t count, Convert&& convert) {
    for (int64_t done = 0; done < count;) {
      const int64_t length = std::min(count - done, kPeriod - at_);
      ready(at_ + length);
      const float* values = block_.data() + at_;
      for (int64_t i = 0; i < length; ++i) out[done + i] = convert(values[i]);
      at_ = (at_ + length) % kPeriod;
      done += length;
    }
  }

 private:
  static constexpr int64_t kPeriod = 1048583;

  void ready(int64_t count) {
    while (static_cast<int64_t>(block_.size()) < count) block_.push_back(next());
  }

  float next() {
    state_ += 0x9E3779B97F4A7C15;  // splitmix64
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    x ^= x >> 31;
    const auto sum =
        static_cast<int>((x & 0xFFFF) + ((x >> 16) & 0xFFFF) + ((x >> 32) & 0xFFFF) + (x >> 48));
    constexpr float kStandard = 2.64289e-5f;  // 1 / the deviation of the sum: sqrt(3) / 2^16
    return static_cast<float>(sum - 2 * 0xFFFF) * kStandard;
  }

  uint64_t state_;
  int64_t at_ = 0;
  std::vector<float> block_;
};

// Cut, not rounded: random anyway.
inline uint16_t cut_bf16(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}

}  // namespace medusa
