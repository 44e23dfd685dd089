// SPDX-License-Identifier: Apache-2.0
#include "core/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "core/json.h"
#include "medusa/error.h"

namespace medusa {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit that the format states
constexpr uint64_t kLengthBytes = 8;
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 64;  // so that bits fit too

constexpr std::pair<std::string_view, int> kDTypeBits[] = {
    {"F64", 64},    {"F32", 32},    {"F16", 16},    {"BF16", 16},   {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
    {"C64", 64},    {"I64", 64},    {"I32", 32},    {"I16", 16},    {"I8", 8},
    {"U64", 64},    {"U32", 32},    {"U16", 16},    {"U8", 8},      {"BOOL", 8},
};

// Names come from the file: quoted, so that they stay on one line, and cut.
std::string shown(std::string_view name) {
  constexpr size_t kMaxShown = 120;
  if (name.size() <= kMaxShown) return json::quote(name);
  size_t end = kMaxShown;
  while (end > 0 && (name[end] & 0xC0) == 0x80) --end;  // not inside a UTF-8 character
  return json::quote(name.substr(0, end)) + "...";
}

int64_t dtype_bits(const std::string& dtype, const std::string& where) {
  for (const auto& [name, bits] : kDTypeBits) {
    if (name == dtype) return bits;
  }
  throw ArgumentError(concat(where, ": unknown dtype ", shown(dtype)));
}

const json::Value& member(const json::Value::Object& object, std::string_view key,
                          const std::string& where) {
  const json::Value* value = json::find(object, key);
  MEDUSA_CHECK_ARG(value != nullptr, where, ": the header gives no ", key);
  return *value;
}

SafetensorsTensor read_tensor(const json::Value& entry, const std::string& where,
                              const std::byte* buffer, int64_t buffer_bytes) {
  const json::Value::Object& object = entry.as_object(where);
  SafetensorsTensor tensor;
  tensor.dtype = member(object, "dtype", where).as_string(where + " dtype");
  const json::Value::Array& shape = member(object, "shape", where).as_array(where + " shape");
  const json::Value::Array& offsets =
      member(object, "data_offsets", where).as_array(where + " data_offsets");
  MEDUSA_CHECK_ARG(object.size() == 3, where, ": the header gives ", object.size(),
                   " properties, wanted dtype, shape and data_offsets only");

  int64_t num_elements = 1;
  for (const json::Value& item : shape) {
    const int64_t size = item.as_int(where + " shape");
    MEDUSA_CHECK_ARG(size >= 0, where, ": the shape has a size of ", size);
    MEDUSA_CHECK_ARG(size == 0 || num_elements <= kMaxElements / size, where,
                     ": the shape has too many elements to count");
    num_elements *= size;
    tensor.shape.push_back(size);
  }

  MEDUSA_CHECK_ARG(offsets.size() == 2, where, ": data_offsets has ", offsets.size(),
                   " values, wanted 2");
  const int64_t begin = offsets[0].as_int(where + " data_offsets");
  const int64_t end = offsets[1].as_int(where + " data_offsets");
  MEDUSA_CHECK_ARG(begin >= 0 && begin <= end && end <= buffer_bytes, where, ": data_offsets are [",
                   begin, ", ", end, "], but the file holds ", buffer_bytes,
                   " bytes of tensors; it may be cut short");

  const int64_t num_bits = num_elements * dtype_bits(tensor.dtype, where);
  MEDUSA_CHECK_ARG(num_bits % 8 == 0 && num_bits / 8 == end - begin, where, ": ", num_elements,
                   " elements of ", tensor.dtype, " take ", (num_bits + 7) / 8,
                   " bytes, but data_offsets span ", end - begin);
  tensor.data = buffer + begin;
  tensor.num_bytes = end - begin;
  return tensor;
}

}  // namespace

SafetensorsFile::Mapping SafetensorsFile::map(const std::string& path) {
  // O_NONBLOCK: opening a pipe must not wait for a writer; it has no effect on regular files.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  MEDUSA_CHECK_ARG(file >= 0, path, ": cannot open: ", std::strerror(errno));
  struct stat info{};
  const bool regular = fstat(file, &info) == 0 && S_ISREG(info.st_mode);
  const size_t num_bytes = regular ? static_cast<size_t>(info.st_size) : 0;
  void* data = MAP_FAILED;
  if (num_bytes > 0) data = mmap(nullptr, num_bytes, PROT_READ, MAP_PRIVATE, file, 0);
  const int error = errno;
  close(file);
  MEDUSA_CHECK_ARG(regular, path, ": not a regular file");
  MEDUSA_CHECK_ARG(num_bytes > 0, path, ": not a safetensors file: it is empty");
  MEDUSA_CHECK_ARG(data != MAP_FAILED, path, ": cannot map: ", std::strerror(error));
  return Mapping(static_cast<const std::byte*>(data), Unmap{num_bytes});
}

void SafetensorsFile::Unmap::operator()(const std::byte* data) const noexcept {
  munmap(const_cast<std::byte*>(data), num_bytes);
}

void SafetensorsFile::release(std::string_view name) const {
  const SafetensorsTensor& found = tensor(name);
#if defined(__linux__)  // elsewhere MADV_DONTNEED is a hint of another meaning
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(found.data);
  const uintptr_t first = (start + page - 1) / page * page;
  const uintptr_t last = (start + static_cast<uintptr_t>(found.num_bytes)) / page * page;
  // A failure only leaves the pages resident.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
  static_cast<void>(found);
#endif
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), mapping_(map(path)) {
  read_header();
}

void SafetensorsFile::read_header() {
  const std::string at = path_ + ": not a safetensors file: ";
  const uint64_t file_bytes = mapping_.get_deleter().num_bytes;
  MEDUSA_CHECK_ARG(file_bytes >= kLengthBytes, at, "it has ", file_bytes, " bytes, wanted ",
                   kLengthBytes, " or more");
  uint64_t header_bytes = 0;
  for (uint64_t i = kLengthBytes; i-- > 0;) {
    header_bytes = (header_bytes << 8) | std::to_integer<uint64_t>(mapping_.get()[i]);
  }
  MEDUSA_CHECK_ARG(header_bytes <= kMaxHeaderBytes, at, "its first 8 bytes give a header of ",
                   header_bytes, " bytes, at most ", kMaxHeaderBytes, " are allowed");
  MEDUSA_CHECK_ARG(header_bytes <= file_bytes - kLengthBytes, at, "the header takes ", header_bytes,
                   " bytes, but the file has ", file_bytes, " in all; it may be cut short");

  const std::string_view text(reinterpret_cast<const char*>(mapping_.get() + kLengthBytes),
                              header_bytes);
  MEDUSA_CHECK_ARG(text.starts_with('{'), at, "the header does not start with '{'");
  const json::Value header = json::parse(text, path_ + ": header");
  const std::byte* buffer = mapping_.get() + kLengthBytes + header_bytes;
  const auto buffer_bytes = static_cast<int64_t>(file_bytes - kLengthBytes - header_bytes);

  for (const json::Member& entry : header.as_object(path_)) {
    if (entry.key == "__metadata__") {
      const std::string where = path_ + ": __metadata__";
      for (const json::Member& item : entry.value.as_object(where)) {
        metadata_[item.key] = item.value.as_string(where + " " + shown(item.key));
      }
      continue;
    }
    const std::string where = path_ + ": tensor " + shown(entry.key);
    tensors_.emplace(entry.key, read_tensor(entry.value, where, buffer, buffer_bytes));
    names_.push_back(entry.key);
  }

  std::sort(names_.begin(), names_.end(), [&](const std::string& a, const std::string& b) {
    const SafetensorsTensor &x = tensor(a), &y = tensor(b);
    return std::pair(x.data, x.num_bytes) < std::pair(y.data, y.num_bytes);
  });
  const std::byte* next = buffer;
  for (const std::string& name : names_) {
    const SafetensorsTensor& found = tensor(name);
    MEDUSA_CHECK_ARG(found.data >= next, path_, ": tensor ", shown(name),
                     " overlaps the one before it");
    MEDUSA_CHECK_ARG(found.data == next, path_, ": ", found.data - next, " bytes before tensor ",
                     shown(name), " belong to no tensor");
    next += found.num_bytes;
  }
  MEDUSA_CHECK_ARG(next == buffer + buffer_bytes, path_, ": the last ",
                   buffer + buffer_bytes - next, " bytes belong to no tensor");
}

const SafetensorsTensor& SafetensorsFile::tensor(std::string_view name) const {
  const auto found = tensors_.find(name);
  MEDUSA_CHECK_ARG(found != tensors_.end(), path_, ": there is no tensor ", shown(name));
  return found->second;
}

}  // namespace medusa
