// The codec of the active instruction set gives the scalar set's bits, for inputs chosen to be hard
// on vectors: every kind of tail, elements at and beside every threshold, every 16-bit number.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/instruction_sets.h"
#include "format/nf4.h"
#include "format/nf4_encode_table.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::int64_t block_sizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};
constexpr float largest = std::numeric_limits<float>::max();

/// Bytes of exactly the size asked for, poisoned, so that AddressSanitizer sees a step beyond.
Bytes poisoned(std::int64_t count) { return Bytes(static_cast<std::size_t>(count), 0xff); }

struct Quantized {
  Bytes codes, scale_codes, nested_absmax, nested_offset;
  std::vector<std::uint32_t> absmax;
  std::vector<std::uint64_t> group_sums;
  std::int64_t bad_block = 0;

  friend bool operator==(const Quantized&, const Quantized&) = default;
};

TensorView view_of(void* data, DType dtype, std::int64_t count) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.shape = {1, count};
  view.is_present = true;
  return view;
}

template <typename To, typename From>
std::vector<To> bits_of(const std::vector<From>& values) {
  std::vector<To> out;
  for (const From value : values) out.push_back(std::bit_cast<To>(value));
  return out;
}

template <typename T>
Quantized quantize(const CpuKernels& set, DType dtype, std::vector<T> w, std::int64_t block_size) {
  w.shrink_to_fit();
  const auto count = static_cast<std::int64_t>(w.size());
  const std::int64_t blocks = nf4_block_count(count, block_size);
  const std::int64_t groups = nf4_nested_block_count(blocks);
  Quantized out{.codes = poisoned(nf4_code_bytes(count)),
                .scale_codes = poisoned(blocks),
                .nested_absmax = poisoned(4 * groups),
                .nested_offset = poisoned(4),
                .absmax = {},
                .group_sums = {}};
  std::vector<float> absmax(static_cast<std::size_t>(blocks));
  std::vector<double> sums(static_cast<std::size_t>(groups));
  const NF4Bytes bytes{.codes = out.codes.data(),
                       .absmax = out.scale_codes.data(),
                       .nested_absmax = out.nested_absmax.data(),
                       .nested_offset = out.nested_offset.data(),
                       .n = 1,
                       .k = count,
                       .block_size = block_size};
  out.bad_block = set.nf4_quantize(view_of(w.data(), dtype, count), bytes, absmax.data(),
                                   sums.data(), 0, groups);
  if (out.bad_block >= 0) {  // what the outputs hold is then left open
    Quantized refused;
    refused.bad_block = out.bad_block;
    return refused;
  }
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  set.nf4_quantize_scales(absmax.data(), static_cast<float>(sum / static_cast<double>(blocks)),
                          bytes, 0, groups);
  out.absmax = bits_of<std::uint32_t>(absmax);
  out.group_sums = bits_of<std::uint64_t>(sums);
  return out;
}

template <typename T>
void expect_scalar_bits(DType dtype, const std::vector<T>& w, std::int64_t block_size) {
  SCOPED_TRACE(message(dtype, ", ", w.size(), " elements, block ", block_size));
  ASSERT_EQ(quantize(kernels(), dtype, w, block_size),
            quantize(scalar_kernels(), dtype, w, block_size));
}

/// Finite numbers; each run of 32 has a magnitude of its own, from subnormal to near the largest.
template <typename T>
std::vector<T> random_numbers(std::int64_t count, Generator& generator) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> exponent(sizeof(T) == 2 ? -24 : -149, 124);
  std::vector<T> out;
  float scale = 1.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i % 32 == 0) scale = generator() % 2 ? 0.02f : std::ldexp(1.0f, exponent(generator));
    const float value = std::fmin(std::fmax(normal(generator) * scale, -largest), largest);
    T element = from_float<T>(value);
    if (!std::isfinite(to_float(element))) element = from_float<T>(1.0f);
    out.push_back(element);
  }
  return out;
}

template <typename T>
void quantize_every_tail(DType dtype) {
  Generator generator(31);
  std::vector<std::int64_t> counts(140);
  std::iota(counts.begin(), counts.end(), 1);
  for (const std::int64_t around : {256, 512, 4096, 8192, 16384, 5 * 8192 + 3 * 32}) {
    for (const std::int64_t beside : {-33, -32, -31, -17, -16, -15, -1, 0, 1, 2, 15, 16, 17, 31}) {
      counts.push_back(around + beside);
    }
  }
  for (const std::int64_t count : counts) {
    const std::vector<T> w = random_numbers<T>(count, generator);
    for (const std::int64_t block_size : block_sizes) expect_scalar_bits(dtype, w, block_size);
  }
}

TEST(CpuNF4QuantizeBits, EveryTailOfFloat32) { quantize_every_tail<float>(DType::float32); }
TEST(CpuNF4QuantizeBits, EveryTailOfBFloat16) { quantize_every_tail<BFloat16>(DType::bfloat16); }
TEST(CpuNF4QuantizeBits, EveryTailOfFloat16) { quantize_every_tail<Float16>(DType::float16); }

TEST(CpuNF4QuantizeBits, ElementsAtAndBesideEveryThresholdAndBinInBlocksOfEveryMagnitude) {
  std::vector<float> centers;
  for (int i = 0; i < nf4_level_count; ++i) centers.push_back(nf4_level(i));
  for (int i = 0; i + 1 < nf4_level_count; ++i) centers.push_back(nf4_threshold(i));
  for (int i = -15; i < 15; ++i) {
    centers.push_back((static_cast<float>(i) + 0.5f) / nf4_bins_per_unit);
  }
  const float magnitudes[] = {1.0f,       3.0f,      0.02f,     0x1.fffffep-1f,   0x1.000002p0f,
                              0x1p-126f,  0x1p-127f, 0x1p-128f, 0x1.000008p-128f, 0x1p-133f,
                              0x1.8p126f, largest};
  for (const float magnitude : magnitudes) {
    for (const float sign : {1.0f, -1.0f}) {
      std::vector<float> w;
      for (const float center : centers) {
        float x = sign * center * magnitude;
        for (int i = 0; i < 8; ++i) x = std::nextafter(x, -largest);
        for (int i = 0; i < 17; ++i, x = std::nextafter(x, largest)) {
          if (w.size() % 32 == 0) w.push_back(magnitude);  // every block's absmax
          if (std::fabs(x) <= magnitude) w.push_back(x);
        }
      }
      for (const std::int64_t block_size : {32, 64}) {
        expect_scalar_bits(DType::float32, w, block_size);
      }
    }
  }
}

template <typename T>
void quantize_every_number(DType dtype) {
  std::vector<T> w;
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const T element{static_cast<std::uint16_t>(bits)};
    if (std::isfinite(to_float(element))) w.push_back(element);
  }
  Generator generator(32);
  for (int order = 0; order < 4; ++order) {  // ascending, so that blocks are of like numbers; mixed
    for (const std::int64_t block_size : block_sizes) expect_scalar_bits(dtype, w, block_size);
    std::shuffle(w.begin(), w.end(), generator);
  }
}

TEST(CpuNF4QuantizeBits, EveryBFloat16) { quantize_every_number<BFloat16>(DType::bfloat16); }
TEST(CpuNF4QuantizeBits, EveryFloat16) { quantize_every_number<Float16>(DType::float16); }

TEST(CpuNF4QuantizeBits, TheFirstBadBlockOfAnyOrderOfGroups) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> good(6 * 256 * 32 + 40, 0.5f);
  const std::pair<std::int64_t, std::int64_t> blocks[] = {
      {255, 256}, {256, 255}, {300, 1000}, {1023, 768}, {1024, 1023}, {1537, 5}, {1536, 1537}};
  for (const auto& [first, second] : blocks) {
    std::vector<float> w = good;
    w[static_cast<std::size_t>(32 * first + 7)] = -inf;
    w[static_cast<std::size_t>(32 * second + 1)] = std::nanf("");
    EXPECT_EQ(quantize(kernels(), DType::float32, w, 32).bad_block, std::min(first, second));
  }
}

TEST(CpuNF4QuantizeScalesBits, EveryTailEveryMidpointAndEveryMagnitude) {
  Generator generator(33);
  std::vector<float> hard;  // units of the group's largest distance from the offset
  for (const float midpoint : signed_dynamic_map.midpoints) {
    for (const float x :
         {std::nextafter(midpoint, -2.0f), midpoint, std::nextafter(midpoint, 2.0f)})
      hard.push_back(x);
  }
  for (const float magnitude : {1.0f, 0.7f, 0x1p-10f, 0x1p-127f, 0x1p-133f, 0x1p-149f, 0x1p126f}) {
    for (const float offset : {0.0f, 0.25f * magnitude, magnitude}) {
      for (std::size_t count = 1; count <= hard.size(); count += count < 300 ? 1 : 97) {
        std::shuffle(hard.begin(), hard.end(), generator);
        std::vector<float> absmax;
        for (std::size_t i = 0; i < count; ++i) {
          absmax.push_back(i % 32 ? hard[i] * magnitude + offset : magnitude + offset);
        }
        const auto blocks = static_cast<std::int64_t>(count);
        const auto encode = [&](const CpuKernels& set) {
          const std::int64_t groups = nf4_nested_block_count(blocks);
          std::pair<Bytes, Bytes> out{poisoned(blocks), poisoned(4 * groups)};
          set.nf4_quantize_scales(absmax.data(), offset,
                                  {.codes = nullptr,
                                   .absmax = out.first.data(),
                                   .nested_absmax = out.second.data(),
                                   .nested_offset = nullptr,
                                   .n = blocks,
                                   .k = 32,
                                   .block_size = 32},
                                  0, groups);
          return out;
        };
        ASSERT_EQ(encode(kernels()), encode(scalar_kernels()))
            << count << " scales, " << magnitude << " about " << offset;
      }
    }
  }
}

/// The elements of blocks [begin, end), from `misalignment` elements on into the output.
template <typename T>
Bytes dequantize(const CpuKernels& set, DType dtype, const NF4Bytes& weight,
                 std::int64_t misalignment, std::int64_t begin, std::int64_t end) {
  Bytes out =
      poisoned(static_cast<std::int64_t>(sizeof(T)) * (weight.element_count() + misalignment));
  T* const data = reinterpret_cast<T*>(out.data()) + misalignment;
  set.nf4_dequantize(weight, view_of(data, dtype, weight.element_count()), begin, end);
  return out;
}

template <typename T>
void dequantize_everything(DType dtype) {
  Generator generator(34);
  // Scales of every kind: the kernels see any bytes.
  std::vector<float> scales = {0.0f,
                               1.0f,
                               0.02f,
                               -3.0f,
                               0x1p-126f,
                               0x1p-130f,
                               0x1p-149f,
                               0x1p-20f,
                               0x1.8p-15f,
                               65504.0f,
                               70000.0f,
                               largest,
                               HUGE_VALF,
                               -HUGE_VALF,
                               std::bit_cast<float>(0x7fc00001u),
                               std::bit_cast<float>(0xffa12345u)};
  while (scales.size() < 5000) {
    scales.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(generator())));
  }
  Bytes codes(5000 * 32 / 2);
  for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(generator());
  Bytes scale_codes(5000);
  for (std::uint8_t& byte : scale_codes) byte = static_cast<std::uint8_t>(generator());
  const float offset = 0.3f;
  for (const std::int64_t block_size : block_sizes) {
    for (const std::int64_t count : {1,
                                     2,
                                     15,
                                     16,
                                     17,
                                     31,
                                     32,
                                     33,
                                     63,
                                     64,
                                     65,
                                     127,
                                     129,
                                     255,
                                     257,
                                     4095,
                                     4097,
                                     8192,
                                     32 * 257 + 31,
                                     32 * 5000 - 1,
                                     32 * 5000}) {
      for (const bool is_nested : {false, true}) {
        for (const std::int64_t misalignment : {0, 1}) {
          SCOPED_TRACE(message(dtype, ", ", count, " elements, block ", block_size, ", nested ",
                               is_nested, ", misaligned by ", misalignment));
          const Bytes exact_codes(codes.begin(), codes.begin() + nf4_code_bytes(count));
          const NF4Bytes weight{
              .codes = const_cast<std::uint8_t*>(exact_codes.data()),
              .absmax =
                  is_nested ? scale_codes.data() : reinterpret_cast<std::uint8_t*>(scales.data()),
              .nested_absmax = is_nested ? reinterpret_cast<std::uint8_t*>(scales.data()) : nullptr,
              .nested_offset = is_nested
                                   ? reinterpret_cast<std::uint8_t*>(const_cast<float*>(&offset))
                                   : nullptr,
              .n = 1,
              .k = count,
              .block_size = block_size};
          const std::int64_t blocks = weight.block_count();
          for (const std::int64_t begin : {std::int64_t{0}, blocks / 3}) {
            for (const std::int64_t end : {blocks, blocks - blocks / 5}) {
              ASSERT_EQ(dequantize<T>(kernels(), dtype, weight, misalignment, begin, end),
                        dequantize<T>(scalar_kernels(), dtype, weight, misalignment, begin, end));
            }
          }
        }
      }
    }
  }
}

TEST(CpuNF4DequantizeBits, EverythingToFloat32) { dequantize_everything<float>(DType::float32); }
TEST(CpuNF4DequantizeBits, EverythingToBFloat16) {
  dequantize_everything<BFloat16>(DType::bfloat16);
}
TEST(CpuNF4DequantizeBits, EverythingToFloat16) { dequantize_everything<Float16>(DType::float16); }

/// Large enough that stores go around the caches, where the output is aligned to a vector.
template <typename T>
void dequantize_large(DType dtype) {
  const std::int64_t count = (std::int64_t{17} << 20) / static_cast<std::int64_t>(sizeof(T)) + 5;
  Generator generator(35);
  Bytes codes(static_cast<std::size_t>(nf4_code_bytes(count)));
  for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(generator());
  std::vector<float> scales(static_cast<std::size_t>(nf4_block_count(count, 64)), 0.02f);
  for (std::size_t i = 0; i < scales.size(); ++i) scales[i] *= static_cast<float>(i % 1000);
  const NF4Bytes weight{.codes = codes.data(),
                        .absmax = reinterpret_cast<std::uint8_t*>(scales.data()),
                        .nested_absmax = nullptr,
                        .nested_offset = nullptr,
                        .n = 1,
                        .k = count,
                        .block_size = 64};
  const std::int64_t vector_bytes = 64;
  const auto decode = [&](const CpuKernels& set, std::int64_t misalignment) {
    std::vector<T> memory(static_cast<std::size_t>(count + vector_bytes));
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    T* const data = memory.data() + (vector_bytes - address % vector_bytes) / sizeof(T) +
                    static_cast<std::size_t>(misalignment);
    set.nf4_dequantize(weight, view_of(data, dtype, count), 0, weight.block_count());
    Bytes out(static_cast<std::size_t>(count) * sizeof(T));
    std::memcpy(out.data(), data, out.size());
    return out;
  };
  const Bytes expected = decode(scalar_kernels(), 0);
  EXPECT_TRUE(decode(kernels(), 0) == expected);
  EXPECT_TRUE(decode(kernels(), 8 / static_cast<std::int64_t>(sizeof(T))) == expected);
}

TEST(CpuNF4DequantizeBits, ALargeOutputOfFloat32) { dequantize_large<float>(DType::float32); }
TEST(CpuNF4DequantizeBits, ALargeOutputOfBFloat16) { dequantize_large<BFloat16>(DType::bfloat16); }
TEST(CpuNF4DequantizeBits, ALargeOutputOfFloat16) { dequantize_large<Float16>(DType::float16); }

}  // namespace
}  // namespace qlora
