// Samples and their quartiles, how ops are timed, and the bandwidth that they are held against.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <thread>
#include <vector>

#include "arguments.h"
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
  double greatest() const { return quantile(1.0); }
  double mean() const {
    return std::accumulate(values_.begin(), values_.end(), 0.0) /
           static_cast<double>(std::max<size_t>(values_.size(), 1));
  }

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

// Copies of `num_bytes` that no cache holds together.
inline int cold_copies(const Common& common, int64_t num_bytes) {
  if (common.warm) return 1;
  const int64_t wanted = int64_t{common.tiny() ? 1 : 256} << 20;
  return static_cast<int>(std::clamp<int64_t>((wanted + num_bytes - 1) / num_bytes, 1, 4096));
}

// Seconds of one op, host side included; run(i) enqueues the i-th. A sample is so many ops between
// two waits that the waits cost less than a hundredth; `waits`: the op itself waits, so it is one.
inline Samples time_op(Backend& backend, const Common& common, bool waits,
                       const std::function<void(int)>& run) {
  constexpr double kSampleSeconds = 2e-3;
  constexpr int kMaxOps = 2000;
  int next = 0;
  const auto seconds_of = [&](int ops) {
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < ops; ++i) run(next++);
    backend.synchronize();
    return seconds_since(start) / ops;
  };
  backend.synchronize();
  seconds_of(common.warm_ups);
  int ops = 1;
  if (!waits && !common.on_cpu() && !common.emulated()) {
    const double estimate = seconds_of(common.warm_ups);
    ops = std::clamp(static_cast<int>(std::ceil(kSampleSeconds / estimate)), 1, kMaxOps);
  }
  Samples samples;
  for (int i = 0; i < common.samples; ++i) samples.add(seconds_of(ops));
  return samples;
}

// Bytes per second of one pass; the best of several is the ceiling.
class Bandwidth {
 public:
  virtual ~Bandwidth() = default;
  virtual const char* kind() const = 0;
  virtual double sample() = 0;
};

// Reads an array far larger than the caches, each thread its own contiguous part, and sums it. The
// array lies on pages of the size that weights get: small ones would read slower and flatter them.
class ReadBandwidth final : public Bandwidth {
 public:
  ReadBandwidth(int threads, int64_t num_bytes)
      : threads_(threads),
        memory_(cpu::map_memory(num_bytes, true)),
        words_(static_cast<uint64_t*>(memory_->data()),
               static_cast<size_t>(num_bytes) / sizeof(uint64_t)) {
    std::fill(words_.begin(), words_.end(), 1);
  }

  const char* kind() const override { return "read"; }

  double sample() override {
    const Clock::time_point start = Clock::now();
    std::vector<std::thread> pool;
    std::vector<uint64_t> sums(static_cast<size_t>(threads_));
    const size_t share = words_.size() / sums.size();
    for (size_t i = 0; i < sums.size(); ++i) {
      pool.emplace_back([this, share, i, &sums] { sums[i] = sum(&words_[i * share], share); });
    }
    for (std::thread& thread : pool) thread.join();
    const double seconds = seconds_since(start);
    bool read = true;  // keeps the reads alive
    for (const uint64_t value : sums) read = read && value == share;
    return read ? static_cast<double>(share * sums.size() * sizeof(uint64_t)) / seconds : 0.0;
  }

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
};

// Copies a page of the cache, all layers, to and fro in the device's memory; read and written bytes
// count.
class CopyBandwidth final : public Bandwidth {
 public:
  CopyBandwidth(Backend& backend, bool small) : backend_(backend) {
    const KvShape shape{small ? 2 : 128, small ? 2 : 64, 128, DType::bf16, 2};
    cache_ = backend.make_kv_cache(shape);  // 256 MiB a page
    page_table_ = backend.allocate(sizeof(int32_t));
    cache_.page_table = static_cast<const int32_t*>(page_table_->data());
    cache_.num_sequences = cache_.max_pages = 1;
  }

  const char* kind() const override { return "copy"; }

  double sample() override {
    constexpr int kCopies = 4;
    backend_.synchronize();
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < kCopies; ++i) backend_.copy_page(cache_, i % 2, 1 - i % 2, kPageTokens);
    backend_.synchronize();
    return 2.0 * kCopies * static_cast<double>(cache_.shape.page_bytes()) / seconds_since(start);
  }

 private:
  Backend& backend_;
  KvCache cache_;
  std::unique_ptr<Buffer> page_table_;
};

inline std::unique_ptr<Bandwidth> make_bandwidth(Backend& backend, const Common& common) {
  constexpr int64_t kArrayBytes = int64_t{512} << 20;
  if (!common.on_cpu()) return std::make_unique<CopyBandwidth>(backend, common.emulated());
  return std::make_unique<ReadBandwidth>(backend.threads(), kArrayBytes);
}

}  // namespace medusa::bench
