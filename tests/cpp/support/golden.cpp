#include "support/golden.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>

std::vector<std::uint8_t> read_golden(const std::string& name) {
  const std::string path = std::string(QLORA_GOLDEN_DIR) + "/" + name;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<double> read_golden_floats(const std::string& name) {
  const std::vector<std::uint8_t> bytes = read_golden(name);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return {values.begin(), values.end()};
}

HostTensor make_golden_input(qlora::DType dtype) {
  const int bits = format_of(dtype).significand_bits;
  HostTensor out(dtype, {golden_n, golden_k});
  std::uint32_t state = 12345;
  for (std::int64_t i = 0; i < out.numel(); ++i) {
    state = state * 1664525u + 1013904223u;
    const double s = static_cast<double>(state >> (32 - bits)) - std::ldexp(1.0, bits - 1);
    const std::uint32_t h = static_cast<std::uint32_t>(i / 48) * 2654435761u >> 29;
    out.set(i, i >= 2048 && i < 3072 ? 0.0 : std::ldexp(s, 1 - bits - static_cast<int>(h)));
  }
  return out;
}
