// A step of AdamW with 8-bit block-wise state: a block is decoded and updated into fp32 moments,
// which stay in the first cache, and encoded from there. The codes are those of cpu/scalar/adamw.cpp.
#pragma once

#include <bit>
#include <cstring>
#include <limits>

#include "core/operations.h"
#include "cpu/simd/adamw_rule.h"
#include "cpu/simd/dynamic_map_tables.h"
#include "cpu/simd/float_type.h"

namespace qlora::simd {

/// Where a block of 256 elements is: in the tensors themselves or in a PaddedBlock.
template <typename P, typename G>
struct AdamW8bitBlock {
  P* param;
  const G* grad;
  std::uint8_t* exp_avg;
  std::uint8_t* exp_avg_sq;

  /// With the first `count` elements of another, but for the gradient.
  QLORA_INLINE void copy_to(const AdamW8bitBlock& other, std::int64_t count) const {
    const auto size = static_cast<std::size_t>(count);
    std::memcpy(other.param, param, size * sizeof(P));
    std::memcpy(other.exp_avg, exp_avg, size);
    std::memcpy(other.exp_avg_sq, exp_avg_sq, size);
  }
};

/// Room for the short last block of a tensor. Beyond its elements are zeros.
template <typename P, typename G>
struct PaddedBlock {
  P param[adamw8bit_block_size] = {};
  G grad[adamw8bit_block_size] = {};
  std::uint8_t exp_avg[adamw8bit_block_size] = {};
  std::uint8_t exp_avg_sq[adamw8bit_block_size] = {};
};

struct AdamW8bitMoments {
  alignas(64) float exp_avg[adamw8bit_block_size];
  alignas(64) float exp_avg_sq[adamw8bit_block_size];
};

template <typename Simd, typename Block>
QLORA_INLINE void decode_and_update(const AdamWVectorRule<Simd>& update, const Block& block,
                                    float absmax, float absmax_sq, AdamW8bitMoments& moments) {
  using Floats = typename Simd::Floats;
  const Floats scale = Simd::broadcast(absmax);
  const Floats scale_sq = Simd::broadcast(absmax_sq);
  for (std::int64_t i = 0; i < adamw8bit_block_size; i += Simd::lanes) {
    Floats m =
        Simd::look_up(signed_dynamic_map_table.values.data(), Simd::load_bytes(block.exp_avg + i)) *
        scale;
    Floats v = Simd::look_up(unsigned_dynamic_map_table.values.data(),
                             Simd::load_bytes(block.exp_avg_sq + i)) *
               scale_sq;
    Floats p = Simd::load(block.param + i);
    update(p, Simd::load(block.grad + i), m, v);
    Simd::store(block.param + i, p);
    Simd::store(moments.exp_avg + i, m);
    Simd::store(moments.exp_avg_sq + i, v);
  }
}

/// The largest magnitude, or NaN if there is one: as bits, they are ordered like the numbers.
template <typename Simd>
QLORA_INLINE float absolute_maximum(const float* moment) {
  typename Simd::Ints maximum = Simd::broadcast_int(0);
  for (std::int64_t i = 0; i < adamw8bit_block_size; i += Simd::lanes) {
    maximum = Simd::maximum(maximum, Simd::template shift_right<1>(Simd::template shift_left<1>(
                                         Simd::bits(Simd::load(moment + i)))));
  }
  return std::bit_cast<float>(Simd::maximum_lane(maximum));
}

/// The code of a moment's magnitude from its key (cpu/simd/dynamic_map_tables.h).
template <typename Simd, typename Table>
QLORA_INLINE typename Simd::Ints look_up_code(const Table& table, typename Simd::Ints key) {
  using Ints = typename Simd::Ints;
  // By words of 16 bits, the lower of which stays: only the bucket is limited.
  const Ints limited = Simd::minimum_of_halves(
      Simd::subtract_halves_to_zero(key, Simd::broadcast_int(dynamic_map_first_key_word << 16)),
      Simd::broadcast_int(dynamic_map_last_key_word << 16 | 0xffff));
  const Ints entry =
      Simd::look_up(table.entries.data(), Simd::template shift_right<Table::shift>(limited));
  return Simd::template shift_right<Table::shift>(entry + limited);
}

template <typename Simd>
struct FirstMoment {
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  static constexpr std::uint8_t zero_code = dynamic_map_signed_zero_code;

  /// The codes of `x`, which is `moment` in units of the block's absmax.
  QLORA_INLINE static Ints encode(Floats x, Floats) {
    const Ints bits = Simd::bits(x);
    const Ints code = look_up_code<Simd>(signed_dynamic_map_table, Simd::rotate_left_by_one(bits));
    const Ints mirrored =
        Simd::subtract_halves_to_zero(Simd::broadcast_int(2 * dynamic_map_signed_zero_code), code);
    return Simd::select_by_sign(bits, mirrored, code);
  }
};

template <typename Simd>
struct SecondMoment {
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  static constexpr std::uint8_t zero_code = dynamic_map_unsigned_zero_code;

  QLORA_INLINE static Ints encode(Floats x, Floats moment) {
    const Ints positive = Simd::maximum(Simd::bits(x), Simd::broadcast_int(0));
    const Ints code =
        look_up_code<Simd>(unsigned_dynamic_map_table, Simd::template shift_left<1>(positive));
    return Simd::keep_where_not_zero(moment, code);
  }
};

template <typename Simd, typename Moment, bool divides>
QLORA_INLINE void encode_in_units(const float* moment, typename Simd::Floats unit,
                                  std::uint8_t* codes) {
  for (std::int64_t i = 0; i < adamw8bit_block_size; i += 4 * Simd::lanes) {
    typename Simd::Ints code[4];
    for (int j = 0; j < 4; ++j) {
      const auto value = Simd::load(moment + i + j * Simd::lanes);
      code[j] = Moment::encode(divides ? value / unit : value * unit, value);
    }
    Simd::store_bytes(codes + i, code[0], code[1], code[2], code[3]);
  }
}

/// Writes the codes of a block and returns its absmax. NaN or Inf stays in this block: its absmax
/// becomes one.
template <typename Simd, typename Moment>
QLORA_INLINE float encode_moment(const float* moment, std::uint8_t* codes) {
  const float absmax = absolute_maximum<Simd>(moment);
  const float reciprocal = 1.0f / absmax;
  if (absmax == 0.0f) {
    std::memset(codes, Moment::zero_code, adamw8bit_block_size);
  } else if (reciprocal <= std::numeric_limits<float>::max()) {  // the rule of BlockNormalizer
    encode_in_units<Simd, Moment, false>(moment, Simd::broadcast(reciprocal), codes);
  } else {
    encode_in_units<Simd, Moment, true>(moment, Simd::broadcast(absmax), codes);
  }
  return absmax;
}

/// Steps the first `count` elements of a block.
template <typename Simd, typename P, typename G>
QLORA_INLINE void step_block(const AdamWVectorRule<Simd>& update, const AdamW8bitBlock<P, G>& block,
                             std::int64_t count, float& absmax, float& absmax_sq) {
  AdamW8bitMoments moments;
  decode_and_update(update, block, absmax, absmax_sq, moments);
  if (count < adamw8bit_block_size) {
    const auto padding = static_cast<std::size_t>(adamw8bit_block_size - count) * sizeof(float);
    std::memset(moments.exp_avg + count, 0, padding);  // it may have become NaN
    std::memset(moments.exp_avg_sq + count, 0, padding);
  }
  absmax = encode_moment<Simd, FirstMoment<Simd>>(moments.exp_avg, block.exp_avg);
  absmax_sq = encode_moment<Simd, SecondMoment<Simd>>(moments.exp_avg_sq, block.exp_avg_sq);
}

/// Blocks [begin, end) of `tensor`, whose last may be short.
template <typename Simd, typename P, typename G>
QLORA_INLINE void step_blocks(const AdamW8bitTensor& tensor, const AdamWRule& rule,
                              std::int64_t begin, std::int64_t end) {
  const AdamWVectorRule<Simd> update(rule);
  float* const absmax = tensor.exp_avg_absmax.as<float>();
  float* const absmax_sq = tensor.exp_avg_sq_absmax.as<float>();
  const std::int64_t element_count = tensor.param.numel();
  for (std::int64_t b = begin; b < end; ++b) {
    const std::int64_t first = b * adamw8bit_block_size;
    const AdamW8bitBlock<P, G> block{
        tensor.param.as<P>() + first, tensor.grad.as<const G>() + first,
        tensor.exp_avg.as<std::uint8_t>() + first, tensor.exp_avg_sq.as<std::uint8_t>() + first};
    const std::int64_t count = element_count - first;
    if (count >= adamw8bit_block_size) {
      step_block(update, block, adamw8bit_block_size, absmax[b], absmax_sq[b]);
    } else {
      PaddedBlock<P, G> room;
      const AdamW8bitBlock<P, G> padded{room.param, room.grad, room.exp_avg, room.exp_avg_sq};
      block.copy_to(padded, count);
      std::memcpy(room.grad, block.grad, static_cast<std::size_t>(count) * sizeof(G));
      step_block(update, padded, count, absmax[b], absmax_sq[b]);
      padded.copy_to(block, count);
    }
  }
}

template <typename Simd>
QLORA_INLINE void adamw8bit_step(const AdamW8bitTensor& tensor, const AdamWRule& rule,
                                 std::int64_t begin, std::int64_t end) {
  simd::with_float_type(tensor.param.dtype, [&]<typename P>(P) {
    simd::with_float_type(tensor.grad.dtype, [&]<typename G>(G) {
      step_blocks<Simd, P, G>(tensor, rule, begin, end);
    });
  });
}

}  // namespace qlora::simd
