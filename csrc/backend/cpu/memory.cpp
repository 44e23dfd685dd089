// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/memory.h"

#include <sys/mman.h>

#include "backend/cpu/limits.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

#ifdef MAP_NORESERVE
constexpr int kMapFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
constexpr int kMapFlags = MAP_PRIVATE | MAP_ANONYMOUS;
#endif

class MappedBuffer final : public Buffer {
 public:
  MappedBuffer(int64_t num_bytes, bool huge_pages) {
    num_bytes_ = num_bytes;
    mapped_bytes_ = static_cast<size_t>(num_bytes > 0 ? num_bytes : 1);
    // The mapping reserves nothing, so the system would accept what it can never deliver and kill
    // the process later.
    void* memory = num_bytes > usable_memory()
                       ? MAP_FAILED
                       : mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, kMapFlags, -1, 0);
    if (memory == MAP_FAILED) {
      throw OutOfMemory(concat(num_bytes, " bytes asked, ", free_memory(), " bytes free"));
    }
    data_ = memory;
#ifdef MADV_HUGEPAGE
    if (huge_pages)
      static_cast<void>(madvise(memory, mapped_bytes_, MADV_HUGEPAGE));  // only advice
#else
    static_cast<void>(huge_pages);
#endif
  }
  MappedBuffer(const MappedBuffer&) = delete;
  MappedBuffer& operator=(const MappedBuffer&) = delete;
  ~MappedBuffer() override { munmap(data_, mapped_bytes_); }

 private:
  size_t mapped_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Buffer> map_memory(int64_t num_bytes, bool huge_pages) {
  return std::make_unique<MappedBuffer>(num_bytes, huge_pages);
}

}  // namespace medusa::cpu
