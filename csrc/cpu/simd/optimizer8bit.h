// A step of an optimiser with 8-bit block-wise state: a block is decoded and updated into fp32
// moments, which stay in the first cache, and encoded from there. The codes are those of
// cpu/scalar/optimizer.cpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "core/operations.h"
#include "cpu/simd/dynamic_map_tables.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/optimizer_rules.h"
#include "cpu/simd/param_rounding.h"

namespace qlora::simd {

/// Where a block of 256 elements is: in the tensors themselves or in a PaddedBlock.
template <typename P, typename G, int moment_count>
struct StateBlock {
  P* param;
  const G* grad;
  std::uint8_t* codes[moment_count];  // of each moment

  /// With the first `count` elements of another, but for the gradient.
  QLORA_INLINE void copy_to(const StateBlock& other, std::int64_t count) const {
    const auto size = static_cast<std::size_t>(count);
    std::memcpy(other.param, param, size * sizeof(P));
    for (int m = 0; m < moment_count; ++m) std::memcpy(other.codes[m], codes[m], size);
  }
};

/// Room for the short last block of a tensor. Beyond its elements are zeros.
template <typename P, typename G, int moment_count>
struct PaddedBlock {
  P param[state_block_size] = {};
  G grad[state_block_size] = {};
  std::uint8_t codes[moment_count][state_block_size] = {};

  QLORA_INLINE StateBlock<P, G, moment_count> block() {
    StateBlock<P, G, moment_count> block{param, grad, {}};
    for (int m = 0; m < moment_count; ++m) block.codes[m] = codes[m];
    return block;
  }
};

/// The moments of an updated block, which wait to be encoded.
template <int moment_count>
struct BlockMoments {
  alignas(64) float values[moment_count][state_block_size];
  float absmaxes[moment_count];
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

/// The map of moment number m.
template <typename Simd, int m>
struct MomentMap;

template <typename Simd>
struct MomentMap<Simd, 0> {
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  static constexpr std::uint8_t zero_code = dynamic_map_signed_zero_code;

  QLORA_INLINE static Floats decode(const std::uint8_t* codes) {
    return Simd::look_up(signed_dynamic_map_table.values.data(), codes);
  }

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
struct MomentMap<Simd, 1> {
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  static constexpr std::uint8_t zero_code = dynamic_map_unsigned_zero_code;

  QLORA_INLINE static Floats decode(const std::uint8_t* codes) {
    return Simd::look_up(unsigned_dynamic_map_table.values.data(), codes);
  }

  QLORA_INLINE static Ints encode(Floats x, Floats moment) {
    const Ints positive = Simd::maximum(Simd::bits(x), Simd::broadcast_int(0));
    const Ints code =
        look_up_code<Simd>(unsigned_dynamic_map_table, Simd::template shift_left<1>(positive));
    return Simd::keep_where_not_zero(moment, code);
  }
};

/// Decodes a block's moments, updates them and the parameters, group by group.
template <typename Simd, typename P, typename G, typename Rule, typename Rounding>
class BlockUpdate {
 public:
  using Floats = typename Simd::Floats;

  static constexpr int moment_count = Rule::moment_count;

  QLORA_INLINE BlockUpdate(const VectorRule<Simd, Rule>& rule, const Rounding& rounding,
                           const StateBlock<P, G, moment_count>& block, const float* absmaxes,
                           BlockMoments<moment_count>& out)
      : rule_(rule), rounding_(rounding), block_(block), out_(out) {
    for_each_moment<moment_count>(
        [&](auto m) QLORA_INLINE_LAMBDA { scales_[m] = Simd::broadcast(absmaxes[m]); });
  }

  QLORA_INLINE void group(std::int64_t first) {
    const std::int64_t ahead = first + prefetch_distance_8bit;
    prefetch_group<Simd>(block_.param + ahead);
    prefetch_group<Simd>(block_.grad + ahead);
    for_each_moment<moment_count>(
        [&](auto m) QLORA_INLINE_LAMBDA { prefetch_group<Simd>(block_.codes[m] + ahead); });
    for (int j = 0; j < registers_per_group; ++j) {
      const std::int64_t i = first + j * Simd::lanes;
      Floats moments[moment_count];
      for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
        moments[m] = MomentMap<Simd, m>::decode(block_.codes[m] + i) * scales_[m];
      });
      Floats p = Simd::load(block_.param + i);
      rule_(p, Simd::load(block_.grad + i), moments);
      rounding_.store(block_.param, i, p);
      for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
        Simd::store(out_.values[m] + i, moments[m]);
        maxima_[m].see(moments[m]);
      });
    }
  }

  QLORA_INLINE void finish() {
    for_each_moment<moment_count>(
        [&](auto m) QLORA_INLINE_LAMBDA { out_.absmaxes[m] = maxima_[m].value(); });
  }

 private:
  const VectorRule<Simd, Rule> rule_;
  const Rounding& rounding_;
  const StateBlock<P, G, moment_count> block_;
  Floats scales_[moment_count];
  BlockMoments<moment_count>& out_;
  AbsoluteMaximum<Simd> maxima_[moment_count];
};

/// BlockNormalizer's rule for an absmax that is not zero: whether it multiplies by the reciprocal.
QLORA_INLINE bool has_finite_reciprocal(float absmax) {
  return 1.0f / absmax <= std::numeric_limits<float>::max();
}

/// Encodes a moment of a block, group by group. `unit` is the absmax if `divides`, else its
/// reciprocal.
template <typename Simd, typename Map, bool divides>
class MomentEncoder {
 public:
  QLORA_INLINE MomentEncoder(const float* moment, float unit, std::uint8_t* codes)
      : moment_(moment), unit_(Simd::broadcast(unit)), codes_(codes) {}

  QLORA_INLINE void group(std::int64_t first) const {
    typename Simd::Ints code[registers_per_group];
    for (int j = 0; j < registers_per_group; ++j) {
      const auto value = Simd::load(moment_ + first + j * Simd::lanes);
      code[j] = Map::encode(divides ? value / unit_ : value * unit_, value);
    }
    Simd::store_bytes(codes_ + first, code[0], code[1], code[2], code[3]);
  }

 private:
  const float* const moment_;
  const typename Simd::Floats unit_;
  std::uint8_t* const codes_;
};

/// Calls `group(first)` of every step for the first element of each group of a block.
template <typename Simd, typename... Steps>
QLORA_INLINE void for_each_group(Steps&&... steps) {
  for (std::int64_t i = 0; i < state_block_size; i += registers_per_group * Simd::lanes) {
    (steps.group(i), ...);
  }
}

/// Writes the codes of a moment by itself.
template <typename Simd, typename Map>
void encode_moment(const float* moment, float absmax, std::uint8_t* codes) {
  if (absmax == 0.0f) {
    std::memset(codes, Map::zero_code, state_block_size);
  } else if (has_finite_reciprocal(absmax)) {
    for_each_group<Simd>(MomentEncoder<Simd, Map, false>(moment, 1.0f / absmax, codes));
  } else {
    for_each_group<Simd>(MomentEncoder<Simd, Map, true>(moment, absmax, codes));
  }
}

/// Steps the blocks of one tensor in turn. A block is encoded together with the update of the next:
/// the one is busy with table entries, and the other with divisions and roots.
template <typename Simd, typename P, typename G, typename Rule, typename Rounding>
class BlockStepper {
 public:
  static constexpr int moment_count = Rule::moment_count;
  using Block = StateBlock<P, G, moment_count>;
  using Moments = BlockMoments<moment_count>;
  using Update = BlockUpdate<Simd, P, G, Rule, Rounding>;

  QLORA_INLINE BlockStepper(const OptimizerTensor& tensor, const Rule& rule, Rounding& rounding)
      : rule_(rule),
        rounding_(rounding),
        tensor_{tensor.param.as<P>(), tensor.grad.as<const G>(), {}} {
    const OptimizerState& state = tensor.state;
    const TensorView* const codes[] = {&state.exp_avg, &state.exp_avg_sq};
    const TensorView* const absmaxes[] = {&state.exp_avg_absmax, &state.exp_avg_sq_absmax};
    for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
      tensor_.codes[m] = codes[m]->template as<std::uint8_t>();
      absmaxes_[m] = absmaxes[m]->template as<float>();
    });
  }

  /// A whole block. Its codes are written by the next call, its scales by this one.
  QLORA_INLINE void step(std::int64_t b) {
    const Block block = block_at(b);
    Moments& moments = moments_[is_odd_];
    Update update = make_update(b, block, moments);
    if (is_waiting_ && multiplies(moments_[!is_odd_])) {
      step_and_encode(update, std::make_integer_sequence<int, moment_count>());
    } else {
      for_each_group<Simd>(update);
      finish();
    }
    update.finish();
    store_absmaxes(b, moments);
    waiting_block_ = block;
    is_waiting_ = true;
    is_odd_ = !is_odd_;
  }

  /// Encodes the block that waits.
  QLORA_INLINE void finish() {
    if (is_waiting_) encode(moments_[!is_odd_], waiting_block_);
    is_waiting_ = false;
  }

  /// A last block of `count` elements, with none waiting.
  QLORA_INLINE void step_short(std::int64_t b, std::int64_t count) {
    const Block block = block_at(b);
    PaddedBlock<P, G, moment_count> room;
    const Block padded = room.block();
    block.copy_to(padded, count);
    std::memcpy(room.grad, block.grad, static_cast<std::size_t>(count) * sizeof(G));
    Moments& moments = moments_[0];
    for_each_group<Simd>(make_update(b, padded, moments));
    for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
      AbsoluteMaximum<Simd> maximum;  // of the elements alone: a padding may become NaN
      for (std::int64_t i = 0; i < count; i += Simd::lanes) {
        maximum.see(Simd::load_partial(moments.values[m] + i, std::min(count - i, Simd::lanes)));
      }
      moments.absmaxes[m] = maximum.value();
    });
    store_absmaxes(b, moments);
    encode(moments, padded);
    padded.copy_to(block, count);
  }

 private:
  QLORA_INLINE Block block_at(std::int64_t b) const {
    const std::int64_t first = b * state_block_size;
    Block block{tensor_.param + first, tensor_.grad + first, {}};
    for_each_moment<moment_count>(
        [&](auto m) QLORA_INLINE_LAMBDA { block.codes[m] = tensor_.codes[m] + first; });
    return block;
  }

  QLORA_INLINE Update make_update(std::int64_t b, const Block& block, Moments& out) {
    rounding_.begin_run(b * state_block_size);
    float absmaxes[moment_count];
    for_each_moment<moment_count>([&](auto m)
                                      QLORA_INLINE_LAMBDA { absmaxes[m] = absmaxes_[m][b]; });
    return Update(rule_, rounding_, block, absmaxes, out);
  }

  QLORA_INLINE void store_absmaxes(std::int64_t b, const Moments& moments) {
    for_each_moment<moment_count>(
        [&](auto m) QLORA_INLINE_LAMBDA { absmaxes_[m][b] = moments.absmaxes[m]; });
  }

  /// Whether every moment is encoded by products.
  QLORA_INLINE static bool multiplies(const Moments& moments) {
    bool all = true;
    for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
      all = all && has_finite_reciprocal(moments.absmaxes[m]);
    });
    return all;
  }

  template <int... m>
  QLORA_INLINE void step_and_encode(Update& update, std::integer_sequence<int, m...>) {
    const Moments& waiting = moments_[!is_odd_];
    for_each_group<Simd>(
        update, MomentEncoder<Simd, MomentMap<Simd, m>, false>(
                    waiting.values[m], 1.0f / waiting.absmaxes[m], waiting_block_.codes[m])...);
  }

  QLORA_INLINE static void encode(const Moments& moments, const Block& block) {
    for_each_moment<moment_count>([&](auto m) QLORA_INLINE_LAMBDA {
      encode_moment<Simd, MomentMap<Simd, m>>(moments.values[m], moments.absmaxes[m],
                                              block.codes[m]);
    });
  }

  const VectorRule<Simd, Rule> rule_;
  Rounding& rounding_;
  Block tensor_;  // its first block
  float* absmaxes_[moment_count];
  Moments moments_[2];
  Block waiting_block_{};
  bool is_waiting_ = false;
  bool is_odd_ = false;
};

/// Blocks [begin, end) of `tensor`, whose last may be short.
template <typename Simd, typename Rule>
QLORA_INLINE void step_blocks(const OptimizerTensor& tensor, const Rule& rule,
                              const RoundingStream* stream, std::int64_t begin, std::int64_t end) {
  const std::int64_t whole_count = tensor.param.numel() / state_block_size;
  simd::with_float_type(tensor.param.dtype, [&]<typename P>(P) QLORA_INLINE_LAMBDA {
    simd::with_float_type(tensor.grad.dtype, [&]<typename G>(G) QLORA_INLINE_LAMBDA {
      with_rounding<Simd, P>(stream, [&]<typename R>(R& rounding) QLORA_INLINE_LAMBDA {
        BlockStepper<Simd, P, G, Rule, R> stepper(tensor, rule, rounding);
        for (std::int64_t b = begin; b < std::min(end, whole_count); ++b) stepper.step(b);
        stepper.finish();
        if (end > whole_count) {
          stepper.step_short(whole_count, tensor.param.numel() % state_block_size);
        }
      });
    });
  });
}

}  // namespace qlora::simd
