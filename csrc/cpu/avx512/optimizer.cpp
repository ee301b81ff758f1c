#include "cpu/simd/optimizer.h"

#include "cpu/avx512/kernels.h"
#include "cpu/avx512/simd.h"
#include "cpu/simd/optimizer8bit.h"

namespace qlora::avx512 {

void adamw_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  simd::step_elements<Simd>(tensor, rule, rounding, begin, end);
}

void lion_step(const OptimizerTensor& tensor, const LionRule& rule, const RoundingStream* rounding,
               std::int64_t begin, std::int64_t end) {
  simd::step_elements<Simd>(tensor, rule, rounding, begin, end);
}

void adamw8bit_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                    const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  simd::step_blocks<Simd>(tensor, rule, rounding, begin, end);
}

void lion8bit_step(const OptimizerTensor& tensor, const LionRule& rule,
                   const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  simd::step_blocks<Simd>(tensor, rule, rounding, begin, end);
}

}  // namespace qlora::avx512
