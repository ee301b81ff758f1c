#include "support/host_tensor.h"

#include <cmath>
#include <cstring>

using qlora::DType;

namespace {

std::size_t bytes_per_element(DType dtype) {
  switch (dtype) {
    case DType::uint8: return 1;
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::float32: return 4;
    case DType::int64: return 8;
  }
  throw std::logic_error("unknown dtype");
}

double decode_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
  double value =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 0x1f) value = fraction ? std::nan("") : HUGE_VAL;
  return bits & 0x8000 ? -value : value;
}

/// `value` must be one of float16's.
std::uint16_t encode_float16(double value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  int magnitude;
  if (std::isnan(value)) {
    magnitude = 0x7e00;
  } else if (std::isinf(value)) {
    magnitude = 0x7c00;
  } else if (size < 0x1p-14) {
    magnitude = static_cast<int>(std::ldexp(size, 24));
  } else {
    const int exponent = std::ilogb(size);
    magnitude = (exponent + 14) * 1024 + static_cast<int>(std::ldexp(size, 10 - exponent));
  }
  return static_cast<std::uint16_t>(sign | magnitude);
}

template <typename T>
T load(const std::uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

template <typename T>
void store(std::uint8_t* bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

}  // namespace

const reference::FloatFormat& format_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return reference::float32_format;
    case DType::bfloat16: return reference::bfloat16_format;
    case DType::float16: return reference::float16_format;
    default: throw std::logic_error("not a floating-point dtype");
  }
}

HostTensor::HostTensor(DType dtype, qlora::Shape shape)
    : dtype_(dtype),
      shape_(shape),
      is_present_(true),
      bytes_(static_cast<std::size_t>(shape.numel()) * bytes_per_element(dtype), 0xff) {}

HostTensor::HostTensor(DType dtype, qlora::Shape shape, const std::vector<double>& values)
    : HostTensor(dtype, shape) {
  if (static_cast<std::int64_t>(values.size()) != numel()) throw std::logic_error("wrong count");
  for (std::int64_t i = 0; i < numel(); ++i) set(i, values[static_cast<std::size_t>(i)]);
}

HostTensor HostTensor::random(DType dtype, qlora::Shape shape, Generator& generator,
                              double standard_deviation) {
  HostTensor out(dtype, shape);
  std::normal_distribution<double> normal(0.0, standard_deviation);
  for (std::int64_t i = 0; i < out.numel(); ++i) out.set(i, normal(generator));
  return out;
}

qlora::TensorView HostTensor::view() {
  return {.data = bytes_.data(),
          .dtype = dtype_,
          .device = {},
          .shape = shape_,
          .is_contiguous = true,
          .is_present = is_present_};
}

double HostTensor::operator[](std::int64_t i) const {
  const std::uint8_t* const at =
      bytes_.data() + static_cast<std::size_t>(i) * bytes_per_element(dtype_);
  switch (dtype_) {
    case DType::uint8: return *at;
    case DType::int64: return static_cast<double>(load<std::int64_t>(at));
    case DType::float16: return decode_float16(load<std::uint16_t>(at));
    case DType::float32: return static_cast<double>(load<float>(at));
    case DType::bfloat16: {
      const std::uint32_t bits = static_cast<std::uint32_t>(load<std::uint16_t>(at)) << 16;
      return static_cast<double>(load<float>(reinterpret_cast<const std::uint8_t*>(&bits)));
    }
  }
  throw std::logic_error("unknown dtype");
}

void HostTensor::set(std::int64_t i, double value) {
  std::uint8_t* const at = bytes_.data() + static_cast<std::size_t>(i) * bytes_per_element(dtype_);
  switch (dtype_) {
    case DType::uint8: *at = static_cast<std::uint8_t>(value); return;
    case DType::int64: store(at, static_cast<std::int64_t>(value)); return;
    case DType::float32: store(at, static_cast<float>(value)); return;
    case DType::float16:
      store(at, encode_float16(reference::round_to(reference::float16_format, value)));
      return;
    case DType::bfloat16: {
      const auto exact = static_cast<float>(reference::round_to(reference::bfloat16_format, value));
      store(at, static_cast<std::uint16_t>(
                    load<std::uint32_t>(reinterpret_cast<const std::uint8_t*>(&exact)) >> 16));
      return;
    }
  }
  throw std::logic_error("unknown dtype");
}

std::vector<double> HostTensor::values() const {
  std::vector<double> out(static_cast<std::size_t>(numel()));
  for (std::int64_t i = 0; i < numel(); ++i) out[static_cast<std::size_t>(i)] = (*this)[i];
  return out;
}

reference::Matrix HostTensor::matrix() const { return {shape_[0], shape_[1], values()}; }

testing::AssertionResult is_rounded_from(const HostTensor& actual, const std::vector<double>& exact,
                                         const std::vector<double>& tolerance) {
  if (actual.numel() != static_cast<std::int64_t>(exact.size()) ||
      exact.size() != tolerance.size()) {
    return testing::AssertionFailure() << actual.numel() << " elements, want " << exact.size();
  }
  const reference::FloatFormat& format = format_of(actual.dtype());
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double value = actual[static_cast<std::int64_t>(i)];
    const double low = reference::round_to(format, exact[i] - tolerance[i]);
    const double high = reference::round_to(format, exact[i] + tolerance[i]);
    if (low <= value && value <= high) continue;
    return testing::AssertionFailure()
           << "element " << i << " of " << exact.size() << " is " << value << ", want " << exact[i]
           << " rounded to " << actual.dtype() << ", that is " << low << " to " << high;
  }
  return testing::AssertionSuccess();
}

std::string test_name_of(const testing::TestParamInfo<DType>& info) {
  return qlora::name_of(info.param);
}
