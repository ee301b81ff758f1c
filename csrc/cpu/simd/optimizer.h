// A step of an optimiser with 32-bit state.
#pragma once

#include <algorithm>

#include "core/operations.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/optimizer_rules.h"
#include "cpu/simd/param_rounding.h"

namespace qlora::simd {

// In elements. The hardware's prefetchers stop at every page, of which four streams meet many:
// measured with AdamW on 16.8 M fp32 parameters, two threads, 9.6 ms with 256 or 512, 10.3 with 1024
// or 2048, 11.1 without.
inline constexpr std::int64_t prefetch_distance = 256;

/// Steps elements of one tensor.
template <typename Simd, typename P, typename G, typename Rule>
class ElementStepper {
 public:
  using Floats = typename Simd::Floats;

  static constexpr int moment_count = Rule::moment_count;

  QLORA_INLINE ElementStepper(const OptimizerTensor& tensor, const Rule& rule)
      : update_(rule), param_(tensor.param.as<P>()), grad_(tensor.grad.as<const G>()) {
    const TensorView* const states[] = {&tensor.state.exp_avg, &tensor.state.exp_avg_sq};
    for_each_moment<moment_count>(
        [&](auto m) QLORA_INLINE_LAMBDA { moments_[m] = states[m]->template as<float>(); });
  }

  /// Elements [begin, end), of one run of the rounding's.
  template <typename Rounding>
  QLORA_INLINE void step(const Rounding& rounding, std::int64_t begin, std::int64_t end) const {
    std::int64_t i = begin;
    for (; i + Simd::lanes <= end; i += Simd::lanes) {
      __builtin_prefetch(param_ + i + prefetch_distance, 1);
      __builtin_prefetch(grad_ + i + prefetch_distance);
      Floats p = Simd::load(param_ + i);
      Floats moments[moment_count];
      for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
        __builtin_prefetch(moments_[m] + i + prefetch_distance, 1);
        moments[m] = Simd::load(moments_[m] + i);
      });
      update_(p, Simd::load(grad_ + i), moments);
      rounding.store(param_, i, p);
      for_each_moment<moment_count>(
          [&](auto m) QLORA_INLINE_LAMBDA { Simd::store(moments_[m] + i, moments[m]); });
    }
    if (const std::int64_t count = end - i; count > 0) {
      Floats p = Simd::load_partial(param_ + i, count);
      Floats moments[moment_count];
      for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
        moments[m] = Simd::load_partial(moments_[m] + i, count);
      });
      update_(p, Simd::load_partial(grad_ + i, count), moments);
      rounding.store_partial(param_, i, p, count);
      for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
        Simd::store_partial(moments_[m] + i, moments[m], count);
      });
    }
  }

 private:
  const VectorRule<Simd, Rule> update_;
  P* const param_;
  const G* const grad_;
  float* moments_[moment_count];
};

/// Elements [begin, end) of `tensor`.
template <typename Simd, typename Rule>
QLORA_INLINE void step_elements(const OptimizerTensor& tensor, const Rule& rule,
                                const RoundingStream* stream, std::int64_t begin,
                                std::int64_t end) {
  simd::with_float_type(tensor.param.dtype, [&]<typename P>(P) QLORA_INLINE_LAMBDA {
    simd::with_float_type(tensor.grad.dtype, [&]<typename G>(G) QLORA_INLINE_LAMBDA {
      const ElementStepper<Simd, P, G, Rule> stepper(tensor, rule);
      with_rounding<Simd, P>(stream, [&]<typename R>(R& rounding) QLORA_INLINE_LAMBDA {
        for (std::int64_t i = begin; i < end;) {
          const std::int64_t run = i / R::run_size * R::run_size;
          const std::int64_t last = end - run > R::run_size ? run + R::run_size : end;
          rounding.begin_run(run);
          stepper.step(rounding, i, last);
          i = last;
        }
      });
    });
  });
}

}  // namespace qlora::simd
