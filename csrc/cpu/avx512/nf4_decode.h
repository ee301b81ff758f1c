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
#include "format/nf4_layout.h"

namespace qlora::avx512 {
namespace {

constexpr std::int64_t chunk_weights = 128;
constexpr std::int64_t half_chunk_weights = 64;

/// Whether there are weights, in rows of whole halves of chunks, each within one quantisation block.
inline bool is_chunked(const NF4Bytes& weight) {
  return weight.n > 0 && weight.k > 0 && weight.k % half_chunk_weights == 0 &&
         weight.block_size >= half_chunk_weights;
}

/// The halves of chunks in a row of a weight that is_chunked.
inline std::int64_t half_chunks_of(const NF4Bytes& weight) { return weight.k / half_chunk_weights; }

/// One chunk of each of `rows` rows of W, to be decoded. Strides go from row to row.
struct ChunkOfRows {
  const std::uint8_t* codes;
  const float* scales;  // of the chunk's halves
  std::int64_t codes_stride, scales_stride;
  std::int64_t rows;
  bool is_whole;       // else its first half is there
  std::int64_t ahead;  // bytes to codes that will be wanted soon
};

/// Scales of blocks [first, first + count) in fp32.
inline void decode_scales(const NF4Bytes& weight, std::int64_t first, std::int64_t count,
                          float* out) {
  if (weight.nested_offset == nullptr) {
    __builtin_memcpy(out, weight.absmax + 4 * first, static_cast<std::size_t>(4 * count));
    return;
  }
  const __m512 offset = _mm512_set1_ps(load_float(weight.nested_offset, 0));
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t block = first + done;
    const std::int64_t group = block / nf4_blocks_per_nested_block;
    const std::int64_t group_end = (group + 1) * nf4_blocks_per_nested_block;
    std::int64_t run = count - done;
    if (run > group_end - block) run = group_end - block;
    if (run > 16) run = 16;
    const auto lanes = static_cast<__mmask16>((1u << run) - 1u);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, weight.absmax + block));
    const __m512 values = _mm512_i32gather_ps(codes, signed_dynamic_map.values.data(), 4);
    const __m512 group_absmax = _mm512_set1_ps(load_float(weight.nested_absmax, group));
    _mm512_mask_storeu_ps(out + done, lanes,
                          _mm512_add_ps(_mm512_mul_ps(values, group_absmax), offset));
    done += run;
  }
}

/// The scale of every half chunk of rows [begin, end) of W.
inline void decode_half_chunk_scales(const NF4Bytes& w, std::int64_t begin, std::int64_t end,
                                     float* out) {
  const std::int64_t first = begin * half_chunks_of(w), last = end * half_chunks_of(w);
  if (w.block_size == half_chunk_weights) return decode_scales(w, first, last - first, out);
  const std::int64_t halves_per_block = w.block_size / half_chunk_weights;
  for (std::int64_t h = first; h < last;) {
    float scale;
    decode_scales(w, h / halves_per_block, 1, &scale);
    const std::int64_t block_end = (h / halves_per_block + 1) * halves_per_block;
    for (; h < last && h < block_end; ++h) *out++ = scale;
  }
}

/// The codes of a chunk, or of its first half with zeros after it.
template <bool is_whole>
QLORA_INLINE __m512i load_codes(const std::uint8_t* codes, std::int64_t ahead) {
  // Into L2: its queue holds more misses than L1's.
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
