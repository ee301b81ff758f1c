#include "cpu/instruction_sets.h"

#include <cstdlib>
#include <string_view>

#include "cpu/cpu_features.h"

namespace qlora {

std::vector<const CpuKernels*> attainable_kernels() {
  std::vector<const CpuKernels*> sets{&scalar_kernels()};
#ifdef QLORA_X86_SETS
  const CpuFeatures& features = cpu_features();
  if (features.avx2) sets.push_back(&avx2_kernels());
  if (features.avx512) sets.push_back(&avx512_kernels());
  if (features.avx512_bf16) sets.push_back(&avx512_bf16_kernels());
  if (features.amx_bf16) sets.push_back(&amx_kernels());
#endif
  return sets;
}

namespace {

const CpuKernels& choose_kernels() {
  const auto attainable = attainable_kernels();
  const char* const wanted = std::getenv("QLORA_NATIVE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *attainable.back();
  std::string names;
  for (const CpuKernels* set : attainable) {
    if (std::string_view(set->name) == wanted) return *set;
    names.append(" ").append(set->name);
  }
  throw Unsupported(message("QLORA_NATIVE_CPU_ISA is '", wanted,
                            "', but this build on this processor has:", names));
}

}  // namespace

const CpuKernels& kernels() {
  static const CpuKernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace qlora
