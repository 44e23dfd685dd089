// Samples and their quartiles, and the read bandwidth that memory-bound work is held against.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "backend/cpu/memory.h"

namespace medusa::bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class Samples {
 public:
  void add(double value) { values_.push_back(value); }
  size_t count() const { return values_.size(); }
  double median() const { return quantile(0.5); }
  double best() const { return quantile(0.0); }  // smallest

  // Between the two nearest samples, in proportion.
  double quantile(double q) const {
    if (values_.empty()) return 0.0;
    std::vector<double> sorted = values_;
    std::sort(sorted.begin(), sorted.end());
    const double at = q * static_cast<double>(sorted.size() - 1);
    const auto low = static_cast<size_t>(at);
    const size_t high = std::min(low + 1, sorted.size() - 1);
    return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
  }

 private:
  std::vector<double> values_;
};

// Reads an array far larger than the caches, each thread its own contiguous part, and sums it. The
// array lies on pages of the size that weights get: small ones would read slower and flatter them.
class ReadBandwidth {
 public:
  ReadBandwidth(int threads, int64_t num_bytes)
      : threads_(threads),
        memory_(cpu::map_memory(num_bytes, true)),
        words_(static_cast<uint64_t*>(memory_->data()),
               static_cast<size_t>(num_bytes) / sizeof(uint64_t)) {
    std::fill(words_.begin(), words_.end(), 1);
  }

  // Bytes per second of one pass.
  double sample() {
    const Clock::time_point start = Clock::now();
    std::vector<std::thread> pool;
    std::vector<uint64_t> sums(static_cast<size_t>(threads_));
    const size_t share = words_.size() / sums.size();
    for (size_t i = 0; i < sums.size(); ++i) {
      pool.emplace_back([this, share, i, &sums] { sums[i] = sum(&words_[i * share], share); });
    }
    for (std::thread& thread : pool) thread.join();
    const double seconds = seconds_since(start);
    for (const uint64_t value : sums) check_ += value;  // keeps the reads alive
    return static_cast<double>(share * sums.size() * sizeof(uint64_t)) / seconds;
  }

  uint64_t check() const { return check_; }

 private:
  // Independent sums, so that the additions never wait for each other and compilers vectorise.
  static uint64_t sum(const uint64_t* words, size_t count) {
    constexpr size_t kLanes = 32;
    std::array<uint64_t, kLanes> lanes{};
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += words[i + lane];
    }
    uint64_t total = 0;
    for (const uint64_t lane : lanes) total += lane;
    for (; i < count; ++i) total += words[i];
    return total;
  }

  int threads_;
  std::unique_ptr<Buffer> memory_;
  std::span<uint64_t> words_;
  uint64_t check_ = 0;
};

}  // namespace medusa::bench
