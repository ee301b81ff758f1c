// 8 fp32 lanes: what the kernel templates of cpu/simd/ are written in. cpu/avx512/simd.h declares
// the same names for 16 lanes. Only sources that are compiled for AVX2, FMA and F16C may include
// it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

  /// 8 words of 32 bits.
  struct Ints {
    __m256i v;

    QLORA_INLINE friend Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
    QLORA_INLINE friend Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.v, b.v)}; }
  };

  QLORA_INLINE static Floats zero() { return {_mm256_setzero_ps()}; }
  QLORA_INLINE static Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }

  /// a * b + c, rounded once.
  QLORA_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  QLORA_INLINE static Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.v)}; }

  /// A number that many are divided by.
  struct Divisor {
    Floats value;

    QLORA_INLINE explicit Divisor(float x) : value(broadcast(x)) {}
  };
  /// a / divisor. By way of the reciprocal, as AVX-512 does it, a step of AdamW took 1.14 times as
  /// long on a Zen 3, in 32 bits as in 8: 256 bits keep the divider less busy.
  QLORA_INLINE static Floats divide(Floats a, const Divisor& divisor) { return a / divisor.value; }

  /// 1 or -1 with the sign of `a`; 0 and NaN stay.
  QLORA_INLINE static Floats sign(Floats a) {
    const __m256 one =
        _mm256_or_ps(_mm256_and_ps(a.v, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    const __m256 is_signed = _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    return {_mm256_blendv_ps(a.v, one, is_signed)};
  }

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

  // Table entries come one by one: a gather of 8 took a Zen 3 3.7 ns, these 2.2 (its broadcasts and
  // blends, or inserts of integers for floats, no less).

  /// table[index[i]].
  QLORA_INLINE static Floats look_up(const float* table, const std::uint8_t* index) {
    const auto four = [&](const std::uint8_t* i) QLORA_INLINE_LAMBDA {
      __m128 v = _mm_load_ss(table + i[0]);
      v = _mm_insert_ps(v, _mm_load_ss(table + i[1]), 0x10);
      v = _mm_insert_ps(v, _mm_load_ss(table + i[2]), 0x20);
      return _mm_insert_ps(v, _mm_load_ss(table + i[3]), 0x30);
    };
    return {_mm256_set_m128(four(index + 4), four(index))};
  }
  QLORA_INLINE static Ints look_up(const std::uint32_t* table, Ints index) {
    const auto four = [&](__m128i i) QLORA_INLINE_LAMBDA {
      const auto i01 = static_cast<std::uint64_t>(_mm_cvtsi128_si64(i));
      const auto i23 = static_cast<std::uint64_t>(_mm_extract_epi64(i, 1));
      const auto entry = [&](std::uint64_t at)
                             QLORA_INLINE_LAMBDA { return static_cast<int>(table[at]); };
      __m128i v = _mm_cvtsi32_si128(entry(i01 & 0xffffffff));
      v = _mm_insert_epi32(v, entry(i01 >> 32), 1);
      v = _mm_insert_epi32(v, entry(i23 & 0xffffffff), 2);
      return _mm_insert_epi32(v, entry(i23 >> 32), 3);
    };
    return {_mm256_set_m128i(four(_mm256_extracti128_si256(index.v, 1)),
                             four(_mm256_castsi256_si128(index.v)))};
  }

  QLORA_INLINE static void store(float* p, Floats a) { _mm256_storeu_ps(p, a.v); }
  QLORA_INLINE static void store(BFloat16* p, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bfloat16(a));
  }
  /// Lane by lane round_stochastically(a, random).
  QLORA_INLINE static void store(BFloat16* p, Floats a, Ints random) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), upper_halves(a, bits(a) + random));
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

  // -- words of 32 bits

  QLORA_INLINE static Ints broadcast_int(std::uint32_t x) {
    return {_mm256_set1_epi32(static_cast<int>(x))};
  }
  QLORA_INLINE static Ints bits(Floats a) { return {_mm256_castps_si256(a.v)}; }
  /// Of |a|.
  QLORA_INLINE static Ints magnitude_bits(Floats a) {
    return {_mm256_and_si256(bits(a).v, _mm256_set1_epi32(0x7fffffff))};
  }
  template <int count>
  QLORA_INLINE static Ints shift_left(Ints a) {
    return {_mm256_slli_epi32(a.v, count)};
  }
  /// Zeros come in.
  template <int count>
  QLORA_INLINE static Ints shift_right(Ints a) {
    return {_mm256_srli_epi32(a.v, count)};
  }
  QLORA_INLINE static Ints rotate_left_by_one(Ints a) {
    return {_mm256_or_si256(_mm256_add_epi32(a.v, a.v), _mm256_srli_epi32(a.v, 31))};
  }
  /// As signed numbers, as for maximum_lane.
  QLORA_INLINE static Ints maximum(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
  QLORA_INLINE static std::int32_t maximum_lane(Ints a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0b01'00'11'10));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0b10'11'00'01));
    return _mm_cvtsi128_si32(m);
  }
  /// Each half of each word on its own, unsigned; a difference below zero is zero.
  QLORA_INLINE static Ints subtract_halves_to_zero(Ints a, Ints b) {
    return {_mm256_subs_epu16(a.v, b.v)};
  }
  QLORA_INLINE static Ints minimum_of_halves(Ints a, Ints b) {
    return {_mm256_min_epu16(a.v, b.v)};
  }
  /// Lane by lane `if_set` where the sign bit of `sign` is set, else `if_clear`.
  QLORA_INLINE static Ints select_by_sign(Ints sign, Ints if_set, Ints if_clear) {
    return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(if_clear.v),
                                                 _mm256_castsi256_ps(if_set.v),
                                                 _mm256_castsi256_ps(sign.v)))};
  }
  /// `a` where `x` is not zero (NaN is not), else 0.
  QLORA_INLINE static Ints keep_where_not_zero(Floats x, Ints a) {
    const __m256 is_not_zero = _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return {_mm256_and_si256(_mm256_castps_si256(is_not_zero), a.v)};
  }

  /// `x` where the unsigned `a` is at least `b`, else +0.
  QLORA_INLINE static Floats keep_where_at_least(Ints a, Ints b, Floats x) {
    const __m256i is_kept = _mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), a.v);
    return {_mm256_and_ps(_mm256_castsi256_ps(is_kept), x.v)};
  }
  QLORA_INLINE static Ints load_ints(const std::uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  /// 8 halves of words from half `i` of `p` on, where the lower half of a word is the first.
  QLORA_INLINE static Ints load_halves(const std::uint32_t* p, std::int64_t i) {
    const auto* const halves = reinterpret_cast<const char*>(p) + 2 * i;
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)))};
  }

  struct WideProduct {
    Ints upper, lower;
  };
  /// a * factor in 64 bits, unsigned.
  QLORA_INLINE static WideProduct multiply_wide(Ints a, std::uint32_t factor) {
    const __m256i f = _mm256_set1_epi64x(factor);
    const __m256i even = _mm256_mul_epu32(a.v, f);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), f);
    return {{_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)},
            {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)}};
  }
  /// p[4 i + j] = word i of argument j
  QLORA_INLINE static void store_transposed(std::uint32_t* p, Ints a, Ints b, Ints c, Ints d) {
    const __m256i ab_low = _mm256_unpacklo_epi32(a.v, b.v),
                  ab_high = _mm256_unpackhi_epi32(a.v, b.v);
    const __m256i cd_low = _mm256_unpacklo_epi32(c.v, d.v),
                  cd_high = _mm256_unpackhi_epi32(c.v, d.v);
    // Half h of register r holds the words 4 h + r.
    const __m256i r[4] = {
        _mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 4 * i), _mm256_castsi256_si128(r[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 + 4 * i),
                       _mm256_extracti128_si256(r[i], 1));
    }
  }

  /// Stores the four times 8 words, each at most 255, as bytes.
  QLORA_INLINE static void store_bytes(std::uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
    // Packing works within halves of a register: the result's words are to be transposed.
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packus_epi32(a.v, b.v), _mm256_packus_epi32(c.v, d.v));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(packed, order));
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
    return upper_halves(a, {rounded});
  }
  /// Round to nearest even, as from_float<Float16>: NaN loses its payload.
  QLORA_INLINE static __m128i narrow_float16(Floats a) {
    const __m256 sign = _mm256_and_ps(a.v, _mm256_set1_ps(-0.0f));
    const __m256 nan = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
    const __m256 plain = _mm256_blendv_ps(a.v, nan, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    return _mm256_cvtps_ph(plain, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  /// round_through<T> of every lane.
  template <typename T>
  QLORA_INLINE static Floats round_to(Floats a) {
    if constexpr (std::is_same_v<T, BFloat16>) return widen_bfloat16(narrow_bfloat16(a));
    if constexpr (std::is_same_v<T, Float16>) return {_mm256_cvtph_ps(narrow_float16(a))};
    return a;
  }

  // -- shuffles

  /// rows[i] lane j <-> rows[j] lane i.
  QLORA_INLINE static void transpose(Floats (&rows)[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {  // pairs of rows: 2 x 2 blocks
      a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
      a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {  // 4 x 4 blocks, one in each 128-bit lane
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      rows[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }

 private:
  /// The upper halves of `rounded`, but 0x7fc0 where `a` is NaN.
  QLORA_INLINE static __m128i upper_halves(Floats a, Ints rounded) {
    const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256i upper = _mm256_blendv_epi8(
        _mm256_srli_epi32(rounded.v, 16), _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(is_nan));
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
  QLORA_INLINE static __m256i first(std::int64_t count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
  }
};

}  // namespace qlora::avx2
