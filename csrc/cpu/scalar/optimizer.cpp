#include <algorithm>

#include "cpu/scalar/absolute_maximum.h"
#include "cpu/scalar/dynamic_map_encoder.h"
#include "cpu/scalar/kernels.h"
#include "format/block_normalizer.h"

namespace qlora::scalar {
namespace {

/// What is stored of a stepped parameter, whose elements are stepped in any order.
class ParamRounding {
 public:
  explicit ParamRounding(const RoundingStream* stream) : stream_(stream) {}

  template <typename P>
  P operator()(float x, std::int64_t element) const {
    if constexpr (std::is_same_v<P, BFloat16>) {
      if (stream_ != nullptr) {
        const PhiloxWords words = stream_->words_of_eight(static_cast<std::uint64_t>(element / 8));
        return round_stochastically(x, RoundingStream::half_of(words, element % 8));
      }
    }
    return from_float<P>(x);
  }

 private:
  const RoundingStream* stream_;
};

/// Calls `step(param, grad)` with typed pointers to the elements of a tensor.
template <typename Step>
void with_types(const OptimizerTensor& tensor, Step&& step) {
  with_float_type(tensor.param.dtype, [&]<typename P>(P) {
    with_float_type(tensor.grad.dtype,
                    [&]<typename G>(G) { step(tensor.param.as<P>(), tensor.grad.as<const G>()); });
  });
}

void apply(const AdamWRule& rule, float& param, float grad, float* const (&moments)[2],
           std::int64_t i) {
  rule(param, grad, moments[0][i], moments[1][i]);
}

void apply(const LionRule& rule, float& param, float grad, float* const (&moments)[2],
           std::int64_t i) {
  rule(param, grad, moments[0][i]);
}

template <typename Rule>
void step_elements(const OptimizerTensor& tensor, const Rule& rule, const RoundingStream* rounding,
                   std::int64_t begin, std::int64_t end) {
  const ParamRounding round(rounding);
  float* const moments[2] = {tensor.state.exp_avg.as<float>(), tensor.state.exp_avg_sq.as<float>()};
  with_types(tensor, [&]<typename P, typename G>(P* param, const G* grad) {
    for (std::int64_t i = begin; i < end; ++i) {
      float p = to_float(param[i]);
      apply(rule, p, to_float(grad[i]), moments, i);
      param[i] = round.operator()<P>(p, i);
    }
  });
}

// ---- 8-bit state

/// A moment's map: how it is read, how it is written, the code of zero, and the least code of what
/// is not zero.
struct MomentMap {
  const DynamicMap& map;
  const DynamicMapEncoder& encode;
  std::uint8_t zero_code;
  std::uint8_t least_nonzero_code;
};
constexpr MomentMap first_moment_map{signed_dynamic_map, signed_dynamic_map_encoder,
                                     dynamic_map_signed_zero_code, 0};
// A second moment that became zero would leave eps alone in the denominator, and a first moment
// that did not would then be a step of thousands of times lr: it is rounded up instead.
constexpr MomentMap second_moment_map{unsigned_dynamic_map, unsigned_dynamic_map_encoder,
                                      dynamic_map_unsigned_zero_code,
                                      dynamic_map_unsigned_zero_code + 1};

void decode_moment(const MomentMap& map, const std::uint8_t* codes, float absmax,
                   std::int64_t count, float* moment) {
  for (std::int64_t i = 0; i < count; ++i) moment[i] = map.map.decode(codes[i]) * absmax;
}

/// Writes codes and returns their absmax. NaN or Inf stays in this block: its absmax becomes one.
float encode_moment(const MomentMap& map, const float* moment, std::int64_t count,
                    std::uint8_t* codes) {
  const float absmax = absolute_maximum(moment, count);
  if (absmax == 0.0f) {
    std::fill_n(codes, count, map.zero_code);
    return absmax;
  }
  const BlockNormalizer normalize(absmax);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint8_t least = moment[i] == 0.0f ? std::uint8_t{0} : map.least_nonzero_code;
    codes[i] = std::max(map.encode(normalize(moment[i])), least);
  }
  return absmax;
}

template <typename Rule>
void step_blocks(const OptimizerTensor& tensor, const Rule& rule, const RoundingStream* rounding,
                 std::int64_t begin, std::int64_t end) {
  struct Moment {
    const MomentMap& map;
    std::uint8_t* codes;
    float* absmaxes;
  };
  const OptimizerState& state = tensor.state;
  const Moment stored[] = {
      {first_moment_map, state.exp_avg.as<std::uint8_t>(), state.exp_avg_absmax.as<float>()},
      {second_moment_map, state.exp_avg_sq.as<std::uint8_t>(),
       state.exp_avg_sq_absmax.as<float>()}};
  const ParamRounding round(rounding);
  float decoded[2][state_block_size];
  float* const moments[2] = {decoded[0], decoded[1]};
  with_types(tensor, [&]<typename P, typename G>(P* param, const G* grad) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * state_block_size;
      const std::int64_t count = std::min(state_block_size, tensor.param.numel() - first);
      for (int m = 0; m < Rule::moment_count; ++m) {
        decode_moment(stored[m].map, stored[m].codes + first, stored[m].absmaxes[block], count,
                      moments[m]);
      }
      for (std::int64_t i = 0; i < count; ++i) {
        float p = to_float(param[first + i]);
        apply(rule, p, to_float(grad[first + i]), moments, i);
        param[first + i] = round.operator()<P>(p, first + i);
      }
      for (int m = 0; m < Rule::moment_count; ++m) {
        stored[m].absmaxes[block] =
            encode_moment(stored[m].map, moments[m], count, stored[m].codes + first);
      }
    }
  });
}

}  // namespace

void adamw_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  step_elements(tensor, rule, rounding, begin, end);
}

void lion_step(const OptimizerTensor& tensor, const LionRule& rule, const RoundingStream* rounding,
               std::int64_t begin, std::int64_t end) {
  step_elements(tensor, rule, rounding, begin, end);
}

void adamw8bit_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                    const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  step_blocks(tensor, rule, rounding, begin, end);
}

void lion8bit_step(const OptimizerTensor& tensor, const LionRule& rule,
                   const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  step_blocks(tensor, rule, rounding, begin, end);
}

}  // namespace qlora::scalar
