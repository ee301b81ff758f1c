// dora_scale and dora_scale_backward, with the scalar kernels' bits: no product is fused into a sum.
#pragma once

#include "core/operations.h"
#include "cpu/simd/float_type.h"

namespace qlora::simd {

// Columns that are done for every row before the next: their gains and sums stay in L1.
inline constexpr std::int64_t dora_columns = 1024;

/// Calls `body(j, load, store)` for the columns [begin, end) a register at a time: load(p) and
/// store(p, values) take the elements at p that are columns.
template <typename Simd, typename Body>
QLORA_INLINE void for_columns(std::int64_t begin, std::int64_t end, const Body& body) {
  std::int64_t j = begin;
  for (; j + Simd::lanes <= end; j += Simd::lanes) {
    body(
        j, [](const auto* p) __attribute__((always_inline)) { return Simd::load(p); },
        [](auto* p, typename Simd::Floats values)
            __attribute__((always_inline)) { Simd::store(p, values); });
  }
  if (j == end) return;
  const std::int64_t count = end - j;
  body(
      j, [&](const auto* p) __attribute__((always_inline)) { return Simd::load_partial(p, count); },
      [&](auto* p, typename Simd::Floats values)
          __attribute__((always_inline)) { Simd::store_partial(p, values, count); });
}

template <typename Simd>
QLORA_INLINE void dora_scale(const DoRAScale& arguments, std::int64_t begin, std::int64_t end) {
  const std::int64_t m = arguments.rows.shape[0], n = arguments.rows.shape[1];
  const float* const gain = arguments.gain.as<const float>();
  simd::with_float_type(arguments.rows.dtype, [&]<typename T>(T) {
    const T* const rows = arguments.rows.as<const T>();
    const T* const addend = arguments.addend.as<const T>();  // null if absent
    const T* const bias = arguments.bias.as<const T>();
    T* const y = arguments.y.as<T>();
    for (std::int64_t first = begin; first < end; first += dora_columns) {
      const std::int64_t last = first + dora_columns < end ? first + dora_columns : end;
      for (std::int64_t i = 0; i < m; ++i) {
        for_columns<Simd>(
            first, last,
            [&](std::int64_t j, const auto& load, const auto& store)
                __attribute__((always_inline)) {
                  auto value = load(gain + j) * load(rows + i * n + j);
                  if (addend != nullptr) value = value + load(addend + i * n + j);
                  if (bias != nullptr) value = value + load(bias + j);
                  store(y + i * n + j, value);
                });
      }
    }
  });
}

template <typename Simd>
QLORA_INLINE void dora_scale_backward(const DoRAScaleBackward& arguments, std::int64_t begin,
                                      std::int64_t end) {
  const std::int64_t m = arguments.dy.shape[0], n = arguments.dy.shape[1];
  const float* const gain = arguments.gain.as<const float>();
  float* const sums = arguments.sums.as<float>();  // null if absent
  simd::with_float_type(arguments.dy.dtype, [&]<typename T>(T) {
    const T* const dy = arguments.dy.as<const T>();
    const T* const rows = arguments.rows.as<const T>();
    T* const scaled = arguments.scaled.as<T>();
    for (std::int64_t first = begin; first < end; first += dora_columns) {
      const std::int64_t last = first + dora_columns < end ? first + dora_columns : end;
      if (sums != nullptr) {
        for (std::int64_t j = first; j < last; ++j) sums[j] = 0.0f;
      }
      for (std::int64_t i = 0; i < m; ++i) {
        for_columns<Simd>(
            first, last,
            [&](std::int64_t j, const auto& load, const auto& store)
                __attribute__((always_inline)) {
                  const auto value = load(dy + i * n + j);
                  if (sums != nullptr)
                    store(sums + j, load(sums + j) + value * load(rows + i * n + j));
                  store(scaled + i * n + j, load(gain + j) * value);
                });
      }
    }
  });
}

}  // namespace qlora::simd
