#include "support/stored_weight.h"

#include <algorithm>
#include <cstring>

#include "support/golden.h"

using qlora::DType;
using reference::float32_format;
using reference::round_to;

namespace {

std::int64_t count_blocks(std::int64_t elements, std::int64_t block) {
  return elements / block + (elements % block != 0);
}

HostTensor make_bytes(std::int64_t count) { return HostTensor(DType::uint8, {count}); }

void fill_with_random_bytes(HostTensor& tensor, Generator& generator) {
  for (std::uint8_t& byte : tensor.bytes()) byte = static_cast<std::uint8_t>(generator() >> 56);
}

std::vector<double> random_floats(std::int64_t count, double low, double high,
                                  Generator& generator) {
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<double> out(static_cast<std::size_t>(count));
  for (double& value : out) value = round_to(float32_format, uniform(generator));
  return out;
}

}  // namespace

StoredWeight::StoredWeight(std::int64_t n_, std::int64_t k_, std::int64_t block_size_,
                           bool is_nested_)
    : n(n_), k(k_), block_size(block_size_), is_nested(is_nested_) {
  codes = make_bytes(count_blocks(n * k, 2));
  absmax = make_bytes(is_nested ? block_count() : 4 * block_count());
  if (is_nested) {
    nested_absmax = make_bytes(4 * count_blocks(block_count(), 256));
    nested_offset = make_bytes(4);
  }
}

StoredWeight StoredWeight::random(std::int64_t n, std::int64_t k, std::int64_t block_size,
                                  bool is_nested, Generator& generator) {
  StoredWeight out(n, k, block_size, is_nested);
  fill_with_random_bytes(out.codes, generator);
  if (is_nested) {
    fill_with_random_bytes(out.absmax, generator);
    store_floats(out.nested_absmax,
                 random_floats(count_blocks(out.block_count(), 256), 0.1, 1.0, generator));
    store_floats(out.nested_offset, random_floats(1, 1.0, 2.0, generator));
  } else {
    store_floats(out.absmax, random_floats(out.block_count(), 0.1, 3.0, generator));
  }
  return out;
}

qlora::NF4Weight StoredWeight::view() {
  return {.codes = codes.view(),
          .absmax = absmax.view(),
          .nested_absmax = nested_absmax.view(),
          .nested_offset = nested_offset.view(),
          .n = n,
          .k = k,
          .block_size = block_size};
}

std::int64_t StoredWeight::block_count() const { return count_blocks(n * k, block_size); }

int StoredWeight::code(std::int64_t element) const {
  const std::uint8_t byte = codes.bytes()[static_cast<std::size_t>(element / 2)];
  return element % 2 == 0 ? byte / 16 : byte % 16;
}

std::vector<double> StoredWeight::scales() const {
  if (!is_nested) return load_floats(absmax);
  static const std::vector<double> map = read_golden_floats("dynamic_map_signed.bin");
  const std::vector<double> nested = load_floats(nested_absmax);
  const double offset = load_floats(nested_offset)[0];
  std::vector<double> out;
  for (const std::uint8_t q : absmax.bytes()) {
    const double product = round_to(float32_format, map[q] * nested[out.size() / 256]);
    out.push_back(round_to(float32_format, product + offset));
  }
  return out;
}

reference::Matrix StoredWeight::decode(const reference::FloatFormat& format) const {
  static const std::vector<double> levels = read_golden_floats("nf4_levels.bin");
  const std::vector<double> block_scales = scales();
  reference::Matrix out(n, k);
  for (std::int64_t e = 0; e < n * k; ++e) {
    const double level = levels[static_cast<std::size_t>(code(e))];
    const double scale = block_scales[static_cast<std::size_t>(e / block_size)];
    out.values[static_cast<std::size_t>(e)] =
        round_to(format, round_to(float32_format, level * scale));
  }
  return out;
}

void store_floats(HostTensor& bytes, const std::vector<double>& values) {
  const std::vector<float> floats(values.begin(), values.end());
  if (bytes.bytes().size() != 4 * floats.size()) throw std::logic_error("wrong count");
  if (!floats.empty()) std::memcpy(bytes.bytes().data(), floats.data(), bytes.bytes().size());
}

std::vector<double> load_floats(const HostTensor& bytes) {
  std::vector<float> floats(bytes.bytes().size() / 4);
  if (!floats.empty()) std::memcpy(floats.data(), bytes.bytes().data(), bytes.bytes().size());
  return {floats.begin(), floats.end()};
}
