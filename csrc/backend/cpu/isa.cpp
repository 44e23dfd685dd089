// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/isa.h"

#include <cstdlib>

#include "medusa/error.h"

namespace medusa::cpu {
namespace {

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable{&kernels_generic()};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (avx2) usable.push_back(&kernels_avx2());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    usable.push_back(&kernels_avx512());
  }
#endif
  return usable;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& select_kernels(const std::string& isa) {
  const char* variable = std::getenv("MEDUSA_CPU_ISA");
  const std::string wanted = !isa.empty() ? isa : variable != nullptr ? variable : "";
  const std::vector<const Kernels*> usable = usable_kernels();
  if (wanted.empty()) return *usable.back();
  std::string names;
  for (const Kernels* kernels : usable) {
    if (wanted == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw ArgumentError(concat(isa.empty() ? "MEDUSA_CPU_ISA is \"" : "isa is \"", wanted,
                             "\"; available here: ", names));
}

}  // namespace medusa::cpu
