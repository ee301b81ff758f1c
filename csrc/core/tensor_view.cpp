#include "core/tensor_view.h"

namespace qlora {

void throw_no_float_kernel(DType dtype) {
  throw Unsupported(message("no floating-point kernel for dtype ", dtype));
}

}  // namespace qlora
