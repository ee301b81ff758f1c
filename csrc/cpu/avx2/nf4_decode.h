// Decoding NF4 codes in registers, half a chunk of one row at a time. Everything here has
// internal linkage: each source that includes it compiles its own.
//
// Half a chunk is 64 weights in 32 bytes. `vpshufb` looks up 32 codes in a table of 16 bytes, so
// that a table of fp32 is four of them, one for each byte of the values, and a table of bf16 two;
// unpacking puts the bytes of a value together. The codes are shuffled first, so that both kinds of
// table decode it in the same order, which both operands of a product share:
//
//   plane c of 8, lane d of 8:  column 8 d + c
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/avx2/simd.h"
#include "cpu/simd/nf4_chunks.h"

namespace qlora::avx2 {
namespace {

constexpr std::int64_t half_chunk_bytes = half_chunk_weights / 2;

/// The values that the codes of a block stand for, rounded to T: byte b of each in bytes[b], in
/// both 128-bit lanes. Two bytes are those of bf16, the upper ones of fp32.
template <typename T>
struct DecodeTable {
  static constexpr int size = 4;
  __m256i bytes[size];
};
template <>
struct DecodeTable<BFloat16> {
  static constexpr int size = 2;
  __m256i bytes[size];
};

// In the order in which unpacking two vectors leaves codes 0 to 7 in one lane and 8 to 15 in the
// other.
alignas(32) constexpr float levels0[8] = {nf4_level(0), nf4_level(1), nf4_level(2),  nf4_level(3),
                                          nf4_level(8), nf4_level(9), nf4_level(10), nf4_level(11)};
alignas(32) constexpr float levels1[8] = {nf4_level(4),  nf4_level(5),  nf4_level(6),
                                          nf4_level(7),  nf4_level(12), nf4_level(13),
                                          nf4_level(14), nf4_level(15)};

QLORA_INLINE __m256i in_both_lanes(__m128i v) { return _mm256_broadcastsi128_si256(v); }

/// fp32 bits, rounded to bf16 in the upper half of each dword: Simd::narrow_bfloat16, but that the
/// payload of a NaN must be zero, as it is in decoded scales.
QLORA_INLINE __m256i round_to_bfloat16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
}

template <typename T>
QLORA_INLINE __m256i round_through(__m256 v) {
  if constexpr (sizeof(T) == 4) {
    return _mm256_castps_si256(v);
  } else {
    T rounded[8];
    Simd::store(rounded, {v});
    return _mm256_castps_si256(Simd::load(rounded).v);
  }
}

/// The table of a block of absmax `scale`, which as a NaN has no payload (decode_scale).
template <typename T>
QLORA_INLINE DecodeTable<T> make_decode_table(float scale) {
  DecodeTable<T> table;
  const __m256 values0 = _mm256_mul_ps(_mm256_load_ps(levels0), _mm256_set1_ps(scale));
  const __m256 values1 = _mm256_mul_ps(_mm256_load_ps(levels1), _mm256_set1_ps(scale));
  // In a pair of vectors, qword 0 has byte 0 of codes 0 to 7, qword 2 that of codes 8 to 15, and
  // qwords 1 and 3 byte 1.
  constexpr int even_qwords = 0x88, odd_qwords = 0xdd;
  if constexpr (DecodeTable<T>::size == 2) {
    const __m256i words =
        _mm256_blend_epi16(_mm256_srli_epi32(round_to_bfloat16(values0), 16),
                           round_to_bfloat16(values1), 0xaa);  // odd words from the second
    const __m256i pair = _mm256_shuffle_epi8(
        words, in_both_lanes(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15)));
    table.bytes[0] = _mm256_permute4x64_epi64(pair, even_qwords);
    table.bytes[1] = _mm256_permute4x64_epi64(pair, odd_qwords);
  } else {
    const __m256i by_byte =
        in_both_lanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i split0 = _mm256_shuffle_epi8(round_through<T>(values0), by_byte);
    const __m256i split1 = _mm256_shuffle_epi8(round_through<T>(values1), by_byte);
    const __m256i low = _mm256_unpacklo_epi32(split0, split1);
    const __m256i high = _mm256_unpackhi_epi32(split0, split1);
    table.bytes[0] = _mm256_permute4x64_epi64(low, even_qwords);
    table.bytes[1] = _mm256_permute4x64_epi64(low, odd_qwords);
    table.bytes[2] = _mm256_permute4x64_epi64(high, even_qwords);
    table.bytes[3] = _mm256_permute4x64_epi64(high, odd_qwords);
  }
  return table;
}

/// Calls `use(c, plane c)` for the 8 planes of the half chunk at `codes`, in fp32.
template <typename T, typename Use>
QLORA_INLINE void decode_half_chunk(const std::uint8_t* codes, const DecodeTable<T>& table,
                                    Use&& use) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  // Byte b of dword d goes to where unpacking takes it to dword d of plane 2 b or 2 b + 1.
  if constexpr (DecodeTable<T>::size == 2) {
    const __m256i shuffled = _mm256_shuffle_epi8(
        bytes, in_both_lanes(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
    const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {  // an odd column is in the low nibble
      const __m256i index =
          _mm256_and_si256(odd ? shuffled : _mm256_srli_epi16(shuffled, 4), nibble);
      const __m256i low = _mm256_shuffle_epi8(table.bytes[0], index);
      const __m256i high = _mm256_shuffle_epi8(table.bytes[1], index);
      const __m256i first = _mm256_unpacklo_epi8(low, high);
      const __m256i second = _mm256_unpackhi_epi8(low, high);
      use(0 + odd, _mm256_castsi256_ps(_mm256_slli_epi32(first, 16)));
      use(2 + odd, _mm256_castsi256_ps(_mm256_and_si256(first, upper_half)));
      use(4 + odd, _mm256_castsi256_ps(_mm256_slli_epi32(second, 16)));
      use(6 + odd, _mm256_castsi256_ps(_mm256_and_si256(second, upper_half)));
    }
  } else {
    const __m256i shuffled = _mm256_shuffle_epi8(
        bytes, in_both_lanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m256i index =
          _mm256_and_si256(odd ? shuffled : _mm256_srli_epi16(shuffled, 4), nibble);
      const __m256i byte0 = _mm256_shuffle_epi8(table.bytes[0], index);
      const __m256i byte1 = _mm256_shuffle_epi8(table.bytes[1], index);
      const __m256i byte2 = _mm256_shuffle_epi8(table.bytes[2], index);
      const __m256i byte3 = _mm256_shuffle_epi8(table.bytes[3], index);
      const __m256i low0 = _mm256_unpacklo_epi8(byte0, byte1);
      const __m256i high0 = _mm256_unpacklo_epi8(byte2, byte3);
      const __m256i low1 = _mm256_unpackhi_epi8(byte0, byte1);
      const __m256i high1 = _mm256_unpackhi_epi8(byte2, byte3);
      use(0 + odd, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0)));
      use(2 + odd, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0)));
      use(4 + odd, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1)));
      use(6 + odd, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1)));
    }
  }
}

/// Asks for codes that will be wanted soon. Into L2: its queue holds more misses than L1's.
QLORA_INLINE void prefetch_codes(const std::uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T1);
}

}  // namespace
}  // namespace qlora::avx2
