// Every wrapper of backend/cuda/gpu.h against plain loops, and what exactness takes for granted of
// the hardware: a row of a product has the same bits wherever it lies in a tile and whatever lies
// beside it. Built for the emulator, whose twins it tests, and for a GPU.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "backend/cuda/gpu.h"
#include "cpp/check.h"

namespace medusa::cuda {
namespace {

// Device memory of n elements, and what is in it.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values)
      : size_(values.size()), buffer_(static_cast<int64_t>(size_ * sizeof(T))) {
    CUDA_CHECK(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  T* data() const { return static_cast<T*>(buffer_.data()); }
  std::vector<T> values() const {
    std::vector<T> host(size_);
    CUDA_CHECK(cudaMemcpy(host.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  size_t size_;
  DeviceBuffer buffer_;
};

std::vector<uint32_t> numbered(size_t count, uint32_t first) {
  std::vector<uint32_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = first + static_cast<uint32_t>(i);
  return values;
}

// ---- cp_async16: two groups; of the second every other copy is not valid

__global__ void __launch_bounds__(32) copy_kernel(const uint4* in, uint4* out) {
  MEDUSA_DYNAMIC_SHARED(uint4, shared);
  const unsigned t = threadIdx.x;
  shared[t] = shared[32 + t] = make_uint4(7, 7, 7, 7);
  __syncwarp();
  cp_async16(shared + t, in + t);
  cp_async_commit();
  cp_async16(shared + 32 + t, t % 2 == 0 ? in + 32 + t : nullptr, t % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncwarp();
  out[t] = shared[31 - t];
  cp_async_wait<0>();
  __syncwarp();
  out[32 + t] = shared[32 + 31 - t];
}

TEST(asynchronous_copies) {
  const Stream stream(0);
  const Array<uint32_t> in(numbered(256, 1000)), out(std::vector<uint32_t>(256));
  launch(copy_kernel, 1, 32, 1024, stream.get(), reinterpret_cast<const uint4*>(in.data()),
         reinterpret_cast<uint4*>(out.data()));
  stream.synchronize();
  const std::vector<uint32_t> got = out.values();
  for (uint32_t t = 0; t < 32; ++t) {
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t from = 4 * (31 - t) + i;
      CHECK(got[4 * t + i] == 1000 + from);
      CHECK(got[128 + 4 * t + i] == ((31 - t) % 2 == 0 ? 1000 + 128 + from : 0));
    }
  }
}

// ---- ldmatrix_x4

template <bool kTranspose>
__global__ void __launch_bounds__(32) ldmatrix_kernel(const uint4* in, uint32_t* out) {
  MEDUSA_DYNAMIC_SHARED(uint4, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4<kTranspose>(r, shared + threadIdx.x);
  for (unsigned i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

template <bool kTranspose>
void check_ldmatrix() {
  const Stream stream(0);
  std::vector<uint16_t> elements(4 * 64);
  for (size_t i = 0; i < elements.size(); ++i) elements[i] = static_cast<uint16_t>(3 * i + 1);
  const Array<uint16_t> in(elements);
  const Array<uint32_t> out(std::vector<uint32_t>(128));
  launch(ldmatrix_kernel<kTranspose>, 1, 32, 512, stream.get(),
         reinterpret_cast<const uint4*>(in.data()), out.data());
  stream.synchronize();
  const std::vector<uint32_t> got = out.values();
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t m = 0; m < 4; ++m) {
      for (size_t half = 0; half < 2; ++half) {
        const size_t row = lane / 4, column = 2 * (lane % 4) + half;
        const size_t at = 64 * m + (kTranspose ? 8 * column + row : 8 * row + column);
        CHECK((got[4 * lane + m] >> 16 * half & 0xffff) == elements[at]);
      }
    }
  }
}

TEST(matrices_from_shared_memory) {
  check_ldmatrix<false>();
  check_ldmatrix<true>();
}

// ---- mma_16816

// d += a b with a [16, 16], b [16, 8], d [16, 8] in plain order.
template <class T>
__global__ void __launch_bounds__(32) mma_kernel(const T* a, const T* b, float* d) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](T low, T high) {
    uint16_t bits[2];
    memcpy(&bits[0], &low, 2);
    memcpy(&bits[1], &high, 2);
    return static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 16;
  };
  uint32_t a_pairs[4], b_pairs[2];
  for (unsigned i = 0; i < 4; ++i) {
    const T* at = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    a_pairs[i] = pair(at[0], at[1]);
  }
  for (unsigned i = 0; i < 2; ++i) {
    const T* at = b + (2 * t + 8 * i) * 8 + g;
    b_pairs[i] = pair(at[0], at[8]);
  }
  float sums[4];
  float* own[4];
  for (unsigned i = 0; i < 4; ++i) {
    own[i] = d + (g + 8 * (i / 2)) * 8 + 2 * t + i % 2;
    sums[i] = *own[i];
  }
  mma_16816<T>(sums, a_pairs, b_pairs[0], b_pairs[1]);
  for (unsigned i = 0; i < 4; ++i) *own[i] = sums[i];
}

template <class T>
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b,
                           const std::vector<float>& d) {
  const Stream stream(0);
  const auto narrow = [](const std::vector<float>& values) {
    std::vector<T> narrowed(values.size());
    std::transform(values.begin(), values.end(), narrowed.begin(),
                   [](float value) { return T(value); });
    return narrowed;
  };
  const Array<T> device_a(narrow(a)), device_b(narrow(b));
  const Array<float> device_d(d);
  launch(mma_kernel<T>, 1, 32, 0, stream.get(), static_cast<const T*>(device_a.data()),
         static_cast<const T*>(device_b.data()), device_d.data());
  stream.synchronize();
  return device_d.values();
}

std::vector<float> random_values(size_t count, bool integers, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    // Of few bits, so that bf16 and f16 hold them exactly.
    value = integers ? static_cast<float>(random() % 17) - 8.0f
                     : std::ldexp(std::nearbyint(16 * normal(random)), -5);
  }
  return values;
}

template <class T>
void check_products() {
  for (const bool integers : {true, false}) {
    const std::vector<float> a = random_values(256, integers, 1),
                             b = random_values(128, integers, 2),
                             d = random_values(128, integers, 3);
    const std::vector<float> got = product<T>(a, b, d);
    for (size_t row = 0; row < 16; ++row) {
      for (size_t column = 0; column < 8; ++column) {
        double sum = d[8 * row + column], size = std::abs(sum);
        for (size_t k = 0; k < 16; ++k) {
          sum += double{a[16 * row + k]} * b[8 * k + column];
          size += std::abs(double{a[16 * row + k]} * b[8 * k + column]);
        }
        // Integers are exact in every order; else 16 additions, each truncated at worst.
        CHECK(std::abs(got[8 * row + column] - sum) <= (integers ? 0.0 : 17 * 0x1p-23 * size));
      }
    }
  }
}

template <class T>
void check_places() {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> a(256), b(128), d(128);
  for (auto* values : {&a, &b, &d}) {
    for (float& value : *values) value = normal(random);
  }
  const std::vector<float> all = product<T>(a, b, d);

  // Row 5 and column 3 elsewhere, among NaN.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      std::vector<float> a2(256, nan), b2(128, nan), d2(128, nan);
      for (size_t k = 0; k < 16; ++k) {
        a2[16 * row + k] = a[16 * 5 + k];
        b2[8 * k + column] = b[8 * k + 3];
      }
      d2[8 * row + column] = d[8 * 5 + 3];
      const float got = product<T>(a2, b2, d2)[8 * row + column];
      CHECK(std::memcmp(&got, &all[8 * 5 + 3], sizeof(float)) == 0);
    }
  }
}

// A product with zeros changes no bit of a sum: padding of rows, of K, and masked keys.
template <class T>
void check_zeros() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> a(256), zero(128, 0.0f), d(128);
  for (float& value : a) value = normal(random);
  for (float& value : d) value = normal(random);
  const std::vector<float> got = product<T>(a, zero, d);
  CHECK(std::memcmp(got.data(), d.data(), sizeof(float) * d.size()) == 0);
}

TEST(products_bf16) {
  check_products<__nv_bfloat16>();
  check_places<__nv_bfloat16>();
  check_zeros<__nv_bfloat16>();
}

TEST(products_f16) {
  check_products<__half>();
  check_places<__half>();
  check_zeros<__half>();
}

// ---- exp2_approx

__global__ void __launch_bounds__(128) exp2_kernel(const float* in, float* out) {
  out[threadIdx.x] = exp2_approx(in[threadIdx.x]);
}

TEST(powers_of_two) {
  const Stream stream(0);
  std::vector<float> x(128);
  for (size_t i = 0; i < x.size(); ++i) x[i] = -0.37f * static_cast<float>(i);
  x[0] = 0.0f;
  x[1] = -std::numeric_limits<float>::infinity();
  x[2] = -20.0f;
  x[3] = 3.0f;
  const Array<float> in(x), out(std::vector<float>(128));
  launch(exp2_kernel, 1, 128, 0, stream.get(), static_cast<const float*>(in.data()), out.data());
  stream.synchronize();
  const std::vector<float> got = out.values();
  CHECK(got[0] == 1.0f);
  CHECK(got[1] == 0.0f);
  CHECK(got[2] == 0x1p-20f);
  CHECK(got[3] == 8.0f);
  for (size_t i = 4; i < x.size(); ++i) {
    const double want = std::exp2(double{x[i]});
    CHECK(std::abs(got[i] - want) <= 2 * 0x1p-23 * want);
  }
}

// ---- take_ticket: the last block adds up what all wrote

__global__ void __launch_bounds__(64)
    last_block_kernel(uint32_t* parts, uint32_t* counter, uint32_t* sum) {
  __shared__ bool is_last;
  parts[blockIdx.x * 64 + threadIdx.x] += blockIdx.x + threadIdx.x;
  __syncthreads();
  if (threadIdx.x == 0) is_last = take_ticket(counter) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  uint32_t own = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) own += parts[b * 64 + threadIdx.x];
  atomicAdd(sum, own);
  if (threadIdx.x == 0) *counter = 0;
}

TEST(the_last_block_sees_all) {
  const Stream stream(0);
  constexpr unsigned kBlocks = 500;
  const Array<uint32_t> parts(std::vector<uint32_t>(kBlocks * 64)), counter({0}), sum({0});
  uint32_t want = 0;
  for (uint32_t round = 1; round <= 20; ++round) {
    launch(last_block_kernel, kBlocks, 64, 0, stream.get(), parts.data(), counter.data(),
           sum.data());
    for (unsigned b = 0; b < kBlocks; ++b) {
      for (unsigned t = 0; t < 64; ++t) want += round * (b + t);
    }
  }
  stream.synchronize();
  CHECK(sum.values()[0] == want);
  CHECK(counter.values()[0] == 0);
}

// ---- launches: a chain of overlapped kernels in order, plain and as a graph; much shared memory

__global__ void __launch_bounds__(256) chain_kernel(const uint32_t* in, uint32_t* out) {
  grid_launch_dependents();
  grid_dependency_wait();
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  // Of another block, so that it is not enough if one's own part is done.
  out[i] = in[(i + 256) % (gridDim.x * 256)] + 1;
}

TEST(overlapped_launches_keep_their_order) {
  const Stream stream(0);
  constexpr unsigned kBlocks = 40;
  constexpr int kLength = 100;
  const Array<uint32_t> even(std::vector<uint32_t>(kBlocks * 256)),
      odd(std::vector<uint32_t>(kBlocks * 256));
  const auto chain = [&] {
    for (int i = 0; i < kLength; ++i) {
      launch_overlapped(chain_kernel, kBlocks, 256, 0, stream.get(),
                        (i % 2 == 0 ? even : odd).data(), (i % 2 == 0 ? odd : even).data());
    }
  };
  chain();
  stream.synchronize();
  const auto all_are = [&](uint32_t want) {
    const std::vector<uint32_t> got = even.values();
    return std::all_of(got.begin(), got.end(), [&](uint32_t value) { return value == want; });
  };
  CHECK(all_are(kLength));

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  chain();
  CUDA_CHECK(cudaStreamEndCapture(stream.get(), &graph));
  CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CHECK(all_are(kLength));
  for (int i = 0; i < 3; ++i) CUDA_CHECK(cudaGraphLaunch(exec, stream.get()));
  stream.synchronize();
  CHECK(all_are(4 * kLength));
  CUDA_CHECK(cudaGraphExecDestroy(exec));
  CUDA_CHECK(cudaGraphDestroy(graph));
}

// ---- nanoseconds

__global__ void __launch_bounds__(32) clock_kernel(uint64_t* out) {
  if (threadIdx.x == 0) *out = nanoseconds();
}

TEST(the_clock_is_one_of_nanoseconds) {
  const Stream stream(0);
  const Array<uint64_t> out(std::vector<uint64_t>(2));
  const auto note = [&](int i) {
    launch(clock_kernel, 1, 32, 0, stream.get(), out.data() + i);
    stream.synchronize();
  };
  note(0);
  const auto start = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  note(1);
  const std::chrono::duration<double> most = std::chrono::steady_clock::now() - start;
  const std::vector<uint64_t> times = out.values();
  const double seconds = 1e-9 * static_cast<double>(times[1] - times[0]);
  CHECK(times[0] > 0 && seconds > 0.015 && seconds < most.count() + 1.0);
}

__global__ void __launch_bounds__(128) much_memory_kernel(uint32_t* out, int num_words) {
  MEDUSA_DYNAMIC_SHARED(uint32_t, shared);
  for (int i = static_cast<int>(threadIdx.x); i < num_words; i += 128) shared[i] = 1;
  __syncthreads();
  uint32_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_words; i += 128) {
    sum += shared[num_words - 1 - i];
  }
  atomicAdd(out, sum);
}

TEST(much_dynamic_shared_memory) {
  const Stream stream(0);
  const Array<uint32_t> out({0});
  constexpr int kBytes = 96 << 10;  // every device since 8.0 has so much
  launch(much_memory_kernel, 1, 128, kBytes, stream.get(), out.data(), kBytes / 4);
  stream.synchronize();
  CHECK(out.values()[0] == kBytes / 4);
}

}  // namespace
}  // namespace medusa::cuda
