// 8 fp32 lanes: what the kernel templates of cpu/simd/ are written in. cpu/avx512/simd.h declares
// the same names for 16 lanes. Only sources that are compiled for AVX2, FMA and F16C may include
// it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd/inline.h"
#include "format/float16.h"

namespace qlora::avx2 {

struct Simd {
  static constexpr std::int64_t lanes = 8;

  struct Floats {
    __m256 v;

    QLORA_INLINE friend Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
    QLORA_INLINE friend Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
    QLORA_INLINE friend Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
    QLORA_INLINE friend Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
  };

  QLORA_INLINE static Floats zero() { return {_mm256_setzero_ps()}; }
  QLORA_INLINE static Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }

  /// a * b + c, rounded once.
  QLORA_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  QLORA_INLINE static Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.v)}; }
  QLORA_INLINE static float sum(Floats a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // -- memory. The `_partial` forms touch the first `count` elements, 0 to lanes, and read zeros
  // beyond.

  QLORA_INLINE static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  QLORA_INLINE static Floats load(const BFloat16* p) {
    return widen_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  QLORA_INLINE static Floats load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  QLORA_INLINE static Floats load_partial(const float* p, std::int64_t count) {
    return {_mm256_maskload_ps(p, first(count))};
  }
  template <typename T>
  QLORA_INLINE static Floats load_partial(const T* p, std::int64_t count) {
    T all[lanes] = {};
    std::memcpy(all, p, static_cast<std::size_t>(count) * sizeof(T));
    return load(all);
  }

  /// table[index[i]].
  QLORA_INLINE static Floats gather(const float* table, const std::uint8_t* index) {
    const __m256i lane_index =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    return {_mm256_i32gather_ps(table, lane_index, 4)};
  }

  QLORA_INLINE static void store(float* p, Floats a) { _mm256_storeu_ps(p, a.v); }
  QLORA_INLINE static void store(BFloat16* p, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bfloat16(a));
  }
  QLORA_INLINE static void store(Float16* p, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_float16(a));
  }
  QLORA_INLINE static void store_partial(float* p, Floats a, std::int64_t count) {
    _mm256_maskstore_ps(p, first(count), a.v);
  }
  template <typename T>
  QLORA_INLINE static void store_partial(T* p, Floats a, std::int64_t count) {
    T all[lanes];
    store(all, a);
    std::memcpy(p, all, static_cast<std::size_t>(count) * sizeof(T));
  }

  // -- 16-bit types

  QLORA_INLINE static Floats widen_bfloat16(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  /// Round to nearest even, as from_float<BFloat16>: subnormals stay, NaN becomes 0x7fc0.
  QLORA_INLINE static __m128i narrow_bfloat16(Floats a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256i upper = _mm256_blendv_epi8(
        _mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(is_nan));
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
  QLORA_INLINE static __m128i narrow_float16(Floats a) {
    return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

 private:
  QLORA_INLINE static __m256i first(std::int64_t count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
  }
};

}  // namespace qlora::avx2
