// Decoding NF4 codes in registers, a chunk of 128 weights of one row at a time. Everything here has
// internal linkage: each set that includes it compiles its own.
//
// A chunk is 64 bytes. Its codes are permutation indices as they lie: shifted right by 4 s bits, the
// low nibble of every dword (or word) is the code of one weight. The decoded vectors therefore hold
// columns in a fixed, strided order, which both operands of a product share:
//
//   fp32   plane s of 8, lane d of 16:  column 8 d + (s ^ 1)
//   bf16   plane s of 4, lane w of 32:  column 4 w + (s ^ 1)
//
// (s ^ 1, because the even element of a byte is its high nibble.)
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/avx512/simd.h"
#include "cpu/simd/nf4_chunks.h"

namespace qlora::avx512 {
namespace {

/// One chunk of each of `rows` rows of W, to be decoded. Strides go from row to row.
struct ChunkOfRows {
  const std::uint8_t* codes;
  const float* scales;  // of the chunk's halves
  std::int64_t codes_stride, scales_stride;
  std::int64_t rows;
  bool is_whole;       // else its first half is there
  std::int64_t ahead;  // bytes to codes that will be wanted soon
};

/// The codes of a chunk, or of its first half with zeros after it.
/// (The codes after it are then code 0: their scale must be 0, not that of the next row.)
template <bool is_whole>
QLORA_INLINE __m512i load_codes(const std::uint8_t* codes, std::int64_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
  __m512i loaded;
  if constexpr (is_whole) {
    loaded = _mm512_loadu_si512(codes);
  } else {
    loaded = _mm512_maskz_loadu_epi64(0x0f, codes);
  }
  // Once: GCC would rather read memory again for every shift, across two cache lines where the codes
  // are not aligned.
  __asm__("" : "+v"(loaded));
  return loaded;
}

alignas(64) constexpr float nf4_levels[nf4_level_count] = {
    nf4_level(0),  nf4_level(1),  nf4_level(2),  nf4_level(3), nf4_level(4),  nf4_level(5),
    nf4_level(6),  nf4_level(7),  nf4_level(8),  nf4_level(9), nf4_level(10), nf4_level(11),
    nf4_level(12), nf4_level(13), nf4_level(14), nf4_level(15)};

/// The weights of a chunk in fp32, rounded to T: planes[s] lane d is column 8 d + (s ^ 1). The
/// first 64 have scale0, the others scale1.
template <typename T>
QLORA_INLINE void decode_floats(__m512i codes, float scale0, float scale1, __m512 (&planes)[8]) {
  const __m512 levels = _mm512_load_ps(nf4_levels);
  const __m512 table0 = Simd::round_to<T>({_mm512_mul_ps(levels, _mm512_set1_ps(scale0))}).v;
  const __m512 table1 = Simd::round_to<T>({_mm512_mul_ps(levels, _mm512_set1_ps(scale1))}).v;
  const __m512i nibble = _mm512_set1_epi32(0x0f);
  // Index bit 4 chooses the table.
  const __m512i table = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(0x10), 1);
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) {
    const __m512i index = _mm512_ternarylogic_epi32(
        _mm512_srli_epi32(codes, static_cast<unsigned>(4 * s)), nibble, table, 0xea);
    planes[s] = _mm512_permutex2var_ps(table0, index, table1);
  }
}

}  // namespace
}  // namespace qlora::avx512
