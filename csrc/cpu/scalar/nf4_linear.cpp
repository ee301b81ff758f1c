#include <algorithm>
#include <vector>

#include "cpu/scalar/dot.h"
#include "cpu/scalar/kernels.h"
#include "cpu/scalar/nf4_decode.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"

namespace qlora::scalar {
namespace {

// Tokens whose fp32 copies are worked on together: a decoded row of W is used for each of them.
constexpr std::int64_t tokens_per_tile = 64;

/// Columns [begin, end) of y, which are rows of W.
template <typename T>
void linear(const T* x, const NF4Bytes& w, const T* bias, T* y, std::int64_t m, std::int64_t begin,
            std::int64_t end) {
  std::vector<float> row(static_cast<std::size_t>(w.k));
  std::vector<float> tile(static_cast<std::size_t>(std::min(m, tokens_per_tile) * w.k));
  for (std::int64_t first = 0; first < m; first += tokens_per_tile) {
    const std::int64_t tokens = std::min(tokens_per_tile, m - first);
    for (std::int64_t i = 0; i < tokens * w.k; ++i) {
      tile[static_cast<std::size_t>(i)] = to_float(x[first * w.k + i]);
    }
    for (std::int64_t j = begin; j < end; ++j) {
      decode_to_float<T>(w, j * w.k, w.k, row.data());
      for (std::int64_t i = 0; i < tokens; ++i) {
        const float sum = dot(tile.data() + i * w.k, row.data(), w.k);
        y[(first + i) * w.n + j] = from_float<T>(bias ? sum + to_float(bias[j]) : sum);
      }
    }
  }
}

/// Columns [begin, end) of dx, which are columns of W.
template <typename T>
void linear_grad_input(const T* dy, const NF4Bytes& w, T* dx, std::int64_t m, std::int64_t begin,
                       std::int64_t end) {
  const std::int64_t width = end - begin;
  std::vector<float> row(static_cast<std::size_t>(width));
  std::vector<float> sums(static_cast<std::size_t>(std::min(m, tokens_per_tile) * width));
  for (std::int64_t first = 0; first < m; first += tokens_per_tile) {
    const std::int64_t tokens = std::min(tokens_per_tile, m - first);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (std::int64_t j = 0; j < w.n; ++j) {
      decode_to_float<T>(w, j * w.k + begin, width, row.data());
      for (std::int64_t i = 0; i < tokens; ++i) {
        add_scaled(to_float(dy[(first + i) * w.n + j]), row.data(), sums.data() + i * width, width);
      }
    }
    for (std::int64_t i = 0; i < tokens; ++i) {
      for (std::int64_t c = 0; c < width; ++c) {
        dx[(first + i) * w.k + begin + c] =
            from_float<T>(sums[static_cast<std::size_t>(i * width + c)]);
      }
    }
  }
}

}  // namespace

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads) {
  with_float_type(x.dtype, [&]<typename T>(T) {
    parallel_for(num_threads, weight.n, grain_for(weight.k),
                 [&](std::int64_t begin, std::int64_t end) {
                   linear(x.as<const T>(), weight, bias.is_present ? bias.as<const T>() : nullptr,
                          y.as<T>(), x.shape[0], begin, end);
                 });
  });
}

void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads) {
  with_float_type(dy.dtype, [&]<typename T>(T) {
    parallel_for(num_threads, weight.k, std::max<std::int64_t>(64, grain_for(weight.n)),
                 [&](std::int64_t begin, std::int64_t end) {
                   linear_grad_input(dy.as<const T>(), weight, dx.as<T>(), dy.shape[0], begin, end);
                 });
  });
}

}  // namespace qlora::scalar
