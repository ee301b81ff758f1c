#include <algorithm>
#include <vector>

#include "core/philox.h"
#include "cpu/scalar/dot.h"
#include "cpu/scalar/kernels.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"

namespace qlora::scalar {
namespace {

template <typename T>
void to_floats(const T* in, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

/// A LoRA factor in fp32, rounded to the compute dtype once.
std::vector<float> round_factor(const TensorView& factor, DType compute_dtype) {
  std::vector<float> out(static_cast<std::size_t>(factor.numel()));
  with_float_type(factor.dtype, [&]<typename F>(F) {
    with_float_type(compute_dtype, [&]<typename T>(T) {
      std::transform(factor.as<const F>(), factor.as<const F>() + factor.numel(), out.begin(),
                     [](F value) { return round_through<T>(to_float(value)); });
    });
  });
  return out;
}

// In what follows factor_a[r,k] and factor_b[n,r] are such copies.

/// Rows [begin, end) of t and y.
void forward_rows(const LoRAForward& arguments, const float* factor_a, const float* factor_b,
                  std::int64_t begin, std::int64_t end) {
  const std::int64_t k = arguments.x.shape[1], n = arguments.y.shape[1], r = arguments.t.shape[1];
  with_float_type(arguments.x.dtype, [&]<typename T>(T) {
    std::vector<float> x_row(static_cast<std::size_t>(k)), t_row(static_cast<std::size_t>(r));
    for (std::int64_t i = begin; i < end; ++i) {
      to_floats(arguments.x.as<const T>() + i * k, x_row.data(), k);
      T* const t = arguments.t.as<T>() + i * r;
      for (std::int64_t rank = 0; rank < r; ++rank) {
        t[rank] = from_float<T>(dot(x_row.data(), factor_a + rank * k, k));
      }
      to_floats(t, t_row.data(), r);
      T* const y = arguments.y.as<T>() + i * n;
      for (std::int64_t j = 0; j < n; ++j) {
        const float update = arguments.scaling * dot(t_row.data(), factor_b + j * r, r);
        y[j] = from_float<T>(to_float(y[j]) + update);
      }
    }
  });
}

/// Rows [begin, end) of u (fp32 copies of values of the dtype of x) and of dx, if present.
void backward_input(const LoRABackward& arguments, const float* factor_a, const float* factor_b,
                    float* u, std::int64_t begin, std::int64_t end) {
  const std::int64_t k = arguments.x.shape[1], n = arguments.dy.shape[1], r = arguments.t.shape[1];
  with_float_type(arguments.x.dtype, [&]<typename T>(T) {
    std::vector<float> sums(static_cast<std::size_t>(std::max(r, k)));
    for (std::int64_t i = begin; i < end; ++i) {
      std::fill_n(sums.begin(), r, 0.0f);
      const T* const dy = arguments.dy.as<const T>() + i * n;
      for (std::int64_t j = 0; j < n; ++j) {
        add_scaled(to_float(dy[j]), factor_b + j * r, sums.data(), r);
      }
      float* const u_row = u + i * r;
      for (std::int64_t rank = 0; rank < r; ++rank) {
        u_row[rank] = round_through<T>(arguments.scaling * sums[static_cast<std::size_t>(rank)]);
      }
      if (!arguments.dx.is_present) continue;
      std::fill_n(sums.begin(), k, 0.0f);
      for (std::int64_t rank = 0; rank < r; ++rank) {
        add_scaled(u_row[rank], factor_a + rank * k, sums.data(), k);
      }
      T* const dx = arguments.dx.as<T>() + i * k;
      for (std::int64_t c = 0; c < k; ++c) {
        dx[c] = from_float<T>(to_float(dx[c]) + sums[static_cast<std::size_t>(c)]);
      }
    }
  });
}

/// Columns [begin, end) of grad_a, from all rows of u.
void backward_a(const LoRABackward& arguments, const float* u, std::int64_t begin,
                std::int64_t end) {
  const std::int64_t m = arguments.x.shape[0], k = arguments.x.shape[1], r = arguments.t.shape[1];
  const std::int64_t width = end - begin;
  std::vector<float> sums(static_cast<std::size_t>(r * width)),
      x_row(static_cast<std::size_t>(width));
  with_float_type(arguments.x.dtype, [&]<typename T>(T) {
    for (std::int64_t i = 0; i < m; ++i) {
      to_floats(arguments.x.as<const T>() + i * k + begin, x_row.data(), width);
      for (std::int64_t rank = 0; rank < r; ++rank) {
        add_scaled(u[i * r + rank], x_row.data(), sums.data() + rank * width, width);
      }
    }
  });
  with_float_type(arguments.grad_a.dtype, [&]<typename T>(T) {
    for (std::int64_t rank = 0; rank < r; ++rank) {
      for (std::int64_t c = 0; c < width; ++c) {
        arguments.grad_a.as<T>()[rank * k + begin + c] =
            from_float<T>(sums[static_cast<std::size_t>(rank * width + c)]);
      }
    }
  });
}

/// Rows [begin, end) of grad_b.
void backward_b(const LoRABackward& arguments, std::int64_t begin, std::int64_t end) {
  const std::int64_t m = arguments.dy.shape[0], n = arguments.dy.shape[1], r = arguments.t.shape[1];
  std::vector<float> sums(static_cast<std::size_t>((end - begin) * r)),
      t_row(static_cast<std::size_t>(r));
  with_float_type(arguments.dy.dtype, [&]<typename T>(T) {
    for (std::int64_t i = 0; i < m; ++i) {
      to_floats(arguments.t.as<const T>() + i * r, t_row.data(), r);
      const T* const dy = arguments.dy.as<const T>() + i * n;
      for (std::int64_t j = begin; j < end; ++j) {
        add_scaled(to_float(dy[j]), t_row.data(), sums.data() + (j - begin) * r, r);
      }
    }
  });
  with_float_type(arguments.grad_b.dtype, [&]<typename T>(T) {
    for (std::int64_t i = 0; i < (end - begin) * r; ++i) {
      arguments.grad_b.as<T>()[begin * r + i] =
          from_float<T>(arguments.scaling * sums[static_cast<std::size_t>(i)]);
    }
  });
}

}  // namespace

void lora_forward(const LoRAForward& arguments, int num_threads) {
  const auto factor_a = round_factor(arguments.lora_a, arguments.x.dtype);
  const auto factor_b = round_factor(arguments.lora_b, arguments.x.dtype);
  parallel_for(num_threads, arguments.x.shape[0], grain_for(arguments.lora_a.numel()),
               [&](std::int64_t begin, std::int64_t end) {
                 forward_rows(arguments, factor_a.data(), factor_b.data(), begin, end);
               });
}

void lora_backward(const LoRABackward& arguments, int num_threads) {
  const auto factor_a = round_factor(arguments.lora_a, arguments.x.dtype);
  const auto factor_b = round_factor(arguments.lora_b, arguments.x.dtype);
  std::vector<float> u(static_cast<std::size_t>(arguments.t.numel()));
  parallel_for(num_threads, arguments.x.shape[0], grain_for(arguments.lora_b.numel()),
               [&](std::int64_t begin, std::int64_t end) {
                 backward_input(arguments, factor_a.data(), factor_b.data(), u.data(), begin, end);
               });
  const std::int64_t elements_per_column = arguments.t.numel();
  parallel_for(
      num_threads, arguments.x.shape[1], grain_for(elements_per_column),
      [&](std::int64_t begin, std::int64_t end) { backward_a(arguments, u.data(), begin, end); });
  parallel_for(num_threads, arguments.dy.shape[1], grain_for(elements_per_column),
               [&](std::int64_t begin, std::int64_t end) { backward_b(arguments, begin, end); });
}

void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
             std::int64_t begin, std::int64_t end) {
  const DropoutMask mask(p, seed);
  with_float_type(x.dtype, [&]<typename T>(T) {
    const T* const in = x.as<const T>();
    for (std::int64_t e = begin; e < end; e += 4) {
      const PhiloxWords words = mask.words_of_four(static_cast<std::uint64_t>(e / 4));
      for (std::int64_t i = e; i < std::min(e + 4, end); ++i) {
        const float kept = mask.keeps(words.word[i - e]) ? to_float(in[i]) * mask.keep_scale : 0.0f;
        out.as<T>()[i] = from_float<T>(kept);
      }
    }
  });
}

}  // namespace qlora::scalar
