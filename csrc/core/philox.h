// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): random words
// as a pure function of a key and a counter, so that a dropout mask need not be stored.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace qlora {

struct PhiloxWords {
  std::uint32_t word[4];
};

QLORA_HOST_DEVICE constexpr PhiloxWords philox4x32(PhiloxWords counter, std::uint64_t key) {
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<std::uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

/// Dropout's decisions: element e uses word e mod 4 of counter e / 4 and is kept if the word is at
/// least p * 2^32.
struct DropoutMask {
  std::uint64_t seed;
  std::uint64_t drop_below;  // p * 2^32
  float keep_scale;          // 1 / (1 - p)

  DropoutMask(double p, std::int64_t seed_value)
      : seed(static_cast<std::uint64_t>(seed_value)),
        drop_below(static_cast<std::uint64_t>(p * 4294967296.0)),
        keep_scale(static_cast<float>(1.0 / (1.0 - p))) {}

  QLORA_HOST_DEVICE PhiloxWords words_of_four(std::uint64_t counter) const {
    return philox4x32(
        {{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), 0u, 0u}},
        seed);
  }

  QLORA_HOST_DEVICE bool keeps(std::uint32_t word) const { return word >= drop_below; }
};

}  // namespace qlora
