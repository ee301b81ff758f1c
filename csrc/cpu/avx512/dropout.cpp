#include "cpu/simd/dropout.h"

#include "cpu/avx512/kernels.h"
#include "cpu/avx512/simd.h"

namespace qlora::avx512 {

void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
             std::int64_t begin, std::int64_t end) {
  simd::dropout<Simd>(x, p, seed, out, begin, end);
}

}  // namespace qlora::avx512
