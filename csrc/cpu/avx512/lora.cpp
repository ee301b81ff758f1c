#include "cpu/avx512/kernels.h"
#include "cpu/avx512/simd.h"
#include "cpu/simd/lora_few_tokens.h"

namespace qlora::avx512 {

void lora_forward(const LoRAForward& arguments, int num_threads) {
  with_float_type(arguments.x.dtype,
                  [&]<typename T>(T) { run_lora_forward_floats<Simd, T>(arguments, num_threads); });
}

void lora_backward(const LoRABackward& arguments, int num_threads) {
  with_float_type(arguments.x.dtype, [&]<typename T>(T) {
    run_lora_backward_floats<Simd, T>(arguments, num_threads);
  });
}

}  // namespace qlora::avx512
