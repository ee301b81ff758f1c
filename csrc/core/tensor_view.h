// A tensor as the core sees it: memory that somebody else owns, its element type, shape and device.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <ostream>

#include "core/check.h"
#include "format/float16.h"

namespace qlora {

enum class DType : std::uint8_t { uint8, int64, float16, bfloat16, float32 };

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::uint8: return "uint8";
    case DType::int64: return "int64";
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::float32: return "float32";
  }
  return "unknown";
}

constexpr std::int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::uint8: return 1;
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::float32: return 4;
    case DType::int64: return 8;
  }
  return 1;
}

inline std::ostream& operator<<(std::ostream& stream, DType dtype) {
  return stream << name_of(dtype);
}

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;  // always 0 for the CPU

  friend bool operator==(const Device&, const Device&) = default;
};

inline std::ostream& operator<<(std::ostream& stream, Device device) {
  if (device.type == DeviceType::cpu) return stream << "cpu";
  return stream << "cuda:" << device.index;
}

/// The sizes of a tensor, up to 8 of them, without a heap allocation.
struct Shape {
  static constexpr int max_rank = 8;
  std::array<std::int64_t, max_rank> sizes{};
  int rank = 0;

  constexpr Shape() = default;
  constexpr Shape(std::initializer_list<std::int64_t> values) {
    for (const std::int64_t value : values) push_back(value);
  }

  constexpr void push_back(std::int64_t size) {
    if (rank == max_rank) throw InvalidArgument("a tensor has more than 8 dimensions");
    sizes[static_cast<std::size_t>(rank++)] = size;
  }

  constexpr std::int64_t operator[](int i) const { return sizes[static_cast<std::size_t>(i)]; }

  constexpr std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= (*this)[i];
    return count;
  }

  friend constexpr bool operator==(const Shape&, const Shape&) = default;
};

inline std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << '[';
  for (int i = 0; i < shape.rank; ++i) stream << (i ? ", " : "") << shape[i];
  return stream << ']';
}

/// Row-major, contiguous memory. An absent optional tensor is a TensorView with `is_present ==
/// false`.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device;
  Shape shape;
  bool is_contiguous = true;
  bool is_present = false;

  std::int64_t numel() const { return shape.numel(); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// Out of line, so that kernels compiled for an instruction set share no code with others.
[[noreturn]] void throw_no_float_kernel(DType dtype);

/// Calls `function` with a value of the C++ type of a floating-point dtype: the one place that maps
/// the two.
template <typename Function>
decltype(auto) with_float_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float32: return function(float{});
    case DType::bfloat16: return function(BFloat16{});
    case DType::float16: return function(Float16{});
    default: throw_no_float_kernel(dtype);
  }
}

}  // namespace qlora
