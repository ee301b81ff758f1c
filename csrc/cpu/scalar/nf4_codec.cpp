#include <cmath>

#include "cpu/scalar/absolute_maximum.h"
#include "cpu/scalar/kernels.h"
#include "cpu/scalar/nf4_decode.h"
#include "format/block_normalizer.h"

namespace qlora::scalar {
namespace {

template <typename T>
void encode_block(const T* values, std::int64_t count, float absmax, std::uint8_t* codes) {
  const BlockNormalizer normalize(absmax);
  const auto encode = [&](std::int64_t i) {
    return absmax > 0.0f ? nf4_encode(normalize(to_float(values[i]))) : nf4_zero_code;
  };
  for (std::int64_t i = 0; i + 1 < count; i += 2) codes[i / 2] = nf4_pack(encode(i), encode(i + 1));
  if (count & 1) codes[count / 2] = nf4_pack(encode(count - 1), 0);
}

template <typename T>
std::int64_t quantize_groups(const T* w, const NF4Bytes& out, float* absmax, double* group_sums,
                             std::int64_t begin, std::int64_t end) {
  for (std::int64_t group = begin; group < end; ++group) {
    const std::int64_t first = group * nf4_blocks_per_nested_block;
    const std::int64_t last = std::min(first + nf4_blocks_per_nested_block, out.block_count());
    double sum = 0.0;
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t e = block * out.block_size;
      const std::int64_t count = std::min(out.block_size, out.element_count() - e);
      absmax[block] = absolute_maximum(w + e, count);
      if (!std::isfinite(absmax[block])) return block;
      encode_block(w + e, count, absmax[block], out.codes + e / 2);
      sum += static_cast<double>(absmax[block]);
    }
    group_sums[group] = sum;
  }
  return -1;
}

}  // namespace

std::int64_t nf4_quantize(const TensorView& w, const NF4Bytes& out, float* absmax,
                          double* group_sums, std::int64_t begin, std::int64_t end) {
  return with_float_type(w.dtype, [&]<typename T>(T) {
    return quantize_groups(w.as<const T>(), out, absmax, group_sums, begin, end);
  });
}

void nf4_quantize_scales(const float* absmax, float offset, const NF4Bytes& out, std::int64_t begin,
                         std::int64_t end) {
  for (std::int64_t group = begin; group < end; ++group) {
    const std::int64_t first = group * nf4_blocks_per_nested_block;
    const std::int64_t last = std::min(first + nf4_blocks_per_nested_block, out.block_count());
    float group_absmax = 0.0f;
    for (std::int64_t block = first; block < last; ++block) {
      group_absmax = std::max(group_absmax, std::fabs(absmax[block] - offset));
    }
    const BlockNormalizer normalize(group_absmax);
    for (std::int64_t block = first; block < last; ++block) {
      out.absmax[block] = group_absmax > 0.0f
                              ? signed_dynamic_map.encode(normalize(absmax[block] - offset))
                              : dynamic_map_signed_zero_code;
    }
    store_float(out.nested_absmax, group, group_absmax);
  }
}

void nf4_dequantize(const NF4Bytes& weight, const TensorView& out, std::int64_t begin,
                    std::int64_t end) {
  const std::int64_t first = begin * weight.block_size;
  const std::int64_t last = std::min(end * weight.block_size, weight.element_count());
  with_float_type(out.dtype, [&]<typename T>(T) {
    T* const destination = out.as<T>() + first;
    decode_elements<T>(weight, first, last - first,
                       [destination](std::int64_t i, T value) { destination[i] = value; });
  });
}

}  // namespace qlora::scalar
