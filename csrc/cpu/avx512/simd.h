// 16 fp32 lanes: what the kernel templates of cpu/simd/ are written in. cpu/avx2/simd.h declares
// the same names for 8 lanes. Only sources that are compiled for AVX-512 may include it.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/inline.h"
#include "format/float16.h"

namespace qlora::avx512 {

struct Simd {
  static constexpr std::int64_t lanes = 16;

  struct Floats {
    __m512 v;

    QLORA_INLINE friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
    QLORA_INLINE friend Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
    QLORA_INLINE friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
    QLORA_INLINE friend Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
  };

  QLORA_INLINE static Floats zero() { return {_mm512_setzero_ps()}; }
  QLORA_INLINE static Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }

  /// a * b + c, rounded once.
  QLORA_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  QLORA_INLINE static Floats sqrt(Floats a) { return {_mm512_sqrt_ps(a.v)}; }
  QLORA_INLINE static float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }

  // -- memory. The `_partial` forms touch the first `count` elements, 0 to lanes, and read zeros
  // beyond.

  QLORA_INLINE static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  QLORA_INLINE static Floats load(const BFloat16* p) {
    return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  QLORA_INLINE static Floats load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  QLORA_INLINE static Floats load_partial(const float* p, std::int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  QLORA_INLINE static Floats load_partial(const BFloat16* p, std::int64_t count) {
    return widen_bfloat16(_mm256_maskz_loadu_epi16(first(count), p));
  }
  QLORA_INLINE static Floats load_partial(const Float16* p, std::int64_t count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))};
  }

  /// table[index[i]].
  QLORA_INLINE static Floats gather(const float* table, const std::uint8_t* index) {
    const __m512i lane_index =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    return {_mm512_i32gather_ps(lane_index, table, 4)};
  }

  QLORA_INLINE static void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
  QLORA_INLINE static void store(BFloat16* p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(a));
  }
  QLORA_INLINE static void store(Float16* p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16(a));
  }
  QLORA_INLINE static void store_partial(float* p, Floats a, std::int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), a.v);
  }
  QLORA_INLINE static void store_partial(BFloat16* p, Floats a, std::int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_bfloat16(a));
  }
  QLORA_INLINE static void store_partial(Float16* p, Floats a, std::int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_float16(a));
  }

  // -- 16-bit types

  QLORA_INLINE static Floats widen_bfloat16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  /// Round to nearest even, as from_float<BFloat16>: subnormals stay, NaN becomes 0x7fc0.
  QLORA_INLINE static __m256i narrow_bfloat16(Floats a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i upper =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(upper);
  }
  QLORA_INLINE static __m256i narrow_float16(Floats a) {
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

 private:
  QLORA_INLINE static __mmask16 first(std::int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1u);
  }
};

}  // namespace qlora::avx512
