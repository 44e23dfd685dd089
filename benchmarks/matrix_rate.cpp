// SPDX-License-Identifier: Apache-2.0
#include "matrix_rate.h"

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "measure.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace medusa::bench {
namespace {

#if defined(__x86_64__)

constexpr int kChains = 12;  // sums that do not wait for each other: 2 pipes of 4 or 5 cycles
constexpr int64_t kRounds = 4'000'000;
constexpr int kPasses = 5;

// Each adds to kChains sums kRounds times and returns what came of it, so that it must be done.
// Inputs come from memory that the compiler cannot see through.
volatile float g_input = 1e-3f;

__attribute__((target("avx512f"))) float fma_512() {
  const __m512 a = _mm512_set1_ps(g_input), b = _mm512_set1_ps(g_input);
  __m512 sums[kChains];
  for (auto& sum : sums) sum = a;
  for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_fmadd_ps(a, b, sums[c]);
  }
  __m512 total = sums[0];
  for (int c = 1; c < kChains; ++c) total = _mm512_add_ps(total, sums[c]);
  return _mm512_cvtss_f32(total);
}

__attribute__((target("avx512f,avx512bf16"))) float bf16_512() {
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_ps(g_input));
  __m512 sums[kChains];
  for (auto& sum : sums) sum = _mm512_set1_ps(g_input);
  for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], a, a);
  }
  __m512 total = sums[0];
  for (int c = 1; c < kChains; ++c) total = _mm512_add_ps(total, sums[c]);
  return _mm512_cvtss_f32(total);
}

__attribute__((target("avx512f,avx512vnni"))) float int8_512() {
  const __m512i a = _mm512_castps_si512(_mm512_set1_ps(g_input));
  __m512i sums[kChains];
  for (auto& sum : sums) sum = a;
  for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_dpbusd_epi32(sums[c], a, a);
  }
  __m512i total = sums[0];
  for (int c = 1; c < kChains; ++c) total = _mm512_add_epi32(total, sums[c]);
  int32_t lanes[16];
  _mm512_storeu_si512(lanes, total);
  return static_cast<float>(lanes[0]);
}

__attribute__((target("avx2,fma"))) float fma_256() {
  const __m256 a = _mm256_set1_ps(g_input), b = _mm256_set1_ps(g_input);
  __m256 sums[kChains];
  for (auto& sum : sums) sum = a;
  for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = _mm256_fmadd_ps(a, b, sums[c]);
  }
  __m256 total = sums[0];
  for (int c = 1; c < kChains; ++c) total = _mm256_add_ps(total, sums[c]);
  return _mm256_cvtss_f32(total);
}

double tflops(float (*body)(), int flops_each, int threads) {
  double best = 0;
  std::vector<float> results(static_cast<size_t>(threads));
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = Clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) {
      others.emplace_back([&results, body, t] { results[static_cast<size_t>(t)] = body(); });
    }
    results[0] = body();
    for (std::thread& thread : others) thread.join();
    best = std::max(best, 1.0 / seconds_since(start));
  }
  g_input = results[0] == 0.5f ? 2e-3f : 1e-3f;  // the result is used
  return 1e-12 * best * static_cast<double>(kRounds) * kChains * flops_each * threads;
}

#endif

}  // namespace

std::map<std::string, double> matrix_rates(const std::string& isa, int threads) {
  std::map<std::string, double> rates;
#if defined(__x86_64__)
  if (isa == "avx512") {
    rates["f32"] = tflops(fma_512, 2 * 16, threads);
    rates["bf16"] = tflops(bf16_512, 2 * 32, threads);
    rates["int8"] = tflops(int8_512, 2 * 64, threads);
  } else if (isa == "avx2") {
    rates["f32"] = tflops(fma_256, 2 * 8, threads);
  }
#else
  static_cast<void>(isa);
  static_cast<void>(threads);
#endif
  return rates;
}

}  // namespace medusa::bench
