// lora_forward and lora_backward, over an engine that knows how factors are packed and multiplied:
// simd/lora_floats.h in fp32, avx512_bf16/lora_tiles.h in bf16.
//
// Activations are worked on in chunks of columns, all tokens of a chunk by one thread, so that each
// is read as few times as the data flow allows:
//
//   forward    x chunks:   partial sums of t;              then t of their sums;  then y chunks
//   backward   dy chunks:  partial sums of u, and grad_b;  then u of their sums;  then x and dx
//              chunks: grad_a, and dx
//
// The chunks follow from the sizes alone and partial sums are added in their order: the results do
// not depend on the number of threads.
#pragma once

#include "core/operations.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"
#include "cpu/workspace.h"

namespace qlora {
namespace {

constexpr std::int64_t lora_least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Tokens that an engine is given at once: with 256 columns in 16 bits, 32 KB of an L1 of 48 KB.
constexpr std::int64_t token_block = 64;

struct LoRASizes {
  std::int64_t tokens, ranks;
  std::int64_t padded_tokens, padded_ranks;
  std::int64_t chunk_columns;

  std::int64_t chunks(std::int64_t columns) const {
    return (columns + chunk_columns - 1) / chunk_columns;
  }
  /// Chunks that make a grain of work, each of `passes` products.
  std::int64_t grain() const { return grain_for(chunk_columns * (tokens + ranks)); }
};

template <typename Engine>
LoRASizes lora_sizes(std::int64_t tokens, std::int64_t ranks) {
  // Partial sums have `ranks` fp32 for each token of a chunk: 8 columns a rank keep them well below
  // the activations they come from. 256 make work for several threads, 1024 keep a factor's share
  // in L2.
  std::int64_t columns = round_up(8 * ranks, 64);
  columns = columns < 512 ? 512 : columns > 1024 ? 1024 : columns;
  return {.tokens = tokens,
          .ranks = ranks,
          .padded_tokens = round_up(tokens, Engine::token_multiple),
          .padded_ranks = round_up(ranks, Engine::rank_multiple),
          .chunk_columns = columns};
}

/// Hands out pieces of a workspace, aligned to cache lines.
class WorkspacePieces {
 public:
  WorkspacePieces(Workspace purpose, std::int64_t floats)
      : next_(static_cast<float*>(
            thread_workspace(purpose, static_cast<std::size_t>(floats) * sizeof(float)))) {}

  float* take(std::int64_t floats) {
    float* const piece = next_;
    next_ += round_up(floats, 16);
    return piece;
  }

 private:
  float* next_;
};

/// A thread's memory for one chunk.
struct ChunkMemory {
  std::int64_t stride;   // of factor and sums
  float* factor;         // [padded_ranks, columns]
  float* sums;           // the same
  float* packed_dot;     // the factor, as Engine::dot reads it
  float* packed_update;  // the factor, as Engine::update reads it
  float* scratch;
};

template <typename Engine>
ChunkMemory chunk_memory(const LoRASizes& sizes) {
  const std::int64_t stride = sizes.chunk_columns + 16;  // not a multiple of 4 KB
  const std::int64_t floats = round_up(sizes.padded_ranks * stride, 16);
  const std::int64_t packed = Engine::packed_floats(sizes);
  WorkspacePieces pieces(Workspace::lora_chunk,
                         2 * floats + 2 * packed + Engine::scratch_floats(sizes));
  ChunkMemory memory{};
  memory.stride = stride;
  memory.factor = pieces.take(floats);
  memory.sums = pieces.take(floats);
  memory.packed_dot = pieces.take(packed);
  memory.packed_update = pieces.take(packed);
  memory.scratch = pieces.take(0);
  return memory;
}

/// t or u as the left operand of the products, in an element type of the engine's. Zeros fill it up
/// to the padded sizes.
template <typename Element>
struct LeftOperand {
  Element* by_token;  // [padded_tokens, padded_ranks]
  Element* by_rank;   // [padded_ranks, padded_tokens], if the engine has a use for it
};

/// Memory of a whole call.
template <typename Engine>
struct CallMemory {
  using Left = LeftOperand<typename Engine::LeftElement>;
  float* partial;  // sums of t or u: [chunk, padded_tokens, padded_ranks]
  Left left;       // forward: t; backward: u
  Left left_t;     // backward: t

  CallMemory(const LoRASizes& sizes, std::int64_t chunks) {
    const std::int64_t elements = sizes.padded_tokens * sizes.padded_ranks;
    const std::int64_t left_floats = round_up(
        elements * static_cast<std::int64_t>(sizeof(typename Engine::LeftElement)) / 4, 16);
    WorkspacePieces pieces(Workspace::lora_call, round_up(chunks * elements, 16) + 4 * left_floats);
    partial = pieces.take(chunks * elements);
    for (Left* const operand : {&left, &left_t}) {
      for (auto** const form : {&operand->by_token, &operand->by_rank}) {
        *form = reinterpret_cast<typename Engine::LeftElement*>(pieces.take(left_floats));
      }
    }
  }
};

/// Columns of consecutive tokens of an activation.
template <typename T>
struct Block {
  T* rows;
  std::int64_t stride, tokens, columns;
};

// ---- factors and their gradients, between memory and [rank, column] in fp32

/// Zeros in rows [begin, end), up to a multiple of 32 columns.
template <typename Simd>
void clear_ranks(std::int64_t begin, std::int64_t end, std::int64_t columns, float* rows,
                 std::int64_t stride) {
  for (std::int64_t rank = begin; rank < end; ++rank) {
    for (std::int64_t c = 0; c < round_up(columns, 32); c += Simd::lanes) {
      Simd::store(rows + rank * stride + c, Simd::zero());
    }
  }
}

/// Columns [first, first + columns) of lora_a, rounded to T: factor[padded_ranks, stride], zeros
/// where there are none, up to a multiple of 32 columns.
template <typename Simd, typename T>
void load_a(const TensorView& lora_a, const LoRASizes& sizes, std::int64_t first,
            std::int64_t columns, float* factor, std::int64_t stride) {
  const std::int64_t k = lora_a.shape[1];
  with_float_type(lora_a.dtype, [&]<typename F>(F) {
    for (std::int64_t rank = 0; rank < sizes.ranks; ++rank) {
      const F* const row = lora_a.as<const F>() + rank * k + first;
      float* const out = factor + rank * stride;
      std::int64_t c = 0;
      for (; c + Simd::lanes <= columns; c += Simd::lanes) {
        Simd::store(out + c, Simd::template round_to<T>(Simd::load(row + c)));
      }
      for (; c < round_up(columns, 32); c += Simd::lanes) {
        const std::int64_t there = columns - c > 0 ? columns - c : 0;
        Simd::store(out + c, Simd::template round_to<T>(Simd::load_partial(row + c, there)));
      }
    }
  });
  clear_ranks<Simd>(sizes.ranks, sizes.padded_ranks, columns, factor, stride);
}

/// The same of lora_b: its rows are the columns.
template <typename Simd, typename T>
void load_b(const TensorView& lora_b, const LoRASizes& sizes, std::int64_t first,
            std::int64_t columns, float* factor, std::int64_t stride) {
  const std::int64_t r = sizes.ranks;
  with_float_type(lora_b.dtype, [&]<typename F>(F) {
    for (std::int64_t c = 0; c < round_up(columns, 32); c += Simd::lanes) {
      for (std::int64_t rank = 0; rank < r; rank += Simd::lanes) {
        typename Simd::Floats block[Simd::lanes];
        for (std::int64_t i = 0; i < Simd::lanes; ++i) {
          const F* const row = lora_b.as<const F>() + (first + c + i) * r + rank;
          block[i] = c + i >= columns          ? Simd::zero()
                     : rank + Simd::lanes <= r ? Simd::load(row)
                                               : Simd::load_partial(row, r - rank);
        }
        Simd::transpose(block);
        for (std::int64_t i = 0; i < Simd::lanes; ++i) {
          Simd::store(factor + (rank + i) * stride + c, Simd::template round_to<T>(block[i]));
        }
      }
    }
  });
  clear_ranks<Simd>(round_up(r, Simd::lanes), sizes.padded_ranks, columns, factor, stride);
}

template <typename Simd>
void store_grad_a(const float* sums, std::int64_t stride, const LoRASizes& sizes,
                  std::int64_t first, std::int64_t columns, const TensorView& grad_a) {
  const std::int64_t k = grad_a.shape[1];
  with_float_type(grad_a.dtype, [&]<typename F>(F) {
    for (std::int64_t rank = 0; rank < sizes.ranks; ++rank) {
      F* const row = grad_a.as<F>() + rank * k + first;
      for (std::int64_t c = 0; c < columns; c += Simd::lanes) {
        Simd::store_partial(row + c, Simd::load(sums + rank * stride + c),
                            lora_least(Simd::lanes, columns - c));
      }
    }
  });
}

template <typename Simd>
void store_grad_b(const float* sums, std::int64_t stride, const LoRASizes& sizes, float scaling,
                  std::int64_t first, std::int64_t columns, const TensorView& grad_b) {
  const std::int64_t r = sizes.ranks;
  const auto scale = Simd::broadcast(scaling);
  with_float_type(grad_b.dtype, [&]<typename F>(F) {
    for (std::int64_t c = 0; c < columns; c += Simd::lanes) {
      for (std::int64_t rank = 0; rank < r; rank += Simd::lanes) {
        typename Simd::Floats block[Simd::lanes];
        for (std::int64_t i = 0; i < Simd::lanes; ++i) {
          block[i] = Simd::load(sums + (rank + i) * stride + c);
        }
        Simd::transpose(block);
        for (std::int64_t i = 0; i < Simd::lanes && c + i < columns; ++i) {
          Simd::store_partial(grad_b.as<F>() + (first + c + i) * r + rank, scale * block[i],
                              lora_least(Simd::lanes, r - rank));
        }
      }
    }
  });
}

// ---- t and u

/// Makes a left operand of rows [begin, end), which are multiples of Engine::token_multiple:
/// `row(token, rank, count)` gives `count` of its elements, and zeros. What is rounded to the dtype
/// of x goes to `out` too, if that is not null.
template <typename Engine, typename Row>
void make_left(const LoRASizes& sizes, const LeftOperand<typename Engine::LeftElement>& left,
               std::int64_t begin, std::int64_t end, typename Engine::Activation* out,
               const Row& row) {
  using Simd = typename Engine::Simd;
  using T = typename Engine::Activation;
  for (std::int64_t i = begin; i < end; ++i) {
    for (std::int64_t rank = 0; rank < sizes.padded_ranks; rank += Simd::lanes) {
      const std::int64_t count = lora_least(Simd::lanes, sizes.ranks - rank);
      const bool is_there = i < sizes.tokens && count > 0;
      const auto values = is_there ? Simd::template round_to<T>(row(i, rank, count)) : Simd::zero();
      if (is_there && out != nullptr) {
        Simd::store_partial(out + i * sizes.ranks + rank, values, count);
      }
      Simd::store(left.by_token + i * sizes.padded_ranks + rank, values);
    }
  }
  Engine::finish_left(left, sizes, begin, end);
}

/// The sums of `chunks` partial ones, scaled and rounded.
template <typename Engine>
void add_partial_sums(const LoRASizes& sizes, const CallMemory<Engine>& memory, std::int64_t chunks,
                      float scaling, typename Engine::Activation* out, int num_threads) {
  using Simd = typename Engine::Simd;
  const std::int64_t chunk_stride = sizes.padded_tokens * sizes.padded_ranks;
  const auto scale = Simd::broadcast(scaling);
  parallel_for(num_threads, sizes.padded_tokens,
               round_up(grain_for(sizes.padded_ranks * chunks), Engine::token_multiple),
               [&](std::int64_t begin, std::int64_t end) {
                 make_left<Engine>(
                     sizes, memory.left, begin, end, out,
                     [&](std::int64_t i, std::int64_t rank, std::int64_t count) {
                       auto sum = Simd::zero();
                       const float* part = memory.partial + i * sizes.padded_ranks + rank;
                       for (std::int64_t c = 0; c < chunks; ++c, part += chunk_stride) {
                         sum = sum + Simd::load_partial(part, count);
                       }
                       return scale * sum;
                     });
               });
}

// ---- the operations

template <typename Engine>
void run_lora_forward(const LoRAForward& arguments, int num_threads) {
  using Simd = typename Engine::Simd;
  using T = typename Engine::Activation;
  const std::int64_t m = arguments.x.shape[0], k = arguments.x.shape[1], n = arguments.y.shape[1];
  const LoRASizes sizes = lora_sizes<Engine>(m, arguments.t.shape[1]);
  if (m == 0 || sizes.ranks == 0) return;
  const CallMemory<Engine> call(sizes, sizes.chunks(k));

  parallel_for(
      num_threads, sizes.chunks(k), sizes.grain(), [&](std::int64_t begin, std::int64_t end) {
        const ChunkMemory memory = chunk_memory<Engine>(sizes);
        Engine::begin();
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
          const std::int64_t first = chunk * sizes.chunk_columns;
          const std::int64_t columns = lora_least(sizes.chunk_columns, k - first);
          load_a<Simd, T>(arguments.lora_a, sizes, first, columns, memory.factor, memory.stride);
          Engine::pack_dot(sizes, columns, memory);
          float* const partial = call.partial + chunk * sizes.padded_tokens * sizes.padded_ranks;
          for (std::int64_t i = 0; i < m; i += token_block) {
            Engine::dot(sizes,
                        {arguments.x.as<const T>() + i * k + first, k,
                         lora_least(token_block, m - i), columns},
                        memory, partial + i * sizes.padded_ranks);
          }
        }
        Engine::end();
      });

  add_partial_sums<Engine>(sizes, call, sizes.chunks(k), 1.0f, arguments.t.as<T>(), num_threads);

  parallel_for(
      num_threads, sizes.chunks(n), sizes.grain(), [&](std::int64_t begin, std::int64_t end) {
        const ChunkMemory memory = chunk_memory<Engine>(sizes);
        Engine::begin();
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
          const std::int64_t first = chunk * sizes.chunk_columns;
          const std::int64_t columns = lora_least(sizes.chunk_columns, n - first);
          load_b<Simd, T>(arguments.lora_b, sizes, first, columns, memory.factor, memory.stride);
          Engine::pack_update(sizes, columns, memory);
          for (std::int64_t i = 0; i < m; i += token_block) {
            Engine::update(
                sizes, call.left, i,
                {arguments.y.as<T>() + i * n + first, n, lora_least(token_block, m - i), columns},
                memory, arguments.scaling);
          }
        }
        Engine::end();
      });
}

template <typename Engine>
void run_lora_backward(const LoRABackward& arguments, int num_threads) {
  using Simd = typename Engine::Simd;
  using T = typename Engine::Activation;
  const std::int64_t m = arguments.x.shape[0], k = arguments.x.shape[1], n = arguments.dy.shape[1];
  const LoRASizes sizes = lora_sizes<Engine>(m, arguments.t.shape[1]);
  if (sizes.ranks == 0) return;
  const CallMemory<Engine> call(sizes, sizes.chunks(n));

  parallel_for(num_threads, sizes.padded_tokens,
               round_up(grain_for(sizes.padded_ranks), Engine::token_multiple),
               [&](std::int64_t begin, std::int64_t end) {
                 make_left<Engine>(sizes, call.left_t, begin, end, nullptr,
                                   [&](std::int64_t i, std::int64_t rank, std::int64_t count) {
                                     return Simd::load_partial(
                                         arguments.t.as<const T>() + i * sizes.ranks + rank, count);
                                   });
               });

  parallel_for(
      num_threads, sizes.chunks(n), sizes.grain(), [&](std::int64_t begin, std::int64_t end) {
        const ChunkMemory memory = chunk_memory<Engine>(sizes);
        Engine::begin();
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
          const std::int64_t first = chunk * sizes.chunk_columns;
          const std::int64_t columns = lora_least(sizes.chunk_columns, n - first);
          load_b<Simd, T>(arguments.lora_b, sizes, first, columns, memory.factor, memory.stride);
          Engine::pack_dot(sizes, columns, memory);
          clear_ranks<Simd>(0, round_up(sizes.ranks, Simd::lanes), columns, memory.sums,
                            memory.stride);
          float* const partial = call.partial + chunk * sizes.padded_tokens * sizes.padded_ranks;
          for (std::int64_t i = 0; i < m; i += token_block) {
            const Block<const T> dy = {arguments.dy.as<const T>() + i * n + first, n,
                                       lora_least(token_block, m - i), columns};
            Engine::dot(sizes, dy, memory, partial + i * sizes.padded_ranks);
            Engine::add_outer(sizes, call.left_t, i, dy, memory);
          }
          store_grad_b<Simd>(memory.sums, memory.stride, sizes, arguments.scaling, first, columns,
                             arguments.grad_b);
        }
        Engine::end();
      });

  add_partial_sums<Engine>(sizes, call, sizes.chunks(n), arguments.scaling, nullptr, num_threads);

  parallel_for(
      num_threads, sizes.chunks(k), sizes.grain(), [&](std::int64_t begin, std::int64_t end) {
        const ChunkMemory memory = chunk_memory<Engine>(sizes);
        Engine::begin();
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
          const std::int64_t first = chunk * sizes.chunk_columns;
          const std::int64_t columns = lora_least(sizes.chunk_columns, k - first);
          if (arguments.dx.is_present) {
            load_a<Simd, T>(arguments.lora_a, sizes, first, columns, memory.factor, memory.stride);
            Engine::pack_update(sizes, columns, memory);
          }
          clear_ranks<Simd>(0, round_up(sizes.ranks, Simd::lanes), columns, memory.sums,
                            memory.stride);
          for (std::int64_t i = 0; i < m; i += token_block) {
            const std::int64_t tokens = lora_least(token_block, m - i);
            Engine::add_outer(sizes, call.left, i,
                              {arguments.x.as<const T>() + i * k + first, k, tokens, columns},
                              memory);
            if (arguments.dx.is_present) {
              Engine::update(sizes, call.left, i,
                             {arguments.dx.as<T>() + i * k + first, k, tokens, columns}, memory,
                             1.0f);
            }
          }
          store_grad_a<Simd>(memory.sums, memory.stride, sizes, first, columns, arguments.grad_a);
        }
        Engine::end();
      });
}

}  // namespace
}  // namespace qlora
