#include <algorithm>

#include "cpu/scalar/absolute_maximum.h"
#include "cpu/scalar/dynamic_map_encoder.h"
#include "cpu/scalar/kernels.h"
#include "format/block_normalizer.h"

namespace qlora::scalar {
namespace {

/// One block of 8-bit state, decoded.
struct Moments {
  float exp_avg[adamw8bit_block_size];
  float exp_avg_sq[adamw8bit_block_size];
};

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

}  // namespace

void adamw_step(const AdamWTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                std::int64_t end) {
  float* const exp_avg = tensor.exp_avg.as<float>();
  float* const exp_avg_sq = tensor.exp_avg_sq.as<float>();
  with_float_type(tensor.param.dtype, [&]<typename P>(P) {
    with_float_type(tensor.grad.dtype, [&]<typename G>(G) {
      P* const param = tensor.param.as<P>();
      const G* const grad = tensor.grad.as<const G>();
      for (std::int64_t i = begin; i < end; ++i) {
        float p = to_float(param[i]);
        rule(p, to_float(grad[i]), exp_avg[i], exp_avg_sq[i]);
        param[i] = from_float<P>(p);
      }
    });
  });
}

void adamw8bit_step(const AdamW8bitTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                    std::int64_t end) {
  with_float_type(tensor.param.dtype, [&]<typename P>(P) {
    with_float_type(tensor.grad.dtype, [&]<typename G>(G) {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t first = block * adamw8bit_block_size;
        const std::int64_t count = std::min(adamw8bit_block_size, tensor.param.numel() - first);
        std::uint8_t* const codes = tensor.exp_avg.as<std::uint8_t>() + first;
        std::uint8_t* const codes_sq = tensor.exp_avg_sq.as<std::uint8_t>() + first;
        float& absmax = tensor.exp_avg_absmax.as<float>()[block];
        float& absmax_sq = tensor.exp_avg_sq_absmax.as<float>()[block];

        Moments moments;
        decode_moment(first_moment_map, codes, absmax, count, moments.exp_avg);
        decode_moment(second_moment_map, codes_sq, absmax_sq, count, moments.exp_avg_sq);
        for (std::int64_t i = 0; i < count; ++i) {
          P& param = tensor.param.as<P>()[first + i];
          float p = to_float(param);
          rule(p, to_float(tensor.grad.as<const G>()[first + i]), moments.exp_avg[i],
               moments.exp_avg_sq[i]);
          param = from_float<P>(p);
        }
        absmax = encode_moment(first_moment_map, moments.exp_avg, count, codes);
        absmax_sq = encode_moment(second_moment_map, moments.exp_avg_sq, count, codes_sq);
      }
    });
  });
}

}  // namespace qlora::scalar
