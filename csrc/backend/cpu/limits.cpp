// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/limits.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

namespace medusa::cpu {
namespace {

// 0: not a positive number.
int64_t positive(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value > 0 ? value : 0;
}

// The first line, or what of it fits; empty where there is no such file.
std::string first_line(const char* path) {
  std::array<char, 64> text{};
  std::ifstream(path).getline(text.data(), text.size());
  return text.data();
}

int container_processors() {
  const std::string both = first_line("/sys/fs/cgroup/cpu.max");  // version 2: "QUOTA PERIOD"
  if (const size_t space = both.find(' '); space != std::string::npos) {
    const std::string_view view = both;
    return quota_processors(view.substr(0, space), view.substr(space + 1));
  }
  return quota_processors(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
                          first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
}

// 0: no limit.
int64_t container_memory() {
  const int64_t limit = positive(first_line("/sys/fs/cgroup/memory.max"));
  return limit > 0 ? limit : positive(first_line("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
}

int64_t container_memory_taken() {
  const int64_t taken = positive(first_line("/sys/fs/cgroup/memory.current"));
  return taken > 0 ? taken : positive(first_line("/sys/fs/cgroup/memory/memory.usage_in_bytes"));
}

int64_t pages_in_bytes(int name) {
  return static_cast<int64_t>(sysconf(name)) * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

int quota_processors(std::string_view quota, std::string_view period) {
  const int64_t time = positive(quota), every = positive(period);
  if (time == 0 || every == 0) return 0;
  return static_cast<int>(
      std::min<int64_t>((time - 1) / every + 1, std::numeric_limits<int>::max()));
}

int usable_processors() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) count = CPU_COUNT(&set);
#endif
  if (const int limit = container_processors(); limit > 0) count = std::min(count, limit);
  return std::max(count, 1);
}

int64_t usable_memory() {
  const int64_t physical = pages_in_bytes(_SC_PHYS_PAGES), limit = container_memory();
  return limit > 0 ? std::min(physical, limit) : physical;
}

int64_t free_memory() {
#ifdef _SC_AVPHYS_PAGES
  int64_t free = pages_in_bytes(_SC_AVPHYS_PAGES);
#else
  int64_t free = pages_in_bytes(_SC_PHYS_PAGES);
#endif
  if (const int64_t limit = container_memory(); limit > 0) {
    free = std::min(free, std::max<int64_t>(0, limit - container_memory_taken()));
  }
  return free;
}

}  // namespace medusa::cpu
