// How stepped parameters are stored: rounded to the nearest, or bfloat16 at random
// (core/stochastic_rounding.h). Elements come in runs, of which begin_run tells.
#pragma once

#include <cstring>

#include "core/stochastic_rounding.h"
#include "cpu/simd/philox.h"

namespace qlora::simd {

template <typename Simd>
struct RoundingToNearest {
  using Floats = typename Simd::Floats;

  static constexpr std::int64_t run_size = INT64_MAX;

  QLORA_INLINE void begin_run(std::int64_t) {}

  template <typename P>
  QLORA_INLINE void store(P* param, std::int64_t i, Floats x) const {
    Simd::store(param + i, x);
  }
  template <typename P>
  QLORA_INLINE void store_partial(P* param, std::int64_t i, Floats x, std::int64_t count) const {
    Simd::store_partial(param + i, x, count);
  }
};

/// The random bits of a run are made at once and wait in the first cache.
template <typename Simd>
class RoundingAtRandom {
 public:
  using Floats = typename Simd::Floats;

  static constexpr std::int64_t run_size = 256;

  QLORA_INLINE explicit RoundingAtRandom(const RoundingStream& stream) : stream_(stream) {}

  /// `first` is a multiple of run_size.
  QLORA_INLINE void begin_run(std::int64_t first) {
    constexpr std::int64_t elements_at_once = RoundingStream::elements_per_counter * Simd::lanes;
    const std::uint64_t counter =
        stream_.first_counter +
        static_cast<std::uint64_t>(first / RoundingStream::elements_per_counter);
    for (std::int64_t i = 0; i < run_size; i += elements_at_once) {
      philox_words<Simd>(
          counter + static_cast<std::uint64_t>(i / RoundingStream::elements_per_counter),
          stream_.step, stream_.seed, words_ + i / 2);
    }
  }

  /// `i` counts from anywhere that is a multiple of run_size, and the lanes are of one run.
  QLORA_INLINE void store(BFloat16* param, std::int64_t i, Floats x) const {
    Simd::store(param + i, x, Simd::load_halves(words_, half_of(i)));
  }
  QLORA_INLINE void store_partial(BFloat16* param, std::int64_t i, Floats x,
                                  std::int64_t count) const {
    BFloat16 all[Simd::lanes];
    Simd::store(all, x, Simd::load_halves(words_, half_of(i)));
    std::memcpy(param + i, all, static_cast<std::size_t>(count) * sizeof(BFloat16));
  }

 private:
  QLORA_INLINE static std::int64_t half_of(std::int64_t i) { return i & (run_size - 1); }

  const RoundingStream stream_;
  /// Room for the lanes beyond a run's end, of which nothing is stored.
  alignas(64) std::uint32_t words_[(run_size + Simd::lanes) / 2] = {};
};

/// Calls `function` with the rounding of parameters P.
template <typename Simd, typename P, typename Function>
QLORA_INLINE void with_rounding(const RoundingStream* stream, Function&& function) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (stream != nullptr) {
      RoundingAtRandom<Simd> rounding(*stream);
      function(rounding);
      return;
    }
  }
  RoundingToNearest<Simd> rounding;
  function(rounding);
}

}  // namespace qlora::simd
