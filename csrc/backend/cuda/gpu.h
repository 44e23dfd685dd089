// What kernels include, and nothing else: the CUDA language, launches, and the PTX instructions
// that have no intrinsic, one wrapper each. All PTX of this project stands here.
//
// The same .cu files are also compiled by the host compiler with MEDUSA_CUDA_EMULATED; then the
// language comes from tests/emulator/cuda_emulator.h and every wrapper below from its twin in
// tests/emulator/emulated_ptx.h. A new wrapper needs a twin and a line in the test of the twins.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend/cuda/runtime.h"

#if defined(MEDUSA_CUDA_EMULATED)

#include "emulator/cuda_emulator.h"
#include "emulator/emulated_ptx.h"

namespace medusa::cuda {

template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
            cudaStream_t stream, std::type_identity_t<Params>... args) {
  CUDA_CHECK(emu::launch({grid, block, smem_bytes, false}, stream, kernel, args...));
}

template <class... Params>
void launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                       cudaStream_t stream, std::type_identity_t<Params>... args) {
  CUDA_CHECK(emu::launch({grid, block, smem_bytes, true}, stream, kernel, args...));
}

}  // namespace medusa::cuda

#elif defined(__CUDACC__)

#include <cuda_runtime.h>

// T* name: the dynamic shared memory of the block, 1024-byte aligned. Once per kernel.
#define MEDUSA_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)

namespace medusa::cuda {

namespace detail {

template <class... Params>
void launch(bool overlapped, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
            cudaStream_t stream, Params... args) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (smem_bytes > kAlwaysAllowed) {
    CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(smem_bytes)));
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlapped && may_overlap(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
#ifndef NDEBUG
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  if (capture == cudaStreamCaptureStatusNone) CUDA_CHECK(cudaStreamSynchronize(stream));
#endif
}

}  // namespace detail

// The only way to launch. Throws CudaError.
template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
            cudaStream_t stream, std::type_identity_t<Params>... args) {
  detail::launch<Params...>(false, kernel, grid, block, smem_bytes, stream, args...);
}

// The same for a kernel that may start while the one before it still runs. Every thread of it must
// call grid_dependency_wait(), and before that touch nothing but constants and weights. Only these
// may be const __restrict__: what the kernel before writes changes while this one runs.
template <class... Params>
void launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                       cudaStream_t stream, std::type_identity_t<Params>... args) {
  detail::launch<Params...>(true, kernel, grid, block, smem_bytes, stream, args...);
}

// Waits until the kernel before this one has ended and its writes are seen. Does nothing in a
// kernel that was launched with launch().
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after this one start once every block has called this or ended.
__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Address of shared memory as PTX wants it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes from global to shared memory, past the first-level cache; writes zeros
// where !valid and then reads nothing. Both addresses 16-byte aligned.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are under way. Other threads see the copies
// after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8 (16 bytes, in
// shared memory, 16-byte aligned); r[i] holds elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of
// matrix i, of its transpose if kTranspose.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d [16, 8] f32 += a [16, 16] b [16, 8], elements T = __nv_bfloat16 | __half. With g = lane / 4 and
// t = lane % 4 a lane holds
//   a[i]   row g + 8 (i % 2), columns 2t, 2t + 1 (+ 8 for i >= 2)
//   b0, b1 rows 2t, 2t + 1 (+ 8 for b1), column g
//   d[i]   row g + 8 (i / 2), column 2t + i % 2
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x, within 2 units of the last place; denormal inputs and results count as zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Adds 1 and returns the old value. What the block wrote before the __syncthreads() that precedes
// this call of one of its threads is seen by whoever draws a later number, after the
// __syncthreads() that follows: the block that draws the last number may read the work of all.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(old)
               : "l"(counter)
               : "memory");
  return old;
}

// The device's clock, one for all kernels; it may tick as rarely as every microsecond.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now) : : "memory");
  return now;
}

}  // namespace medusa::cuda

#else
#error "gpu.h is for .cu files: compile with nvcc, or with MEDUSA_CUDA_EMULATED"
#endif

namespace medusa::cuda {

// First in a small kernel: the kernel before may still run, and nothing that it writes is read
// before this. The kernel after may start at once, so that its weights are on their way while the
// one before still runs; it waits for this one, and so for all before.
__device__ __forceinline__ void begin_overlapped() {
  grid_launch_dependents();
  grid_dependency_wait();
}

}  // namespace medusa::cuda
