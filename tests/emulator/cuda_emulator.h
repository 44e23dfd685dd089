// The CUDA language for the host compiler: the words that kernels use, as macros and functions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/engine.h"

#undef __global__
#undef __device__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks run one after another on one thread, so one copy of a shared variable is enough. As
// thread-local variables they lie side by side, where the engine fills them with NaN before each
// block; nothing else that is linked with kernels may be thread-local. The address sanitizer has
// no red zones there, so under it they are plain statics.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define MEDUSA_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::current.dynamic_shared)

#define threadIdx (emu::current.thread)
#define blockIdx (emu::current.block)
#define blockDim (emu::current.block_size)
#define gridDim (emu::current.grid_size)
static constexpr int warpSize = 32;

// ---- barriers and fences

inline void __syncthreads(EMU_SITE) { emu::sync_threads(false, EMU_HERE); }
inline int __syncthreads_count(int predicate, EMU_SITE) {
  return emu::sync_threads(predicate != 0, EMU_HERE);
}
inline int __syncthreads_or(int predicate, EMU_SITE) {
  return emu::sync_threads(predicate != 0, EMU_HERE) > 0;
}
inline int __syncthreads_and(int predicate, EMU_SITE) {
  return emu::sync_threads(predicate == 0, EMU_HERE) == 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMU_SITE) { emu::sync_warp(mask, EMU_HERE); }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_block() { emu::fence(); }
inline void __threadfence_system() { emu::fence(); }
inline void __trap(EMU_SITE) { emu::fail("__trap()", EMU_HERE); }
inline void __nanosleep(unsigned) {}

// ---- warp operations: every lane gives a struct on its own stack, the last to arrive serves all

// They read what other fibers wrote, in an order that the thread sanitizer does not see.
#define EMU_NOT_TRACED __attribute__((no_sanitize("thread"), noinline))

namespace emu {

template <class T>
struct Shuffle {
  T value, result;
  int source;
};

template <class T>
EMU_NOT_TRACED void finish_shuffle(uint32_t mask, void* const* args) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* to = static_cast<Shuffle<T>*>(args[lane]);
    if (mask >> to->source & 1) {
      to->result = static_cast<Shuffle<T>*>(args[to->source])->value;
    } else {  // undefined on hardware
      std::memset(static_cast<void*>(&to->result), 0xFF, sizeof(T));
    }
  }
}

template <class T>
T shuffle(uint32_t mask, T value, int source, const char* what, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Shuffle<T> exchange{value, value, source};
  warp_collective(mask, what, site, &exchange, finish_shuffle<T>);
  return exchange.result;
}

struct Vote {
  uint32_t result;
  bool predicate;
};

EMU_NOT_TRACED inline void finish_vote(uint32_t mask, void* const* args) {
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && static_cast<Vote*>(args[lane])->predicate) result |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<Vote*>(args[lane])->result = result;
  }
}

template <class T>
struct Match {
  T value;
  uint32_t result;
};

template <class T>
EMU_NOT_TRACED void finish_match(uint32_t mask, void* const* args) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* own = static_cast<Match<T>*>(args[lane]);
    own->result = 0;
    for (int other = 0; other < 32; ++other) {
      if ((mask >> other & 1) && static_cast<Match<T>*>(args[other])->value == own->value) {
        own->result |= 1u << other;
      }
    }
  }
}

template <class T>
struct Reduce {
  T value, result;
  T (*combine)(T, T);
};

template <class T>
EMU_NOT_TRACED void finish_reduce(uint32_t mask, void* const* args) {
  bool first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto* own = static_cast<Reduce<T>*>(args[lane]);
    result = first ? own->value : own->combine(result, own->value);
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<Reduce<T>*>(args[lane])->result = result;
  }
}

template <class T>
T reduce(uint32_t mask, T value, T (*combine)(T, T), const char* what, Site site) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  Reduce<T> exchange{value, value, combine};
  warp_collective(mask, what, site, &exchange, finish_reduce<T>);
  return exchange.result;
}

}  // namespace emu

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMU_SITE) {
  const int first = emu::current.lane & ~(width - 1);
  return emu::shuffle(mask, value, first + (source & (width - 1)), "__shfl_sync", EMU_HERE);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, EMU_SITE) {
  const int lane = emu::current.lane, source = lane ^ lane_mask;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return emu::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync", EMU_HERE);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int lane = emu::current.lane, source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return emu::shuffle(mask, value, inside ? source : lane, "__shfl_down_sync", EMU_HERE);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int lane = emu::current.lane, source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return emu::shuffle(mask, value, inside ? source : lane, "__shfl_up_sync", EMU_HERE);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, EMU_SITE) {
  emu::Vote vote{0, predicate};
  emu::warp_collective(mask, "__ballot_sync", EMU_HERE, &vote, emu::finish_vote);
  return vote.result;
}
inline int __any_sync(uint32_t mask, bool predicate, EMU_SITE) {
  return __ballot_sync(mask, predicate, file_, line_) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate, EMU_SITE) {
  return __ballot_sync(mask, !predicate, file_, line_) == 0;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value, EMU_SITE) {
  emu::Match<T> match{value, 0};
  emu::warp_collective(mask, "__match_any_sync", EMU_HERE, &match, emu::finish_match<T>);
  return match.result;
}
template <class T>
T __reduce_add_sync(uint32_t mask, T value, EMU_SITE) {
  return emu::reduce<T>(
      mask, value, [](T a, T b) { return T(a + b); }, "__reduce_add_sync", EMU_HERE);
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value, EMU_SITE) {
  return emu::reduce<T>(
      mask, value, [](T a, T b) { return a < b ? b : a; }, "__reduce_max_sync", EMU_HERE);
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value, EMU_SITE) {
  return emu::reduce<T>(
      mask, value, [](T a, T b) { return b < a ? b : a; }, "__reduce_min_sync", EMU_HERE);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, EMU_SITE) {
  return emu::reduce<uint32_t>(
      mask, value, [](uint32_t a, uint32_t b) { return a | b; }, "__reduce_or_sync", EMU_HERE);
}
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value, EMU_SITE) {
  return emu::reduce<uint32_t>(
      mask, value, [](uint32_t a, uint32_t b) { return a & b; }, "__reduce_and_sync", EMU_HERE);
}
// All that independent thread scheduling promises.
inline uint32_t __activemask() { return 1u << emu::current.lane; }

// ---- atomics

namespace emu {

template <class T, class Change>
T atomic_change(T* address, Change change) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

}  // namespace emu

// The operand is of the type pointed to, as in CUDA's own overloads.
#define EMU_ATOMIC(name, expression)                                          \
  template <class T>                                                          \
  T name(T* address, std::type_identity_t<T> value) {                         \
    return emu::atomic_change(address, [&](T old) { return T(expression); }); \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicAnd, old& value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicExch, (static_cast<void>(old), value))
EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMU_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emu::atomic_change(address, [&](T old) { return old == compare ? value : old; });
}

// ---- loads and stores with a cache policy

#define EMU_LOAD(name)       \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldlu)
EMU_LOAD(__ldcv)
#undef EMU_LOAD
#define EMU_STORE(name)                                  \
  template <class T>                                     \
  void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
EMU_STORE(__stwb)
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwt)
#undef EMU_STORE

// ---- bits

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1) << (31 - bit);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    auto byte = static_cast<unsigned>(bytes >> 8 * (pick & 7) & 0xff);
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// ---- arithmetic

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define EMU_MIN_MAX(T)                             \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
