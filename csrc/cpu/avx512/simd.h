// 16 fp32 lanes: what the kernel templates of cpu/simd/ are written in. cpu/avx2/simd.h declares
// the same names for 8 lanes. Only sources that are compiled for AVX-512 may include it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/avx512/transpose.h"
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

  /// 16 words of 32 bits.
  struct Ints {
    __m512i v;

    QLORA_INLINE friend Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
    QLORA_INLINE friend Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
  };

  QLORA_INLINE static Floats zero() { return {_mm512_setzero_ps()}; }
  QLORA_INLINE static Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }

  /// a * b + c, rounded once.
  QLORA_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  QLORA_INLINE static Floats sqrt(Floats a) { return {_mm512_sqrt_ps(a.v)}; }

  /// A number that many are divided by: positive and normal, with a normal reciprocal.
  struct Divisor {
    Floats value, reciprocal;

    QLORA_INLINE explicit Divisor(float x) : value(broadcast(x)), reciprocal(broadcast(1.0f / x)) {}
  };
  /// a / divisor, to the bit, for a of 0, Inf, NaN or so large that neither the quotient nor 2^-48 a
  /// is subnormal; off the divider, which square roots keep busy. The product with the reciprocal is
  /// within 1.5 last places of the quotient, the first correction makes it one of the quotient's two
  /// neighbours, from which the second rounds it correctly (Markstein 1990, given a correctly
  /// rounded reciprocal). Inf would become NaN.
  QLORA_INLINE static Floats divide(Floats a, const Divisor& divisor) {
    const __mmask16 is_finite =
        _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(std::numeric_limits<float>::infinity()), _CMP_LT_OQ);
    __m512 quotient = _mm512_mul_ps(a.v, divisor.reciprocal.v);
    __m512 rest = _mm512_fnmadd_ps(quotient, divisor.value.v, a.v);
    quotient = _mm512_mask3_fmadd_ps(rest, divisor.reciprocal.v, quotient, is_finite);
    rest = _mm512_fnmadd_ps(quotient, divisor.value.v, a.v);
    return {_mm512_mask3_fmadd_ps(rest, divisor.reciprocal.v, quotient, is_finite)};
  }

  /// 1 or -1 with the sign of `a`; 0 and NaN stay.
  QLORA_INLINE static Floats sign(Floats a) {
    const __m512 one =
        _mm512_or_ps(_mm512_and_ps(a.v, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    const __mmask16 is_signed = _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    return {_mm512_mask_mov_ps(a.v, is_signed, one)};
  }

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
  QLORA_INLINE static Floats look_up(const float* table, const std::uint8_t* index) {
    const __m512i lane_index =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), all_lanes(), lane_index, table,
                                     sizeof(float))};
  }
  QLORA_INLINE static Ints look_up(const std::uint32_t* table, Ints index) {
    return {_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), all_lanes(), index.v, table,
                                        sizeof(std::uint32_t))};
  }

  QLORA_INLINE static void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
  QLORA_INLINE static void store(BFloat16* p, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(a));
  }
  /// Lane by lane round_stochastically(a, random).
  QLORA_INLINE static void store(BFloat16* p, Floats a, Ints random) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper_halves(a, bits(a) + random));
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

  // -- words of 32 bits

  QLORA_INLINE static Ints broadcast_int(std::uint32_t x) {
    return {_mm512_set1_epi32(static_cast<int>(x))};
  }
  QLORA_INLINE static Ints bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
  /// Of |a|.
  QLORA_INLINE static Ints magnitude_bits(Floats a) {
    return {_mm512_and_si512(bits(a).v, _mm512_set1_epi32(0x7fffffff))};
  }
  template <int count>
  QLORA_INLINE static Ints shift_left(Ints a) {
    return {_mm512_slli_epi32(a.v, count)};
  }
  /// Zeros come in.
  template <int count>
  QLORA_INLINE static Ints shift_right(Ints a) {
    return {_mm512_srli_epi32(a.v, count)};
  }
  QLORA_INLINE static Ints rotate_left_by_one(Ints a) { return {_mm512_rol_epi32(a.v, 1)}; }
  /// As signed numbers, as for maximum_lane.
  QLORA_INLINE static Ints maximum(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
  QLORA_INLINE static std::int32_t maximum_lane(Ints a) { return _mm512_reduce_max_epi32(a.v); }
  /// Each half of each word on its own, unsigned; a difference below zero is zero.
  QLORA_INLINE static Ints subtract_halves_to_zero(Ints a, Ints b) {
    return {_mm512_subs_epu16(a.v, b.v)};
  }
  QLORA_INLINE static Ints minimum_of_halves(Ints a, Ints b) {
    return {_mm512_min_epu16(a.v, b.v)};
  }
  /// Lane by lane `if_set` where the sign bit of `sign` is set, else `if_clear`.
  QLORA_INLINE static Ints select_by_sign(Ints sign, Ints if_set, Ints if_clear) {
    return {_mm512_mask_mov_epi32(if_clear.v, _mm512_movepi32_mask(sign.v), if_set.v)};
  }
  /// `a` where `x` is not zero (NaN is not), else 0.
  QLORA_INLINE static Ints keep_where_not_zero(Floats x, Ints a) {
    const __mmask16 is_not_zero = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return {_mm512_maskz_mov_epi32(is_not_zero, a.v)};
  }

  /// `x` where the unsigned `a` is at least `b`, else +0.
  QLORA_INLINE static Floats keep_where_at_least(Ints a, Ints b, Floats x) {
    return {_mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(a.v, b.v), x.v)};
  }
  QLORA_INLINE static Ints load_ints(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  /// 16 halves of words from half `i` of `p` on, where the lower half of a word is the first.
  QLORA_INLINE static Ints load_halves(const std::uint32_t* p, std::int64_t i) {
    const auto* const halves = reinterpret_cast<const char*>(p) + 2 * i;
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)))};
  }

  struct WideProduct {
    Ints upper, lower;
  };
  /// a * factor in 64 bits, unsigned.
  QLORA_INLINE static WideProduct multiply_wide(Ints a, std::uint32_t factor) {
    const __m512i f = _mm512_set1_epi64(factor);
    const __m512i even = _mm512_mul_epu32(a.v, f);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), f);
    return {{_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd)},
            {_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32))}};
  }
  /// p[4 i + j] = word i of argument j
  QLORA_INLINE static void store_transposed(std::uint32_t* p, Ints a, Ints b, Ints c, Ints d) {
    const __m512i ab_low = _mm512_unpacklo_epi32(a.v, b.v),
                  ab_high = _mm512_unpackhi_epi32(a.v, b.v);
    const __m512i cd_low = _mm512_unpacklo_epi32(c.v, d.v),
                  cd_high = _mm512_unpackhi_epi32(c.v, d.v);
    // Quarter q of register r holds the words 4 q + r.
    const __m512i r[4] = {
        _mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 4 * i), _mm512_castsi512_si128(r[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 + 4 * i),
                       _mm512_extracti32x4_epi32(r[i], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32 + 4 * i),
                       _mm512_extracti32x4_epi32(r[i], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 48 + 4 * i),
                       _mm512_extracti32x4_epi32(r[i], 3));
    }
  }

  /// Stores the four times 16 words, each at most 255, as bytes.
  QLORA_INLINE static void store_bytes(std::uint8_t* p, Ints a, Ints b, Ints c, Ints d) {
    // Packing works within quarters of a register: the result's words are to be transposed.
    const __m512i packed =
        _mm512_packus_epi16(_mm512_packus_epi32(a.v, b.v), _mm512_packus_epi32(c.v, d.v));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
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
    return upper_halves(a, {rounded});
  }
  /// Round to nearest even, as from_float<Float16>: NaN loses its payload.
  QLORA_INLINE static __m256i narrow_float16(Floats a) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i sign_and_nan =
        _mm512_or_si512(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)),
                        _mm512_set1_epi32(0x7fc00000));
    const __m512 plain = _mm512_mask_mov_ps(a.v, is_nan, _mm512_castsi512_ps(sign_and_nan));
    return _mm512_cvtps_ph(plain, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  /// round_through<T> of every lane.
  template <typename T>
  QLORA_INLINE static Floats round_to(Floats a) {
    if constexpr (std::is_same_v<T, BFloat16>) return widen_bfloat16(narrow_bfloat16(a));
    if constexpr (std::is_same_v<T, Float16>) return {_mm512_cvtph_ps(narrow_float16(a))};
    return a;
  }

  // -- shuffles

  /// rows[i] lane j <-> rows[j] lane i.
  QLORA_INLINE static void transpose(Floats (&rows)[16]) {
    __m512i bits[16];
    for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(rows[i].v);
    transpose16(bits);
    for (int i = 0; i < 16; ++i) rows[i].v = _mm512_castsi512_ps(bits[i]);
  }

 private:
  /// The upper halves of `rounded`, but 0x7fc0 where `a` is NaN.
  QLORA_INLINE static __m256i upper_halves(Floats a, Ints rounded) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i upper =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded.v, 16), is_nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(upper);
  }
  /// For gathers, hidden from the compiler: where it knows the mask to be full, GCC gathers into a
  /// register as it is, and the gather waits for what was last computed there.
  QLORA_INLINE static __mmask16 all_lanes() {
    __mmask16 all = 0xffff;
    asm("" : "+Yk"(all));
    return all;
  }
  QLORA_INLINE static __mmask16 first(std::int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1u);
  }
};

}  // namespace qlora::avx512
