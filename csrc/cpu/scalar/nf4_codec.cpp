#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/scalar/absolute_maximum.h"
#include "cpu/scalar/dynamic_map_encoder.h"
#include "cpu/scalar/kernels.h"
#include "cpu/scalar/nf4_decode.h"
#include "format/block_normalizer.h"

namespace qlora::scalar {
namespace {

template <typename T>
void encode_block(const T* values, std::int64_t count, float absmax, std::uint8_t* codes) {
  if (absmax == 0.0f) {
    constexpr std::uint8_t zeros = nf4_pack(nf4_zero_code, nf4_zero_code);
    std::fill_n(codes, nf4_code_bytes(count), zeros);
    return;
  }
  const BlockNormalizer normalize(absmax);
  constexpr std::size_t lanes = nf4_min_block_size;
  for (std::int64_t first = 0; first < count; first += lanes) {
    const auto length = std::min(lanes, static_cast<std::size_t>(count - first));
    std::array<float, lanes> x{};  // zeros pad an odd count
    for (std::size_t i = 0; i < length; ++i) x[i] = normalize(to_float(values[first + i]));
    // nf4_encode, by counting: without a branch, and compilers vectorise it.
    std::array<int, lanes> code{};
    for (int t = 0; t + 1 < nf4_level_count; ++t) {
      const float threshold = nf4_threshold(t);
      for (std::size_t i = 0; i < lanes; ++i) code[i] += x[i] > threshold ? 1 : 0;
    }
    for (std::size_t i = 0; i < length; i += 2) *codes++ = nf4_pack(code[i], code[i + 1]);
  }
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
                              ? signed_dynamic_map_encoder(normalize(absmax[block] - offset))
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
