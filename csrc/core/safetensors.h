// A mapped safetensors file: checked once on opening, then read in place.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace medusa {

struct SafetensorsTensor {
  std::string dtype;  // as in the file: "F32", "F16", "BF16", "I64", "F8_E4M3", …
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // in the mapping; the format promises no alignment
  int64_t num_bytes = 0;
};

class SafetensorsFile {
 public:
  // ArgumentError names the file, the tensor and the fault: a header that does not fit the file or
  // is not valid JSON, an unknown dtype, bytes that disagree with the shape, offsets out of range,
  // overlaps, holes.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<std::string>& names() const { return names_; }  // in the order of their bytes
  const SafetensorsTensor& tensor(std::string_view name) const;  // ArgumentError: not in the file

  // Drops the whole pages inside this tensor from resident memory; later reads map them again.
  void release(std::string_view name) const;

 private:
  struct Unmap {
    size_t num_bytes = 0;
    void operator()(const std::byte* data) const noexcept;
  };
  using Mapping = std::unique_ptr<const std::byte, Unmap>;

  static Mapping map(const std::string& path);
  void read_header();

  std::string path_;
  Mapping mapping_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, SafetensorsTensor, std::less<>> tensors_;
  std::vector<std::string> names_;
};

}  // namespace medusa
