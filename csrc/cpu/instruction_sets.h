// The sets of kernels that this build has, and the one that runs.
#pragma once

#include <vector>

#include "cpu/cpu_kernels.h"

namespace qlora {

/// Every compiled set that this processor can run, best last.
std::vector<const CpuKernels*> attainable_kernels();

/// The best attainable set, or the one that QLORA_NATIVE_CPU_ISA names. Throws Unsupported where
/// that one is not attainable.
const CpuKernels& kernels();

}  // namespace qlora
