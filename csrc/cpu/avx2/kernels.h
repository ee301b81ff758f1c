// The kernels of AVX2, FMA and F16C, one file for each group; the formulas are in
// cpu/scalar/.
#pragma once

#include "cpu/cpu_kernels.h"

namespace qlora::avx2 {

void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
             std::int64_t begin, std::int64_t end);

void adamw_step(const AdamWTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                std::int64_t end);
void adamw8bit_step(const AdamW8bitTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                    std::int64_t end);

}  // namespace qlora::avx2
