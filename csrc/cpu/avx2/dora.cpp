#include "cpu/simd/dora.h"

#include "cpu/avx2/kernels.h"
#include "cpu/avx2/simd.h"

namespace qlora::avx2 {

void dora_scale(const DoRAScale& arguments, std::int64_t begin, std::int64_t end) {
  simd::dora_scale<Simd>(arguments, begin, end);
}

void dora_scale_backward(const DoRAScaleBackward& arguments, std::int64_t begin, std::int64_t end) {
  simd::dora_scale_backward<Simd>(arguments, begin, end);
}

}  // namespace qlora::avx2
