#include "cpu/avx2/kernels.h"
#include "cpu/avx2/simd.h"
#include "cpu/simd/lora_few_tokens.h"

namespace qlora::avx2 {

void lora_forward(const LoRAForward& arguments, int num_threads) {
  with_float_type(arguments.x.dtype,
                  [&]<typename T>(T) { run_lora_forward_floats<Simd, T>(arguments, num_threads); });
}

void lora_backward(const LoRABackward& arguments, int num_threads) {
  with_float_type(arguments.x.dtype, [&]<typename T>(T) {
    run_lora_backward_floats<Simd, T>(arguments, num_threads);
  });
}

}  // namespace qlora::avx2
