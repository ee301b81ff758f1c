#include "cpu/avx2/kernels.h"
#include "cpu/avx2/simd.h"
#include "cpu/scalar/dynamic_map_encoder.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/nf4_dequantize.h"
#include "cpu/simd/nf4_quantize.h"
#include "cpu/simd/nf4_quantize_scales.h"

namespace qlora::avx2 {
namespace {

using Floats = Simd::Floats;

/// Magnitudes as integers: their bit patterns are ordered as the numbers are, with NaN above Inf.
class Magnitudes {
 public:
  QLORA_INLINE void grow(Floats x) {
    const __m256i magnitude =
        _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff));
    bits_ = _mm256_max_epi32(bits_, magnitude);
  }
  QLORA_INLINE void grow(Magnitudes other) { bits_ = _mm256_max_epi32(bits_, other.bits_); }
  QLORA_INLINE std::int32_t largest() const {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits_), _mm256_extracti128_si256(bits_, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(m);
  }

 private:
  __m256i bits_ = _mm256_setzero_si256();
};

/// nf4_encode's binary search. A comparison gives -1 where x lies above, so the codes are counted
/// downward from 0, and a look-up, which reads 3 bits, finds entry i at -i modulo 8.
class Encoder {
 public:
  /// 32 elements in units of absmax.
  QLORA_INLINE void encode(const Floats (&x)[4], std::uint8_t* codes) const {
    // Pairs of codes to bytes: 16 * even + odd by a multiply-add. Packing interleaves 128-bit
    // lanes: as lane 0 has the even fours of elements of x, and lane 1 the odd ones, the last
    // shuffle puts a pair of bytes of each in turn.
    const __m256i low = _mm256_packs_epi32(negative_codes_of(x[0]), negative_codes_of(x[1]));
    const __m256i high = _mm256_packs_epi32(negative_codes_of(x[2]), negative_codes_of(x[3]));
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_set1_epi16(1 << 8 | 16), _mm256_packs_epi16(low, high));
    const __m256i words = _mm256_sub_epi16(_mm256_setzero_si256(), pairs);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                     _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13,
                                                           6, 7, 14, 15)));
  }

 private:
  QLORA_INLINE __m256i negative_codes_of(Floats x) const {
    __m256i code = compare(x, _mm256_set1_ps(nf4_threshold(7)));
    code = next_bit(code, compare(x, _mm256_permutevar8x32_ps(of_first_bit_, code)));
    code = next_bit(code, compare(x, _mm256_permutevar8x32_ps(of_two_bits_, code)));
    return next_bit(code, compare(x, _mm256_permutevar8x32_ps(of_three_bits_, code)));
  }
  QLORA_INLINE static __m256i compare(Floats x, __m256 threshold) {
    return _mm256_castps_si256(_mm256_cmp_ps(x.v, threshold, _CMP_GT_OQ));
  }
  QLORA_INLINE static __m256i next_bit(__m256i code, __m256i bit) {
    return _mm256_add_epi32(_mm256_add_epi32(code, code), bit);
  }

  __m256 of_first_bit_ = _mm256_setr_ps(nf4_threshold(3), 0, 0, 0, 0, 0, 0, nf4_threshold(11));
  __m256 of_two_bits_ = _mm256_setr_ps(nf4_threshold(1), 0, 0, 0, 0, nf4_threshold(13),
                                       nf4_threshold(9), nf4_threshold(5));
  __m256 of_three_bits_ =
      _mm256_setr_ps(nf4_threshold(0), nf4_threshold(14), nf4_threshold(12), nf4_threshold(10),
                     nf4_threshold(8), nf4_threshold(6), nf4_threshold(4), nf4_threshold(2));
};

// An object of this set's own: signed_dynamic_map_encoder is one for all.
constexpr scalar::DynamicMapEncoder scale_encoder{signed_dynamic_map};

/// DynamicMapEncoder on 8 lanes.
QLORA_INLINE void encode_scales(Floats x, std::uint8_t* codes) {
  using Map = scalar::DynamicMapEncoder;
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i smallest = _mm256_set1_epi32(Map::smallest_upper_bits);
  const __m256i upper = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x7fff));
  const __m256i bucket =
      _mm256_min_epi32(_mm256_sub_epi32(_mm256_max_epi32(upper, smallest), smallest),
                       _mm256_set1_epi32(Map::bucket_count - 1));
  const __m256i index = _mm256_add_epi32(
      bucket, _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(Map::bucket_count)));
  const __m256i first = _mm256_and_si256(
      _mm256_i32gather_epi32(reinterpret_cast<const int*>(scale_encoder.first_codes()), index, 1),
      _mm256_set1_epi32(0xff));
  const __m256 midpoint = _mm256_i32gather_ps(scale_encoder.midpoints(), first, 4);
  const __m256i is_above = _mm256_castps_si256(_mm256_cmp_ps(x.v, midpoint, _CMP_GT_OQ));
  const __m256i code = _mm256_sub_epi32(first, is_above);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), _mm_packus_epi16(words, words));
}

struct Cached {
  QLORA_INLINE static void store(void* p, __m256i v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
};

struct Streamed {
  static constexpr std::uintptr_t alignment = 32;
  QLORA_INLINE static void store(void* p, __m256i v) {
    _mm256_stream_si256(static_cast<__m256i*>(p), v);
  }
};

/// Codes 0 to 7, or 8 to 15, times the block's scale.
QLORA_INLINE Floats scaled_levels(float scale, int first) {
  const Floats levels = {_mm256_setr_ps(
      nf4_level(first), nf4_level(first + 1), nf4_level(first + 2), nf4_level(first + 3),
      nf4_level(first + 4), nf4_level(first + 5), nf4_level(first + 6), nf4_level(first + 7))};
  return levels * Simd::broadcast(scale);
}

QLORA_INLINE __m128i narrow(Floats x, BFloat16) { return Simd::narrow_bfloat16(x); }
QLORA_INLINE __m128i narrow(Floats x, Float16) { return Simd::narrow_float16(x); }

/// 16-bit types: the low and the high byte of the 16 values, in two tables of `vpshufb`.
template <typename T>
class Decoder {
 public:
  QLORA_INLINE explicit Decoder(float scale) {
    const __m128i first = narrow(scaled_levels(scale, 0), T{});
    const __m128i second = narrow(scaled_levels(scale, 8), T{});
    const __m128i byte = _mm_set1_epi16(0xff);
    low_ = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    high_ = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  }

  template <typename Store>
  QLORA_INLINE void decode(const std::uint8_t* codes, T* out) const {
    // Unpacking takes the lower half of each lane first: the middle fours of bytes change places,
    // so that it is the lower half of the elements.
    const __m128i bytes = _mm_shuffle_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), _MM_SHUFFLE(3, 1, 2, 0));
    const __m256i words = _mm256_cvtepu8_epi16(bytes);
    const __m256i nibbles =
        _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8)),
                         _mm256_set1_epi8(0x0f));
    const __m256i low = _mm256_shuffle_epi8(low_, nibbles);
    const __m256i high = _mm256_shuffle_epi8(high_, nibbles);
    Store::store(out, _mm256_unpacklo_epi8(low, high));
    Store::store(out + 16, _mm256_unpackhi_epi8(low, high));
  }

 private:
  __m256i low_, high_;
};

/// `vpermps` reads 3 bits of a code; the fourth, in the sign, chooses between two tables.
template <>
class Decoder<float> {
 public:
  QLORA_INLINE explicit Decoder(float scale)
      : below_8_(scaled_levels(scale, 0).v), from_8_(scaled_levels(scale, 8).v) {}

  template <typename Store>
  QLORA_INLINE void decode(const std::uint8_t* codes, float* out) const {
    for (int quarter = 0; quarter < 4; ++quarter) {
      std::int32_t four;
      std::memcpy(&four, codes + 4 * quarter, sizeof four);
      const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
      const __m256i nibbles =
          _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
      const __m256 values = _mm256_blendv_ps(_mm256_permutevar8x32_ps(below_8_, nibbles),
                                             _mm256_permutevar8x32_ps(from_8_, nibbles),
                                             _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)));
      Store::store(out + 8 * quarter, _mm256_castps_si256(values));
    }
  }

 private:
  __m256 below_8_, from_8_;
};

struct Codec {
  using Simd = avx2::Simd;
  using Magnitudes = avx2::Magnitudes;
  using Encoder = avx2::Encoder;
  template <typename T>
  using Decoder = avx2::Decoder<T>;
  using Cached = avx2::Cached;
  using Streamed = avx2::Streamed;
  QLORA_INLINE static void fence() { _mm_sfence(); }
  QLORA_INLINE static void encode_scales(Floats x, std::uint8_t* codes) {
    avx2::encode_scales(x, codes);
  }
};

}  // namespace

std::int64_t nf4_quantize(const TensorView& w, const NF4Bytes& out, float* absmax,
                          double* group_sums, std::int64_t begin, std::int64_t end) {
  return simd::with_float_type(w.dtype, [&]<typename T>(T) {
    return simd::nf4_quantize_groups<Codec>(w.as<const T>(), out, absmax, group_sums, begin, end);
  });
}

void nf4_quantize_scales(const float* absmax, float offset, const NF4Bytes& out, std::int64_t begin,
                         std::int64_t end) {
  simd::nf4_quantize_scales<Codec>(absmax, offset, out, begin, end);
}

void nf4_dequantize(const NF4Bytes& weight, const TensorView& out, std::int64_t begin,
                    std::int64_t end) {
  simd::with_float_type(out.dtype, [&]<typename T>(T) {
    simd::nf4_dequantize<Codec>(weight, out.as<T>(), begin, end);
  });
}

}  // namespace qlora::avx2
