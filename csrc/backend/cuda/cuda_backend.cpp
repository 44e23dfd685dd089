// What the backend is, its memory, and the door by which make_backend.cpp enters this library.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/cuda_backend.h"

#include "backend/cuda/resident.h"
#include "medusa/error.h"

namespace medusa::cuda {
namespace {

#ifdef MEDUSA_CUDA_EMULATED
constexpr const char* kDeviceName = "cuda-emulated";
#else
constexpr const char* kDeviceName = "cuda";
#endif

int usable(int device) {
  const std::string why = why_unusable(device);
  if (!why.empty()) {
    throw CudaError(concat("device=\"", kDeviceName, device > 0 ? concat(":", device) : "",
                           "\": ", why, "; use device=\"cpu\""));
  }
  return device;
}

}  // namespace

CudaBackend::CudaBackend(int device)
    : device_(usable(device)),
      name_(device > 0 ? concat(kDeviceName, ":", device) : kDeviceName),
      stream_(device) {
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  num_sms_ = properties.multiProcessorCount;
  detail_ = concat(properties.name, ", sm_", properties.major, properties.minor, ", ",
                   properties.totalGlobalMem >> 20, " MiB");
}

CudaBackend::~CudaBackend() { stream_.drain(); }  // copies may still read what goes first

std::unique_ptr<Resident> CudaBackend::make_resident(const ResidentShape& shape) {
  return std::make_unique<CudaResident>(shape, stream_, staging_);
}

Backend::Memory CudaBackend::memory() const {
  static_cast<void>(stream_.get());  // the device of this backend
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

void CudaBackend::synchronize() { stream_.synchronize(); }

std::unique_ptr<Buffer> CudaBackend::do_allocate(int64_t num_bytes) {
  static_cast<void>(stream_.get());  // the device of this backend
  return std::make_unique<DeviceBuffer>(num_bytes);
}

void CudaBackend::do_upload(void* dst, const void* src, int64_t num_bytes) {
  staging_.upload(dst, src, num_bytes, stream_.get());
}

void CudaBackend::do_download(void* dst, const void* src, int64_t num_bytes) {
  const cudaStream_t stream = stream_.get();
  CUDA_CHECK(
      cudaMemcpyAsync(dst, src, static_cast<size_t>(num_bytes), cudaMemcpyDeviceToHost, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
}

}  // namespace medusa::cuda

extern "C" {

__attribute__((visibility("default"))) medusa::Backend* medusa_make_cuda_backend(int device) {
  return new medusa::cuda::CudaBackend(device);
}

__attribute__((visibility("default"))) bool medusa_cuda_usable(int device) {
  return medusa::cuda::why_unusable(device).empty();
}
}
