// lora_forward and lora_backward of up to 8 tokens. With so few the factors and their gradients are
// nearly all that is moved, so they are read and written where they lie, once, and the activations
// are what is copied: simd/lora_floats.h copies a chunk of a factor first. (r = 16, n = k = 4096, fp32
// factors, one token: 0.5 of its time.)
//
// Chunks and sums are those of simd/lora.h: the results do not depend on the number of threads.
#pragma once

#include <type_traits>

#include "cpu/simd/float_type.h"
#include "cpu/simd/lora_floats.h"

namespace qlora {
namespace {

constexpr std::int64_t lora_few_tokens = 8;

/// Columns of a few tokens in fp32, and rows of zeros up to as many as a kernel takes.
struct FewRows {
  float* rows;
  std::int64_t stride;
};

template <typename SimdType, typename T>
struct FewTokensLoRA {
  using Simd = SimdType;
  using Floats = typename Simd::Floats;
  using Engine = FloatLoRA<Simd, T>;
  using Left = LeftOperand<float>;
  static constexpr std::int64_t lanes = Simd::lanes;
  static constexpr int ranks_at_once = 4;

  /// A factor's elements, rounded to T.
  template <typename F>
  QLORA_INLINE static Floats load_factor(const F* p, std::int64_t there) {
    const Floats values = there >= lanes ? Simd::load(p) : Simd::load_partial(p, there);
    if constexpr (std::is_same_v<F, T>) return values;
    return Simd::template round_to<T>(values);
  }

  /// `count` elements further, which may be beyond the tensor.
  template <typename F>
  QLORA_INLINE static const void* address_after(const F* p, std::int64_t count) {
    return reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(p) +
                                         count * static_cast<std::int64_t>(sizeof(F)));
  }

  /// The processor sees a chunk's rows end after 2 KB, and asks for no others by itself.
  template <typename F>
  QLORA_INLINE static void prefetch_next(const F* p, std::int64_t count) {
    __builtin_prefetch(address_after(p, count));
  }

  template <typename F>
  QLORA_INLINE static void store_some(F* p, Floats values, std::int64_t there) {
    if (there >= lanes) {
      Simd::store(p, values);
    } else {
      Simd::store_partial(p, values, there);
    }
  }

  /// Copies columns [first, first + columns) of m tokens; zeros in rows up to `row_count` and in columns
  /// up to a whole register.
  QLORA_INLINE static void load_rows(const TensorView& x, std::int64_t first, std::int64_t columns,
                                     std::int64_t row_count, const FewRows& out) {
    const std::int64_t m = x.shape[0], width = x.shape[1];
    for (std::int64_t i = 0; i < row_count; ++i) {
      const T* const row = x.as<const T>() + i * width + first;
      for (std::int64_t c = 0; c < columns; c += lanes) {
        const std::int64_t there = lora_least(lanes, columns - c);
        Simd::store(out.rows + i * out.stride + c,
                    i < m ? Simd::load_partial(row + c, there) : Simd::zero());
      }
    }
  }

  /// A thread's copies of a chunk, as many as `count`, with `row_count` rows each.
  template <int count>
  QLORA_INLINE static void take_rows(const LoRASizes& sizes, std::int64_t row_count,
                                     FewRows (&copies)[count]) {
    const std::int64_t stride = sizes.chunk_columns + 16;
    WorkspacePieces pieces(Workspace::lora_chunk, count * row_count * stride);
    for (FewRows& copy : copies) copy = {pieces.take(row_count * stride), stride};
  }

  /// partial[token, rank] = x · Aᵀ over a chunk of columns.
  template <int tokens, typename F>
  QLORA_INLINE static void dot_a(const LoRASizes& sizes, const F* a, std::int64_t k,
                                 std::int64_t columns, const FewRows& x, float* partial) {
    for (std::int64_t rank = 0; rank < sizes.ranks; rank += ranks_at_once) {
      const F* rows[ranks_at_once];
      for (int q = 0; q < ranks_at_once; ++q) {
        rows[q] = a + lora_least(rank + q, sizes.ranks - 1) * k;  // beyond the last: again the last
      }
      Floats sums[tokens][ranks_at_once];
      for (auto& row : sums) {
        for (Floats& sum : row) sum = Simd::zero();
      }
      const auto add_products = [&](std::int64_t c, std::int64_t there) QLORA_INLINE_LAMBDA {
        Floats factors[ranks_at_once];
#pragma GCC unroll 4
        for (int q = 0; q < ranks_at_once; ++q) {
          factors[q] = load_factor(rows[q] + c, there);
          prefetch_next(rows[q] + c, ranks_at_once * k);
        }
#pragma GCC unroll 8
        for (int i = 0; i < tokens; ++i) {
          const Floats value = Simd::load(x.rows + i * x.stride + c);
#pragma GCC unroll 4
          for (int q = 0; q < ranks_at_once; ++q) {
            sums[i][q] = Simd::fma(value, factors[q], sums[i][q]);
          }
        }
      };
      std::int64_t c = 0;
      for (; c + lanes <= columns; c += lanes) add_products(c, lanes);
      if (c < columns) add_products(c, columns - c);
      for (std::int64_t i = 0; i < lora_least(tokens, sizes.tokens); ++i) {
        for (int q = 0; q < ranks_at_once && rank + q < sizes.ranks; ++q) {
          partial[i * sizes.padded_ranks + rank + q] = Simd::sum(sums[i][q]);
        }
      }
    }
  }

  /// y += scaling · t · Bᵀ, of a chunk of columns of y, which are rows of B.
  template <int tokens, typename F>
  QLORA_INLINE static void update_y(const LoRASizes& sizes, const Left& t, const F* b,
                                    std::int64_t columns, float scaling, T* y, std::int64_t n) {
    const std::int64_t r = sizes.ranks;
    const Floats scale = Simd::broadcast(scaling);
    const float* left[tokens];  // beyond the last token: again the last
    for (std::int64_t i = 0; i < tokens; ++i) {
      left[i] = t.by_token + lora_least(i, sizes.tokens - 1) * sizes.padded_ranks;
    }
    for (std::int64_t c = 0; c < columns; c += lanes) {
      Floats sums[tokens];
      for (Floats& sum : sums) sum = Simd::zero();
      for (std::int64_t rank = 0; rank < r; rank += lanes) {
        Floats block[lanes];
#pragma GCC unroll 16
        for (std::int64_t j = 0; j < lanes; ++j) {
          block[j] = c + j < columns ? load_factor(b + (c + j) * r + rank, r - rank) : Simd::zero();
        }
        Simd::transpose(block);
#pragma GCC unroll 16
        for (std::int64_t q = 0; q < lanes; ++q) {
#pragma GCC unroll 8
          for (int i = 0; i < tokens; ++i) {
            const Floats value = Simd::broadcast(left[i][rank + q]);
            sums[i] = Simd::fma(value, block[q], sums[i]);
          }
        }
      }
      const std::int64_t there = columns - c;
      for (std::int64_t i = 0; i < lora_least(tokens, sizes.tokens); ++i) {
        T* const out = y + i * n + c;
        const Floats before = there >= lanes ? Simd::load(out) : Simd::load_partial(out, there);
        store_some(out, Simd::fma(scale, sums[i], before), there);
      }
    }
  }

  /// partial[token, rank] = dy · B and grad_b = scaling · dyᵀ · t over a chunk of rows of B.
  template <int tokens, typename F, typename G>
  QLORA_INLINE static void dot_b(const LoRASizes& sizes, const Left& t, const F* b,
                                 std::int64_t columns, const FewRows& dy, float scaling,
                                 float* partial, G* grad_b) {
    const std::int64_t r = sizes.ranks;
    const Floats scale = Simd::broadcast(scaling);
    for (std::int64_t rank = 0; rank < r; rank += lanes) {
      const std::int64_t there = r - rank;
      Floats sums[tokens], left[tokens];
#pragma GCC unroll 8
      for (int i = 0; i < tokens; ++i) {
        sums[i] = Simd::zero();
        left[i] = i < sizes.tokens ? Simd::load(t.by_token + i * sizes.padded_ranks + rank)
                                   : Simd::zero();
      }
      for (std::int64_t j = 0; j < columns; ++j) {
        const Floats factor = load_factor(b + j * r + rank, there);
        Floats gradient = Simd::zero();
#pragma GCC unroll 8
        for (int i = 0; i < tokens; ++i) {
          const Floats value = Simd::broadcast(dy.rows[i * dy.stride + j]);
          sums[i] = Simd::fma(value, factor, sums[i]);
          gradient = Simd::fma(value, left[i], gradient);
        }
        store_some(grad_b + j * r + rank, scale * gradient, there);
      }
      for (std::int64_t i = 0; i < lora_least(tokens, sizes.tokens); ++i) {
        store_some(partial + i * sizes.padded_ranks + rank, sums[i], there);
      }
    }
  }

  /// grad_a = uᵀ · x and dx_sums = u · A over a chunk of columns. Without dx_sums, `a` is not read.
  template <int tokens, typename F, typename G>
  QLORA_INLINE static void update_x(const LoRASizes& sizes, const Left& u, const F* a,
                                    std::int64_t k, std::int64_t columns, const FewRows& x,
                                    const FewRows& dx_sums, bool has_dx, G* grad_a) {
    for (std::int64_t rank = 0; rank < sizes.ranks; rank += ranks_at_once) {
      const std::int64_t count = lora_least(ranks_at_once, sizes.ranks - rank);
      float left[tokens][ranks_at_once];
      for (int i = 0; i < tokens; ++i) {
        for (int q = 0; q < ranks_at_once; ++q) {
          left[i][q] =
              i < sizes.tokens && q < count ? u.by_token[i * sizes.padded_ranks + rank + q] : 0.0f;
        }
      }
      for (std::int64_t c = 0; c < columns; c += lanes) {
        const std::int64_t there = columns - c;
        Floats gradients[ranks_at_once], factors[ranks_at_once];
#pragma GCC unroll 4
        for (int q = 0; q < ranks_at_once; ++q) {
          gradients[q] = Simd::zero();
          factors[q] =
              has_dx && q < count ? load_factor(a + (rank + q) * k + c, there) : Simd::zero();
        }
#pragma GCC unroll 8
        for (int i = 0; i < tokens; ++i) {
          const Floats value = Simd::load(x.rows + i * x.stride + c);
          float* const sum = dx_sums.rows + i * dx_sums.stride + c;
          Floats added = rank == 0 ? Simd::zero() : Simd::load(sum);
#pragma GCC unroll 4
          for (int q = 0; q < ranks_at_once; ++q) {
            const Floats scale = Simd::broadcast(left[i][q]);
            gradients[q] = Simd::fma(scale, value, gradients[q]);
            added = Simd::fma(scale, factors[q], added);
          }
          Simd::store(sum, added);
        }
        for (int q = 0; q < count; ++q) {
          G* const gradient = grad_a + (rank + q) * k + c;
          store_some(gradient, gradients[q], there);
          __builtin_prefetch(address_after(gradient, ranks_at_once * k), 1);
          prefetch_next(a + (rank + q) * k + c, ranks_at_once * k);
        }
      }
    }
  }

  template <int tokens>
  static void forward(const LoRAForward& arguments, int num_threads) {
    const std::int64_t m = arguments.x.shape[0], k = arguments.x.shape[1], n = arguments.y.shape[1];
    const LoRASizes sizes = lora_sizes<Engine>(m, arguments.t.shape[1]);
    const CallMemory<Engine> call(sizes, sizes.chunks(k));
    simd::with_float_type(arguments.lora_a.dtype, [&]<typename F>(F) QLORA_INLINE_LAMBDA {
      parallel_for(
          num_threads, sizes.chunks(k), sizes.grain(), [&](std::int64_t begin, std::int64_t end) {
            FewRows copies[1];
            take_rows(sizes, tokens, copies);
            for (std::int64_t chunk = begin; chunk < end; ++chunk) {
              const std::int64_t first = chunk * sizes.chunk_columns;
              const std::int64_t columns = lora_least(sizes.chunk_columns, k - first);
              load_rows(arguments.x, first, columns, tokens, copies[0]);
              dot_a<tokens>(sizes, arguments.lora_a.as<const F>() + first, k, columns, copies[0],
                            call.partial + chunk * sizes.padded_tokens * sizes.padded_ranks);
            }
          });
      add_partial_sums<Engine>(sizes, call, sizes.chunks(k), 1.0f, arguments.t.as<T>(),
                               num_threads);
      parallel_for(num_threads, sizes.chunks(n), sizes.grain(),
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t chunk = begin; chunk < end; ++chunk) {
                       const std::int64_t first = chunk * sizes.chunk_columns;
                       update_y<tokens>(sizes, call.left,
                                        arguments.lora_b.as<const F>() + first * sizes.ranks,
                                        lora_least(sizes.chunk_columns, n - first),
                                        arguments.scaling, arguments.y.as<T>() + first, n);
                     }
                   });
    });
  }

  template <int tokens>
  static void backward(const LoRABackward& arguments, int num_threads) {
    const std::int64_t m = arguments.x.shape[0], k = arguments.x.shape[1];
    const std::int64_t n = arguments.dy.shape[1];
    const LoRASizes sizes = lora_sizes<Engine>(m, arguments.t.shape[1]);
    const CallMemory<Engine> call(sizes, sizes.chunks(n));
    make_left<Engine>(sizes, call.left_t, 0, m, nullptr,
                      [&](std::int64_t i, std::int64_t rank, std::int64_t count) {
                        return Simd::load_partial(
                            arguments.t.as<const T>() + i * sizes.ranks + rank, count);
                      });
    const auto with_types = [&]<typename F, typename G>(F, G) QLORA_INLINE_LAMBDA {
      parallel_for(
          num_threads, sizes.chunks(n), sizes.grain(), [&](std::int64_t begin, std::int64_t end) {
            FewRows copies[1];
            take_rows(sizes, tokens, copies);
            for (std::int64_t chunk = begin; chunk < end; ++chunk) {
              const std::int64_t first = chunk * sizes.chunk_columns;
              const std::int64_t columns = lora_least(sizes.chunk_columns, n - first);
              load_rows(arguments.dy, first, columns, tokens, copies[0]);
              dot_b<tokens>(sizes, call.left_t,
                            arguments.lora_b.as<const F>() + first * sizes.ranks, columns,
                            copies[0], arguments.scaling,
                            call.partial + chunk * sizes.padded_tokens * sizes.padded_ranks,
                            arguments.grad_b.as<G>() + first * sizes.ranks);
            }
          });
      add_partial_sums<Engine>(sizes, call, sizes.chunks(n), arguments.scaling, nullptr,
                               num_threads);
      parallel_for(num_threads, sizes.chunks(k), sizes.grain(),
                   [&](std::int64_t begin, std::int64_t end) {
                     FewRows copies[2];
                     take_rows(sizes, tokens, copies);
                     for (std::int64_t chunk = begin; chunk < end; ++chunk) {
                       const std::int64_t first = chunk * sizes.chunk_columns;
                       const std::int64_t columns = lora_least(sizes.chunk_columns, k - first);
                       load_rows(arguments.x, first, columns, tokens, copies[0]);
                       update_x<tokens>(sizes, call.left, arguments.lora_a.as<const F>() + first, k,
                                        columns, copies[0], copies[1], arguments.dx.is_present,
                                        arguments.grad_a.as<G>() + first);
                       if (arguments.dx.is_present) {
                         add_rows(copies[1], m, arguments.dx.as<T>() + first, k, columns);
                       }
                     }
                   });
    };
    simd::with_float_type(arguments.lora_a.dtype, [&]<typename F>(F) QLORA_INLINE_LAMBDA {
      if (arguments.grad_a.dtype == arguments.lora_a.dtype) return with_types(F{}, F{});
      with_types(F{}, float{});  // sums of lora_backward_grouped
    });
  }

 private:
  QLORA_INLINE static void add_rows(const FewRows& sums, std::int64_t m, T* x, std::int64_t k,
                                    std::int64_t columns) {
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t c = 0; c < columns; c += lanes) {
        T* const out = x + i * k + c;
        const std::int64_t there = columns - c;
        const Floats before = there >= lanes ? Simd::load(out) : Simd::load_partial(out, there);
        store_some(out, before + Simd::load(sums.rows + i * sums.stride + c), there);
      }
    }
  }
};

/// Calls `run` with the least of 1, 4 and 8 that is not below m, as an integral constant.
template <typename Run>
QLORA_INLINE void with_few_tokens(std::int64_t m, const Run& run) {
  if (m == 1) return run(std::integral_constant<int, 1>{});
  if (m <= 4) return run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 8>{});
}

template <typename Simd, typename T>
void run_lora_forward_floats(const LoRAForward& arguments, int num_threads) {
  const std::int64_t m = arguments.x.shape[0];
  if (m == 0 || m > lora_few_tokens || arguments.t.shape[1] == 0) {
    return run_lora_forward<FloatLoRA<Simd, T>>(arguments, num_threads);
  }
  with_few_tokens(m, [&](auto tokens) {
    FewTokensLoRA<Simd, T>::template forward<tokens()>(arguments, num_threads);
  });
}

template <typename Simd, typename T>
void run_lora_backward_floats(const LoRABackward& arguments, int num_threads) {
  const std::int64_t m = arguments.x.shape[0];
  if (m == 0 || m > lora_few_tokens || arguments.t.shape[1] == 0) {
    return run_lora_backward<FloatLoRA<Simd, T>>(arguments, num_threads);
  }
  with_few_tokens(m, [&](auto tokens) {
    FewTokensLoRA<Simd, T>::template backward<tokens()>(arguments, num_threads);
  });
}

}  // namespace
}  // namespace qlora
