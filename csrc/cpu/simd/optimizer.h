// A step of AdamW with 32-bit state.
#pragma once

#include "core/operations.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/optimizer_rules.h"

namespace qlora::simd {

// In elements. The hardware's prefetchers stop at every page, of which four streams meet many:
// measured on 16.8 M fp32 parameters, two threads, 9.6 ms with 256 or 512, 10.3 with 1024 or 2048,
// 11.1 without.
inline constexpr std::int64_t prefetch_distance = 256;

template <typename Simd>
QLORA_INLINE void adamw_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                             std::int64_t begin, std::int64_t end) {
  using Floats = typename Simd::Floats;
  const AdamWVectorRule<Simd> update(rule);
  float* const exp_avg = tensor.state.exp_avg.as<float>();
  float* const exp_avg_sq = tensor.state.exp_avg_sq.as<float>();
  simd::with_float_type(tensor.param.dtype, [&]<typename P>(P) {
    simd::with_float_type(tensor.grad.dtype, [&]<typename G>(G) {
      P* const param = tensor.param.as<P>();
      const G* const grad = tensor.grad.as<const G>();
      std::int64_t i = begin;
      for (; i + Simd::lanes <= end; i += Simd::lanes) {
        __builtin_prefetch(param + i + prefetch_distance, 1);
        __builtin_prefetch(grad + i + prefetch_distance);
        __builtin_prefetch(exp_avg + i + prefetch_distance, 1);
        __builtin_prefetch(exp_avg_sq + i + prefetch_distance, 1);
        Floats p = Simd::load(param + i);
        Floats m = Simd::load(exp_avg + i);
        Floats v = Simd::load(exp_avg_sq + i);
        update(p, Simd::load(grad + i), m, v);
        Simd::store(param + i, p);
        Simd::store(exp_avg + i, m);
        Simd::store(exp_avg_sq + i, v);
      }
      if (const std::int64_t count = end - i; count > 0) {
        Floats p = Simd::load_partial(param + i, count);
        Floats m = Simd::load_partial(exp_avg + i, count);
        Floats v = Simd::load_partial(exp_avg_sq + i, count);
        update(p, Simd::load_partial(grad + i, count), m, v);
        Simd::store_partial(param + i, p, count);
        Simd::store_partial(exp_avg + i, m, count);
        Simd::store_partial(exp_avg_sq + i, v, count);
      }
    });
  });
}

}  // namespace qlora::simd
