#include "cpu/simd/dora.h"

#include "cpu/avx512/kernels.h"
#include "cpu/avx512/simd.h"

namespace qlora::avx512 {

void dora_scale(const DoRAScale& arguments, std::int64_t begin, std::int64_t end) {
  simd::dora_scale<Simd>(arguments, begin, end);
}

void dora_scale_backward(const DoRAScaleBackward& arguments, std::int64_t begin, std::int64_t end) {
  simd::dora_scale_backward<Simd>(arguments, begin, end);
}

}  // namespace qlora::avx512
