// with_float_type of core/tensor_view.h for sources that are compiled for an instruction set: it
// leaves nothing out of line, and has no error to throw, as the operations check dtypes before.
#pragma once

#include "core/tensor_view.h"
#include "cpu/simd/inline.h"

namespace qlora::simd {

template <typename Function>
QLORA_INLINE decltype(auto) with_float_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float32: return function(float{});
    case DType::bfloat16: return function(BFloat16{});
    default: return function(Float16{});
  }
}

}  // namespace qlora::simd
