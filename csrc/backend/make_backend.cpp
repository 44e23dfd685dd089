// From the name of a device to its backend. The CPU's is part of this program; the CUDA backend is
// a library beside it, loaded on first use, so that everything else runs without a driver.
// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>

#include <charconv>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/isa.h"
#include "medusa/backend.h"
#include "medusa/error.h"

namespace medusa {
namespace {

constexpr const char* kCudaLibrary = "libmedusa_cuda.so";
constexpr const char* kEmulatedLibrary = "libmedusa_cuda_emulated.so";

// The file beside the object that holds this code, or up to two folders above it, where a build
// folder has it; empty if there is none.
std::filesystem::path find_library(const char* name) {
  Dl_info here;
  if (dladdr(reinterpret_cast<void*>(&find_library), &here) == 0) return {};
  std::error_code ignored;
  std::filesystem::path folder = std::filesystem::canonical(here.dli_fname, ignored);
  for (int level = 0; level < 3; ++level) {
    folder = folder.parent_path();
    if (std::filesystem::exists(folder / name, ignored)) return folder / name;
  }
  return {};
}

// A library that was loaded stays so: it holds the code of live objects.
struct Plugin {
  Backend* (*make)(int device) = nullptr;
  bool (*usable)(int device) = nullptr;
};

// Empty if this build has no such library. UnsupportedError if it has and cannot load it.
std::optional<Plugin> load_plugin(const char* name) {
  static std::mutex mutex;
  static std::map<std::string_view, Plugin> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = loaded.find(name); found != loaded.end()) return found->second;
  const std::filesystem::path path = find_library(name);
  if (path.empty()) return std::nullopt;

  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw UnsupportedError(concat(path.string(), " cannot be loaded: ", dlerror()));
  }
  Plugin plugin;
  plugin.make = reinterpret_cast<Backend* (*)(int)>(dlsym(library, "medusa_make_cuda_backend"));
  plugin.usable = reinterpret_cast<bool (*)(int)>(dlsym(library, "medusa_cuda_usable"));
  if (plugin.make == nullptr || plugin.usable == nullptr) {
    throw UnsupportedError(concat(path.string(), " is of another version of this package"));
  }
  return loaded[name] = plugin;
}

// Whether "cuda" can be used here and now; never throws.
bool cuda_usable() {
  try {
    const std::optional<Plugin> plugin = load_plugin(kCudaLibrary);
    return plugin && plugin->usable(0);
  } catch (const std::exception&) {
    return false;
  }
}

[[noreturn]] void unknown_device(const std::string& device) {
  std::string have = "cpu, auto";
  if (!find_library(kCudaLibrary).empty()) have += ", cuda, cuda:N";
  if (!find_library(kEmulatedLibrary).empty()) have += ", cuda-emulated";
  throw ArgumentError(concat("device is \"", device, "\"; this build has: ", have));
}

// N of "cuda:N".
int cuda_index(const std::string& device) {
  const std::string_view digits = std::string_view(device).substr(5);
  int index = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
  if (digits.empty() || error != std::errc() || end != digits.data() + digits.size() || index < 0) {
    unknown_device(device);
  }
  return index;
}

std::shared_ptr<Backend> make_cuda(const std::string& device, const char* library, int index) {
  const std::optional<Plugin> plugin = load_plugin(library);
  if (!plugin) {
    throw UnsupportedError(
        concat("device \"", device, "\": this build has no ", "CUDA backend; use device=\"cpu\""));
  }
  return std::shared_ptr<Backend>(plugin->make(index));
}

}  // namespace

std::shared_ptr<Backend> make_backend(const BackendOptions& options) {
  const std::string& device = options.device;
  if (device == "cuda-emulated") return make_cuda(device, kEmulatedLibrary, 0);
  if (device == "cuda") return make_cuda(device, kCudaLibrary, 0);
  if (device.starts_with("cuda:")) return make_cuda(device, kCudaLibrary, cuda_index(device));
  if (device == "auto" && cuda_usable()) return make_cuda(device, kCudaLibrary, 0);
  if (device != "cpu" && device != "auto") unknown_device(device);
  return std::make_shared<cpu::CpuBackend>(options.threads, options.isa);
}

std::vector<std::string> available_devices() {
  std::vector<std::string> devices = {"cpu"};
  if (cuda_usable()) devices.push_back("cuda");
  if (!find_library(kEmulatedLibrary).empty()) devices.push_back("cuda-emulated");
  return devices;
}

std::vector<std::string> available_isas() { return cpu::available_isas(); }

}  // namespace medusa
