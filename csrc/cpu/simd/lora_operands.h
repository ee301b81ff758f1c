// What simd/lora.h works on: sizes and memory of a call, and factors and their gradients between
// tensors and fp32.
#pragma once

#include "core/operations.h"
#include "cpu/work_split.h"
#include "cpu/workspace.h"

namespace qlora {
namespace {

constexpr std::int64_t lora_least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Tokens that an engine is given at once: with 512 columns in 16 bits, 64 KB, which stay in L2.
constexpr std::int64_t token_block = 64;

struct LoRASizes {
  std::int64_t tokens, ranks;
  std::int64_t padded_tokens, padded_ranks;
  std::int64_t chunk_columns;

  std::int64_t chunks(std::int64_t columns) const {
    return (columns + chunk_columns - 1) / chunk_columns;
  }
  /// Chunks that make a grain of work: elements of the activation and of the factor.
  std::int64_t grain() const { return grain_for(chunk_columns * (tokens + ranks)); }
};

template <typename Engine>
LoRASizes lora_sizes(std::int64_t tokens, std::int64_t ranks) {
  // Partial sums have `ranks` fp32 for each token of a chunk: 8 columns a rank keep them well below
  // the activations they come from. 512 columns at least, as every row of a chunk is on a page of
  // its own; 1024 at most keep a factor's share in L2.
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

}  // namespace
}  // namespace qlora
