#include "cpu/simd/adamw.h"

#include "cpu/avx512/kernels.h"
#include "cpu/avx512/simd.h"
#include "cpu/simd/adamw8bit.h"

namespace qlora::avx512 {

void adamw_step(const AdamWTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                std::int64_t end) {
  simd::adamw_step<Simd>(tensor, rule, begin, end);
}

void adamw8bit_step(const AdamW8bitTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                    std::int64_t end) {
  simd::adamw8bit_step<Simd>(tensor, rule, begin, end);
}

}  // namespace qlora::avx512
