// lora_forward_grouped and lora_backward_grouped, made of the instruction set's kernels for one
// update: groups side by side where there are enough of them, else each over all threads.
#pragma once

#include "core/operations.h"

namespace qlora {

void run_lora_forward_grouped(const LoRAForwardGrouped& arguments, int num_threads);
void run_lora_backward_grouped(const LoRABackwardGrouped& arguments, int num_threads);

}  // namespace qlora
