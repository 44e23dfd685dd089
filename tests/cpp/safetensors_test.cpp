// Safetensors files: a good one is read, every corrupt one is refused and nothing is read outside
// of it.
// SPDX-License-Identifier: Apache-2.0
#include "core/safetensors.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "check.h"
#include "medusa/error.h"
#include "tiny_model.h"

using medusa::ArgumentError;
using medusa::SafetensorsFile;

namespace {

// A file of its own that disappears with the object.
class TempFile {
 public:
  explicit TempFile(const std::string& bytes) {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("medusa_safetensors_" + std::to_string(std::random_device()()) + "_" +
             std::to_string(count++));
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  ~TempFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

std::string with_length(uint64_t length, const std::string& rest) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i));
  return bytes + rest;
}

std::string file(const std::string& header, const std::string& data) {
  return with_length(header.size(), header + data);
}

void refused(const std::string& bytes, const std::string& text) {
  const TempFile temp(bytes);
  CHECK_THROWS(ArgumentError, text, SafetensorsFile{temp.path()});
}

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"w":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

// An exported model of zeros with these eos_ids in its metadata.
std::string exported(const std::string& eos_ids) {
  const medusa::ModelConfig config = test::tiny_config();
  std::string config_text;
  for (const char c : config.to_json()) config_text += c == '"' ? "\\\"" : std::string(1, c);
  std::string header = R"({"__metadata__":{"medusa_ext.format":"1","medusa_ext.eos_ids":")" +
                       eos_ids + R"(","medusa_ext.config":")" + config_text + "\"}";
  const medusa::ModelBuilder builder(config, medusa::DType::f32, medusa::make_backend({}));
  int64_t at = 0;
  for (const auto& [name, shape] : builder.missing()) {
    int64_t num_bytes = 2;
    std::string sizes;
    for (const int64_t size : shape) {
      num_bytes *= size;
      sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
    }
    header += ",\"" + name + R"(":{"dtype":"F16","shape":[)" + sizes + R"(],"data_offsets":[)" +
              std::to_string(at) + "," + std::to_string(at + num_bytes) + "]}";
    at += num_bytes;
  }
  return file(header + "}", std::string(static_cast<size_t>(at), '\0'));
}

}  // namespace

TEST(reads_tensors_and_metadata) {
  const float values[] = {1.0f, -2.5f, 3.0f};
  std::string data(sizeof(values), '\0');
  std::memcpy(data.data(), values, sizeof(values));
  const TempFile temp(file(
      R"({"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"e":{"dtype":"I64","shape":[0],"data_offsets":[12,12]}})",
      data));
  const SafetensorsFile opened(temp.path());
  CHECK(opened.metadata().at("a") == "b");
  CHECK(opened.names().size() == 2);
  const auto& w = opened.tensor("w");
  CHECK(w.dtype == "F32" && w.shape == std::vector<int64_t>{3} && w.num_bytes == 12);
  CHECK(std::memcmp(w.data, values, sizeof(values)) == 0);
  opened.release("w");
  CHECK(std::memcmp(w.data, values, sizeof(values)) == 0);
  CHECK_THROWS(ArgumentError, "nope", opened.tensor("nope"));
}

TEST(refuses_files_that_are_none) {
  CHECK_THROWS(ArgumentError, "no_such_file", SafetensorsFile{"no_such_file"});
  CHECK_THROWS(ArgumentError, "", SafetensorsFile{std::filesystem::temp_directory_path().string()});
  refused("", "");
  refused("1234567", "");
  refused(with_length(UINT64_MAX, "{}"), "");
  refused(with_length(INT64_MAX, "{}"), "");
  refused(with_length(3, "{}"), "");
  refused(file("[]", ""), "");
  refused(file("nonsense", ""), "");
}

TEST(refuses_headers_that_lie) {
  const std::string data(16, 'x');
  refused(file(tensor("F33", "[4]", "[0,16]"), data), "F33");
  refused(file(tensor("F32", "[5]", "[0,16]"), data), "w");
  refused(file(tensor("F32", "[4]", "[0,20]"), data), "w");
  refused(file(tensor("F32", "[4]", "[16,0]"), data), "w");
  refused(file(tensor("F32", "[4]", "[-16,0]"), data), "w");
  refused(file(tensor("F32", "[-4]", "[0,16]"), data), "w");
  refused(file(tensor("F32", "[4]", "[0]"), data), "w");
  refused(file(tensor("F32", "4", "[0,16]"), data), "w");
  refused(file(tensor("F32", "[4294967296,4294967296]", "[0,0]"), data), "w");
  refused(file(tensor("F32", "[2305843009213693952,2]", "[0,16]"), data), "w");
  refused(file(tensor("F32", "[1e3]", "[0,16]"), data), "w");
  refused(file(tensor("F32", "[3]", "[0,12]"), data), "");  // four bytes that no tensor holds
  refused(file(R"({"w":{"dtype":"F32","shape":[4]}})", data), "w");
  refused(file(R"({"w":7})", data), "w");
  refused(file(R"({"__metadata__":{"a":1}})", ""), "");
  refused(
      file(
          R"({"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}})",
          data),
      "overlap");
}

TEST(survives_random_damage) {
  const std::string good =
      file(R"({"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})",
           std::string(16, 'x'));
  std::mt19937 random(3);
  int read = 0, refusals = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = good;
    for (unsigned i = 0; i < 1 + random() % 3; ++i) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    if (random() % 4 == 0) bytes.resize(random() % bytes.size());
    const TempFile temp(bytes);
    try {
      const SafetensorsFile opened(temp.path());
      uint64_t sum = 0;  // whatever it claims to hold must be readable
      for (const std::string& name : opened.names()) {
        const auto& one = opened.tensor(name);
        for (int64_t i = 0; i < one.num_bytes; ++i) sum += static_cast<uint8_t>(one.data[i]);
      }
      read += sum > 0;
    } catch (const ArgumentError&) {
      ++refusals;
    }
  }
  CHECK(read > 0);
  CHECK(refusals > 1000);
}

TEST(long_names_are_cut_between_characters) {
  const std::string letters(119, 'a');  // the cut at 120 bytes would fall inside the next character
  refused(file(tensor(letters + "\u00e9\u00e9", "[4]", "[0,16]"), std::string(16, 'x')),
          letters + "\"...");
}

TEST(a_model_has_the_dtype_and_eos_ids_of_its_file) {
  const auto backend = medusa::make_backend({"cpu", 1, ""});
  const auto load = [&](const TempFile& temp, std::optional<medusa::DType> dtype) {
    return medusa::load_model(temp.path(), dtype, backend);
  };
  const TempFile good(exported("[2, 60]"));
  const auto model = load(good, std::nullopt);
  CHECK(model->dtype == medusa::DType::f16);
  CHECK(model->eos_ids == (std::vector<int32_t>{2, 60}));
  CHECK(load(good, medusa::DType::f32)->dtype == medusa::DType::f32);
  for (const char* bad : {"[61]", "[-1]", "[1.5]", "2", "[", ""}) {
    CHECK_THROWS(ArgumentError, "medusa_ext.eos_ids", load(TempFile(exported(bad)), std::nullopt));
  }
}
