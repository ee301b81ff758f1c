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
// An engine has the types Simd, Activation and LeftElement, the multiples that its operands are padded
// to, and: pack_dot and pack_update (a factor's chunk), dot (partial sums of t or u), add_outer (sums
// of a gradient), update (of y or dx), finish_left.
//
// The chunks follow from the sizes alone and partial sums are added in their order: the results do
// not depend on the number of threads.
#pragma once

#include "core/operations.h"
#include "cpu/simd/lora_operands.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"

namespace qlora {
namespace {

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
