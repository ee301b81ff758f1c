#include <vector>

#include "core/philox.h"
#include "cpu/scalar/dot.h"
#include "cpu/scalar/kernels.h"

namespace qlora::scalar {
namespace {

template <typename T>
void to_floats(const T* in, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

}  // namespace

void lora_forward(const LoRAForward& arguments, const float* factor_a, const float* factor_b,
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

void lora_backward_input(const LoRABackward& arguments, const float* factor_a,
                         const float* factor_b, float* u, std::int64_t begin, std::int64_t end) {
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

void lora_backward_a(const LoRABackward& arguments, const float* u, std::int64_t begin,
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

void lora_backward_b(const LoRABackward& arguments, std::int64_t begin, std::int64_t end) {
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
