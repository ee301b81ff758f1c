// The kernels of this set.
#pragma once

#include "cpu/cpu_kernels.h"

namespace qlora::avx2 {

void lora_forward(const LoRAForward& arguments, int num_threads);
void lora_backward(const LoRABackward& arguments, int num_threads);

}  // namespace qlora::avx2
