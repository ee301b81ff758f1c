#include "cpu/avx512/kernels.h"
#include "cpu/avx512/simd.h"
#include "cpu/scalar/dynamic_map_encoder.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/nf4_dequantize.h"
#include "cpu/simd/nf4_quantize.h"
#include "cpu/simd/nf4_quantize_scales.h"
#include "format/nf4_encode_table.h"

namespace qlora::avx512 {
namespace {

using Floats = Simd::Floats;

/// Magnitudes as integers: their bit patterns are ordered as the numbers are, with NaN above Inf.
class Magnitudes {
 public:
  QLORA_INLINE void grow(Floats x) {
    const __m512i magnitude =
        _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
    bits_ = _mm512_max_epi32(bits_, magnitude);
  }
  QLORA_INLINE void grow(Magnitudes other) { bits_ = _mm512_max_epi32(bits_, other.bits_); }
  QLORA_INLINE std::int32_t largest() const { return _mm512_reduce_max_epi32(bits_); }

 private:
  __m512i bits_ = _mm512_setzero_si512();
};

constexpr NF4EncodeTable encode_table = nf4_encode_table;  // an object of this set's own

/// NF4EncodeTable in four registers: a bin's number picks one of 32 entries in one instruction.
class Encoder {
 public:
  /// 32 elements in units of absmax.
  QLORA_INLINE void encode(const Floats (&x)[2], std::uint8_t* codes) const {
    // Pairs of codes to bytes. Packing interleaves the two vectors' 128-bit lanes, and a
    // multiply-add takes 16 * even + odd; the bytes 4l to 4l + 3 are then two of the first vector
    // and two of the second.
    const __m512i words = _mm512_packs_epi32(codes_of(x[0]), codes_of(x[1]));
    const __m512i pairs = _mm512_madd_epi16(words, _mm512_set1_epi32(1 << 16 | 16));
    const __m128i bytes =
        _mm_shuffle_epi8(_mm512_cvtepi32_epi8(pairs),
                         _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), bytes);
  }

 private:
  QLORA_INLINE __m512i codes_of(Floats x) const {
    const __m512i bin = _mm512_castps_si512(
        Simd::fma(x, Simd::broadcast(nf4_bins_per_unit), Simd::broadcast(nf4_bin_rounder)).v);
    const __m512 threshold = _mm512_permutex2var_ps(thresholds_[0], bin, thresholds_[1]);
    const __m512i base = _mm512_permutex2var_epi32(bases_[0], bin, bases_[1]);
    const __mmask16 is_above = _mm512_cmp_ps_mask(x.v, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(base, is_above, base, _mm512_set1_epi32(1));
  }

  __m512 thresholds_[2] = {_mm512_loadu_ps(encode_table.threshold),
                           _mm512_loadu_ps(encode_table.threshold + 16)};
  __m512i bases_[2] = {_mm512_loadu_si512(encode_table.base),
                       _mm512_loadu_si512(encode_table.base + 16)};
};

// An object of this set's own, too.
constexpr scalar::DynamicMapEncoder scale_encoder{signed_dynamic_map};

/// DynamicMapEncoder on 16 lanes.
QLORA_INLINE void encode_scales(Floats x, std::uint8_t* codes) {
  using Map = scalar::DynamicMapEncoder;
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i smallest = _mm512_set1_epi32(Map::smallest_upper_bits);
  const __m512i upper = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x7fff));
  const __m512i bucket =
      _mm512_min_epi32(_mm512_sub_epi32(_mm512_max_epi32(upper, smallest), smallest),
                       _mm512_set1_epi32(Map::bucket_count - 1));
  const __m512i index = _mm512_mask_add_epi32(bucket, _mm512_movepi32_mask(bits), bucket,
                                              _mm512_set1_epi32(Map::bucket_count));
  const __m512i first = _mm512_and_si512(
      _mm512_i32gather_epi32(index, scale_encoder.first_codes(), 1), _mm512_set1_epi32(0xff));
  const __m512 midpoint = _mm512_i32gather_ps(first, scale_encoder.midpoints(), 4);
  const __mmask16 is_above = _mm512_cmp_ps_mask(x.v, midpoint, _CMP_GT_OQ);
  const __m512i code = _mm512_mask_add_epi32(first, is_above, first, _mm512_set1_epi32(1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
}

struct Cached {
  QLORA_INLINE static void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
};

struct Streamed {
  static constexpr std::uintptr_t alignment = 64;
  QLORA_INLINE static void store(void* p, __m512i v) {
    _mm512_stream_si512(static_cast<__m512i*>(p), v);
  }
};

/// Code c times the block's scale, for every c.
QLORA_INLINE Floats scaled_levels(float scale) {
  const Floats levels = {_mm512_setr_ps(
      nf4_level(0), nf4_level(1), nf4_level(2), nf4_level(3), nf4_level(4), nf4_level(5),
      nf4_level(6), nf4_level(7), nf4_level(8), nf4_level(9), nf4_level(10), nf4_level(11),
      nf4_level(12), nf4_level(13), nf4_level(14), nf4_level(15))};
  return levels * Simd::broadcast(scale);
}

QLORA_INLINE __m256i narrow(Floats x, BFloat16) { return Simd::narrow_bfloat16(x); }
QLORA_INLINE __m256i narrow(Floats x, Float16) { return Simd::narrow_float16(x); }

/// 16-bit types. A byte of codes spreads to two words, its high nibble first, which index a table of
/// 32 entries: `vpermw` reads 5 bits, so the 16 values are there twice and bit 4 does not matter.
template <typename T>
class Decoder {
 public:
  QLORA_INLINE explicit Decoder(float scale)
      : table_(_mm512_broadcast_i64x4(narrow(scaled_levels(scale), T{}))) {}

  template <typename Store>
  QLORA_INLINE void decode(const std::uint8_t* codes, T* out) const {
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i nibbles =
        _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    Store::store(out, _mm512_permutexvar_epi16(nibbles, table_));
  }

 private:
  __m512i table_;
};

/// As above, with double words; `vpermps` reads 4 bits.
template <>
class Decoder<float> {
 public:
  QLORA_INLINE explicit Decoder(float scale) : table_(scaled_levels(scale).v) {}

  template <typename Store>
  QLORA_INLINE void decode(const std::uint8_t* codes, float* out) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i bytes =
          _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * half)));
      const __m512i nibbles =
          _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      const __m512 values = _mm512_permutexvar_ps(nibbles, table_);
      Store::store(out + 16 * half, _mm512_castps_si512(values));
    }
  }

 private:
  __m512 table_;
};

struct Codec {
  using Simd = avx512::Simd;
  using Magnitudes = avx512::Magnitudes;
  using Encoder = avx512::Encoder;
  template <typename T>
  using Decoder = avx512::Decoder<T>;
  using Cached = avx512::Cached;
  using Streamed = avx512::Streamed;
  QLORA_INLINE static void fence() { _mm_sfence(); }
  QLORA_INLINE static void encode_scales(Floats x, std::uint8_t* codes) {
    avx512::encode_scales(x, codes);
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

}  // namespace qlora::avx512
