#include "cpu/simd/dropout.h"

#include "cpu/avx2/kernels.h"
#include "cpu/avx2/simd.h"

namespace qlora::avx2 {

void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
             std::int64_t begin, std::int64_t end) {
  simd::dropout<Simd>(x, p, seed, out, begin, end);
}

}  // namespace qlora::avx2
