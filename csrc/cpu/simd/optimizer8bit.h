// A step of AdamW with 8-bit block-wise state: a block is decoded and updated into fp32 moments,
// which stay in the first cache, and encoded from there. The codes are those of cpu/scalar/adamw.cpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "core/operations.h"
#include "cpu/simd/dynamic_map_tables.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/optimizer_rules.h"

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
  P param[state_block_size] = {};
  G grad[state_block_size] = {};
  std::uint8_t exp_avg[state_block_size] = {};
  std::uint8_t exp_avg_sq[state_block_size] = {};
};

/// An updated block whose moments wait to be encoded.
template <typename Simd>
struct AdamW8bitMoments {
  alignas(64) float exp_avg[state_block_size];
  alignas(64) float exp_avg_sq[state_block_size];
  float absmax, absmax_sq;
};

/// The largest magnitude of the values seen, or NaN if there was one: as bits, magnitudes are
/// ordered like the numbers.
template <typename Simd>
class AbsoluteMaximum {
 public:
  QLORA_INLINE void see(typename Simd::Floats x) {
    maximum_ = Simd::maximum(maximum_, Simd::magnitude_bits(x));
  }
  QLORA_INLINE float value() const { return std::bit_cast<float>(Simd::maximum_lane(maximum_)); }

 private:
  typename Simd::Ints maximum_ = Simd::broadcast_int(0);
};

// A block is worked on in groups of this many registers, the bytes of which are packed together.
inline constexpr int registers_per_group = 4;

// Two blocks ahead, in elements: 1.5 ms of 11.6 on 16.8 M fp32 parameters, two threads.
inline constexpr std::int64_t prefetch_distance_8bit = 2 * state_block_size;

/// Of the elements of a group at `p`.
template <typename Simd, typename T>
QLORA_INLINE void prefetch_group(const T* p) {
  constexpr std::int64_t line = 64 / sizeof(T);
  for (std::int64_t i = 0; i < registers_per_group * Simd::lanes; i += line) {
    __builtin_prefetch(p + i);
  }
}

/// Decodes a block's moments, updates them and the parameters, group by group.
template <typename Simd, typename P, typename G>
class BlockUpdate {
 public:
  using Floats = typename Simd::Floats;

  QLORA_INLINE BlockUpdate(const AdamWVectorRule<Simd>& rule, const AdamW8bitBlock<P, G>& block,
                           float absmax, float absmax_sq, AdamW8bitMoments<Simd>& out)
      : rule_(rule),
        block_(block),
        scale_(Simd::broadcast(absmax)),
        scale_sq_(Simd::broadcast(absmax_sq)),
        out_(out) {}

  QLORA_INLINE void group(std::int64_t first) {
    const std::int64_t ahead = first + prefetch_distance_8bit;
    prefetch_group<Simd>(block_.param + ahead);
    prefetch_group<Simd>(block_.grad + ahead);
    prefetch_group<Simd>(block_.exp_avg + ahead);
    prefetch_group<Simd>(block_.exp_avg_sq + ahead);
    for (int j = 0; j < registers_per_group; ++j) {
      const std::int64_t i = first + j * Simd::lanes;
      Floats m = Simd::look_up(signed_dynamic_map_table.values.data(),
                               Simd::load_bytes(block_.exp_avg + i)) *
                 scale_;
      Floats v = Simd::look_up(unsigned_dynamic_map_table.values.data(),
                               Simd::load_bytes(block_.exp_avg_sq + i)) *
                 scale_sq_;
      Floats p = Simd::load(block_.param + i);
      rule_(p, Simd::load(block_.grad + i), m, v);
      Simd::store(block_.param + i, p);
      Simd::store(out_.exp_avg + i, m);
      Simd::store(out_.exp_avg_sq + i, v);
      maximum_.see(m);
      maximum_sq_.see(v);
    }
  }

  QLORA_INLINE void finish() {
    out_.absmax = maximum_.value();
    out_.absmax_sq = maximum_sq_.value();
  }

 private:
  const AdamWVectorRule<Simd> rule_;
  const AdamW8bitBlock<P, G> block_;
  const Floats scale_, scale_sq_;
  AdamW8bitMoments<Simd>& out_;
  AbsoluteMaximum<Simd> maximum_, maximum_sq_;
};

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

/// BlockNormalizer's rule for an absmax that is not zero: whether it multiplies by the reciprocal.
QLORA_INLINE bool has_finite_reciprocal(float absmax) {
  return 1.0f / absmax <= std::numeric_limits<float>::max();
}

/// Encodes a moment of a block, group by group. `unit` is the absmax if `divides`, else its
/// reciprocal.
template <typename Simd, typename Moment, bool divides>
class MomentEncoder {
 public:
  QLORA_INLINE MomentEncoder(const float* moment, float unit, std::uint8_t* codes)
      : moment_(moment), unit_(Simd::broadcast(unit)), codes_(codes) {}

  QLORA_INLINE void group(std::int64_t first) const {
    typename Simd::Ints code[registers_per_group];
    for (int j = 0; j < registers_per_group; ++j) {
      const auto value = Simd::load(moment_ + first + j * Simd::lanes);
      code[j] = Moment::encode(divides ? value / unit_ : value * unit_, value);
    }
    Simd::store_bytes(codes_ + first, code[0], code[1], code[2], code[3]);
  }

 private:
  const float* const moment_;
  const typename Simd::Floats unit_;
  std::uint8_t* const codes_;
};

/// Calls `function(first)` for the first element of every group of a block.
template <typename Simd, typename... Steps>
QLORA_INLINE void for_each_group(Steps&&... steps) {
  for (std::int64_t i = 0; i < state_block_size; i += registers_per_group * Simd::lanes) {
    (steps.group(i), ...);
  }
}

/// Writes the codes of a moment by itself.
template <typename Simd, typename Moment>
void encode_moment(const float* moment, float absmax, std::uint8_t* codes) {
  if (absmax == 0.0f) {
    std::memset(codes, Moment::zero_code, state_block_size);
  } else if (has_finite_reciprocal(absmax)) {
    for_each_group<Simd>(MomentEncoder<Simd, Moment, false>(moment, 1.0f / absmax, codes));
  } else {
    for_each_group<Simd>(MomentEncoder<Simd, Moment, true>(moment, absmax, codes));
  }
}

/// Steps the blocks of one tensor in turn. A block is encoded together with the update of the next:
/// the one is busy with table entries, and the other with divisions and roots.
template <typename Simd, typename P, typename G>
class BlockStepper {
 public:
  using Block = AdamW8bitBlock<P, G>;
  using Moments = AdamW8bitMoments<Simd>;

  QLORA_INLINE explicit BlockStepper(const AdamWRule& rule) : rule_(rule) {}

  /// A whole block. Its codes are written by the next call, its two scales by this one.
  QLORA_INLINE void step(const Block& block, float& absmax, float& absmax_sq) {
    Moments& moments = moments_[is_odd_];
    BlockUpdate<Simd, P, G> update(rule_, block, absmax, absmax_sq, moments);
    const Moments& waiting = moments_[!is_odd_];
    if (is_waiting_ && has_finite_reciprocal(waiting.absmax) &&
        has_finite_reciprocal(waiting.absmax_sq)) {
      for_each_group<Simd>(
          update,
          MomentEncoder<Simd, FirstMoment<Simd>, false>(waiting.exp_avg, 1.0f / waiting.absmax,
                                                        waiting_block_.exp_avg),
          MomentEncoder<Simd, SecondMoment<Simd>, false>(
              waiting.exp_avg_sq, 1.0f / waiting.absmax_sq, waiting_block_.exp_avg_sq));
    } else {
      for_each_group<Simd>(update);
      finish();
    }
    update.finish();
    absmax = moments.absmax;
    absmax_sq = moments.absmax_sq;
    waiting_block_ = block;
    is_waiting_ = true;
    is_odd_ = !is_odd_;
  }

  /// Encodes the block that waits.
  QLORA_INLINE void finish() {
    if (!is_waiting_) return;
    const Moments& waiting = moments_[!is_odd_];
    encode_moment<Simd, FirstMoment<Simd>>(waiting.exp_avg, waiting.absmax, waiting_block_.exp_avg);
    encode_moment<Simd, SecondMoment<Simd>>(waiting.exp_avg_sq, waiting.absmax_sq,
                                            waiting_block_.exp_avg_sq);
    is_waiting_ = false;
  }

  /// A block of less than 256 elements, with none waiting.
  QLORA_INLINE void step_short(const Block& block, std::int64_t count, float& absmax,
                               float& absmax_sq) {
    PaddedBlock<P, G> room;
    const Block padded{room.param, room.grad, room.exp_avg, room.exp_avg_sq};
    block.copy_to(padded, count);
    std::memcpy(room.grad, block.grad, static_cast<std::size_t>(count) * sizeof(G));
    Moments& moments = moments_[0];
    for_each_group<Simd>(BlockUpdate<Simd, P, G>(rule_, padded, absmax, absmax_sq, moments));
    AbsoluteMaximum<Simd> maximum, maximum_sq;  // of the elements alone: a padding may become NaN
    for (std::int64_t i = 0; i < count; i += Simd::lanes) {
      maximum.see(Simd::load_partial(moments.exp_avg + i, std::min(count - i, Simd::lanes)));
      maximum_sq.see(Simd::load_partial(moments.exp_avg_sq + i, std::min(count - i, Simd::lanes)));
    }
    absmax = maximum.value();
    absmax_sq = maximum_sq.value();
    encode_moment<Simd, FirstMoment<Simd>>(moments.exp_avg, absmax, padded.exp_avg);
    encode_moment<Simd, SecondMoment<Simd>>(moments.exp_avg_sq, absmax_sq, padded.exp_avg_sq);
    padded.copy_to(block, count);
  }

 private:
  const AdamWVectorRule<Simd> rule_;
  Moments moments_[2];
  Block waiting_block_{};
  bool is_waiting_ = false;
  bool is_odd_ = false;
};

/// Blocks [begin, end) of `tensor`, whose last may be short.
template <typename Simd, typename P, typename G>
QLORA_INLINE void step_blocks(const OptimizerTensor& tensor, const AdamWRule& rule,
                              std::int64_t begin, std::int64_t end) {
  BlockStepper<Simd, P, G> stepper(rule);
  float* const absmax = tensor.state.exp_avg_absmax.as<float>();
  float* const absmax_sq = tensor.state.exp_avg_sq_absmax.as<float>();
  const auto block_at = [&](std::int64_t b) {
    const std::int64_t first = b * state_block_size;
    return AdamW8bitBlock<P, G>{tensor.param.as<P>() + first, tensor.grad.as<const G>() + first,
                                tensor.state.exp_avg.as<std::uint8_t>() + first,
                                tensor.state.exp_avg_sq.as<std::uint8_t>() + first};
  };
  const std::int64_t whole_count = tensor.param.numel() / state_block_size;
  for (std::int64_t b = begin; b < std::min(end, whole_count); ++b) {
    stepper.step(block_at(b), absmax[b], absmax_sq[b]);
  }
  stepper.finish();
  if (end > whole_count) {
    stepper.step_short(block_at(whole_count), tensor.param.numel() % state_block_size,
                       absmax[whole_count], absmax_sq[whole_count]);
  }
}

template <typename Simd>
QLORA_INLINE void adamw8bit_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                                 std::int64_t begin, std::int64_t end) {
  simd::with_float_type(tensor.param.dtype, [&]<typename P>(P) {
    simd::with_float_type(tensor.grad.dtype, [&]<typename G>(G) {
      step_blocks<Simd, P, G>(tensor, rule, begin, end);
    });
  });
}

}  // namespace qlora::simd
