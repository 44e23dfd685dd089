// Packed weights: make_weight, pack, embed.
//
//   pack   weight[first + i, k] = round(src[i, k]), to nearest even
//   embed  out[r, k] = scale * weight[token[r], k]; zeros for a token that the weight does not have
//
// Shapes    src [n, K] f32 | f16 | bf16 on the host; out [R, K] f32; weight as in weight.h
// Traffic   pack: the source once over the bus, in pieces of 4 MiB through page-locked memory and
//           a buffer on the device, where one kernel converts and spreads a piece: no copy of the
//           matrix in host memory. embed: R K elements; R=64, K=4096 bf16: 0.5 MB read, 1 MB
//           written, bound by its launch
// Launch    pack: a thread converts 8 elements in row order; embed: grid (R, K / 1024), 256 threads
// Waits     pack waits for its last piece, so that a later product may fetch weights before it
//           waits for the kernel ahead of it
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <memory>

#include "backend/cuda/columns.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/gpu.h"
#include "backend/cuda/weight.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPackElements = 8;   // of a thread
constexpr int kEmbedElements = 4;  // of a thread
constexpr int64_t kPieceBytes = int64_t{4} << 20;

// src: the `count` elements from (output, input) on, row after row.
template <class Src, class Dst>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Src* __restrict__ src, int64_t count, int64_t output, int64_t input,
                int64_t num_inputs, Dst* __restrict__ weight) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPackElements;
  const int64_t last = first + kPackElements < count ? first + kPackElements : count;
  output += (input + first) / num_inputs;
  input = (input + first) % num_inputs;
  for (int64_t i = first; i < last; ++i) {
    weight[weight_index<Dst>(output, input, num_inputs)] = round_to<Dst>(to_f32(src[i]));
    if (++input == num_inputs) {
      input = 0;
      ++output;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* tokens, const T* __restrict__ weight, int64_t num_outputs,
                 int64_t num_inputs, float scale, float* out) {
  begin_overlapped();
  const int64_t token = tokens[blockIdx.x];
  const bool known = token >= 0 && token < num_outputs;
  float* row = out + int64_t{blockIdx.x} * num_inputs;
  int64_t input = int64_t{blockIdx.y} * kThreads * kEmbedElements + threadIdx.x;
  for (int i = 0; i < kEmbedElements && input < num_inputs; ++i, input += kThreads) {
    row[input] = known ? scale * to_f32(weight[weight_index<T>(token, input, num_inputs)]) : 0.0f;
  }
}

}  // namespace

std::unique_ptr<Weight> CudaBackend::do_make_weight(int64_t num_outputs, int64_t num_inputs,
                                                    DType dtype) {
  constexpr int64_t kMaxSize = int64_t{1} << 25;  // tiles and blocks are counted in int
  if (is_block(dtype)) {
    throw UnsupportedError(
        concat("make_weight: CUDA has no product for weights in ", dtype_name(dtype),
               " blocks; load them as bf16, f16 or f32 (export: --weights bf16)"));
  }
  if (num_outputs > kMaxSize || num_inputs > kMaxSize) {
    throw UnsupportedError(concat("make_weight: [", num_outputs, ", ", num_inputs,
                                  "]; CUDA serves up to ", kMaxSize, " outputs and inputs"));
  }
  static_cast<void>(stream_.get());  // the device of this backend
  return std::make_unique<PackedWeight>(num_outputs, num_inputs, dtype);
}

void CudaBackend::do_pack(Weight& weight, int64_t first_output, TensorView src) {
  const int64_t num_inputs = weight.num_inputs(), total = src.num_elements();
  const int64_t element_bytes = dtype_bytes(src.dtype);
  const int64_t piece = std::min(total, kPieceBytes / element_bytes);
  void* staged = linear_partials_.at_least(piece * element_bytes, stream_.get());
  for (int64_t done = 0; done < total; done += piece) {
    const int64_t count = std::min(piece, total - done);
    staging_.upload(staged, src.as<char>() + done * element_bytes, count * element_bytes,
                    stream_.get());
    const auto blocks = static_cast<unsigned>(ceil_div(count, int64_t{kThreads} * kPackElements));
    dispatch_float(src.dtype, "pack", [&]<class Src>() {
      dispatch_float(weight.dtype(), "pack", [&]<class Dst>() {
        launch(pack_kernel<Src, Dst>, dim3(blocks), dim3(kThreads), 0, stream_.get(),
               static_cast<const Src*>(staged), count, first_output + done / num_inputs,
               done % num_inputs, num_inputs, static_cast<Dst*>(packed(weight).data()));
      });
    });
  }
  CUDA_CHECK(cudaStreamSynchronize(stream_.get()));
}

void CudaBackend::do_embed(TensorView tokens, const Weight& weight, float scale, TensorView out) {
  const int64_t num_inputs = weight.num_inputs();
  const dim3 grid(static_cast<unsigned>(tokens.size(0)),
                  static_cast<unsigned>(ceil_div(num_inputs, kThreads * kEmbedElements)));
  dispatch_float(weight.dtype(), "embed", [&]<class T>() {
    launch_overlapped(embed_kernel<T>, grid, dim3(kThreads), 0, stream_.get(), tokens.as<int32_t>(),
                      static_cast<const T*>(packed(weight).data()), weight.num_outputs(),
                      num_inputs, scale, out.as<float>());
  });
}

}  // namespace medusa::cuda
