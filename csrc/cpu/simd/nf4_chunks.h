// Weights in chunks of 128: what the linear kernels of all instruction sets cut a row of W into. A
// chunk is 64 bytes of codes, and each of its halves has one scale. Everything here has internal
// linkage: each source that includes it compiles its own.
#pragma once

#include <cstdint>

#include "cpu/thread_pool.h"
#include "cpu/work_split.h"
#include "cpu/workspace.h"
#include "format/nf4_layout.h"

namespace qlora {
namespace {

constexpr std::int64_t chunk_weights = 128;
constexpr std::int64_t half_chunk_weights = 64;

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline float* float_workspace(Workspace purpose, std::int64_t count) {
  return static_cast<float*>(
      thread_workspace(purpose, static_cast<std::size_t>(count) * sizeof(float)));
}

/// Whether there are weights, in rows of whole halves of chunks, each within one quantisation
/// block.
inline bool is_chunked(const NF4Bytes& weight) {
  return weight.n > 0 && weight.k > 0 && weight.k % half_chunk_weights == 0 &&
         weight.block_size >= half_chunk_weights;
}

/// The halves of chunks in a row of a weight that is_chunked.
inline std::int64_t half_chunks_of(const NF4Bytes& weight) { return weight.k / half_chunk_weights; }

/// A NaN without its payload, so that rounding its bits up cannot overflow.
inline float without_payload(float x) { return x != x ? __builtin_nanf("") : x; }

/// NF4Bytes::scale, less a NaN's payload.
inline float decode_scale(const NF4Bytes& weight, std::int64_t block) {
  if (weight.nested_offset == nullptr) return without_payload(load_float(weight.absmax, block));
  const float product = signed_dynamic_map.values.data()[weight.absmax[block]] *
                        load_float(weight.nested_absmax, block / nf4_blocks_per_nested_block);
  return without_payload(product + load_float(weight.nested_offset, 0));
}

/// Scales of blocks [first, first + count) in fp32. No NaN among them has a payload.
template <typename Simd>
void decode_scales(const NF4Bytes& weight, std::int64_t first, std::int64_t count, float* out) {
  if (weight.nested_offset == nullptr) {
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = without_payload(load_float(weight.absmax, first + i));
    }
    return;
  }
  const auto offset = Simd::broadcast(without_payload(load_float(weight.nested_offset, 0)));
  const float* const map = signed_dynamic_map.values.data();
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t block = first + done;
    const std::int64_t group = block / nf4_blocks_per_nested_block;
    const std::int64_t group_end = (group + 1) * nf4_blocks_per_nested_block;
    const std::int64_t run = least(least(count - done, group_end - block), Simd::lanes);
    const auto group_absmax =
        Simd::broadcast(without_payload(load_float(weight.nested_absmax, group)));
    if (run == Simd::lanes) {
      Simd::store(out + done, Simd::look_up(map, weight.absmax + block) * group_absmax + offset);
    } else {
      std::uint8_t codes[Simd::lanes] = {};
      __builtin_memcpy(codes, weight.absmax + block, static_cast<std::size_t>(run));
      Simd::store_partial(out + done, Simd::look_up(map, codes) * group_absmax + offset, run);
    }
    done += run;
  }
}

/// The scale of every half chunk of rows [begin, end).
template <typename Simd>
void decode_half_chunk_scales(const NF4Bytes& w, std::int64_t begin, std::int64_t end, float* out) {
  const std::int64_t first = begin * half_chunks_of(w), last = end * half_chunks_of(w);
  if (w.block_size == half_chunk_weights) {
    return decode_scales<Simd>(w, first, last - first, out);
  }
  const std::int64_t halves_per_block = w.block_size / half_chunk_weights;
  for (std::int64_t h = first; h < last;) {
    const float scale = decode_scale(w, h / halves_per_block);
    const std::int64_t block_end = least((h / halves_per_block + 1) * halves_per_block, last);
    for (; h < block_end; ++h) *out++ = scale;
  }
}

/// All of them, by all threads, and a zero after them, which AVX2 reads where the last chunk of W is
/// half of one.
template <typename Simd>
const float* decode_all_scales(const NF4Bytes& w, int num_threads) {
  float* const scales = float_workspace(Workspace::scales, w.n * half_chunks_of(w) + 1);
  scales[w.n * half_chunks_of(w)] = 0.0f;
  parallel_for(num_threads, w.n, grain_for(half_chunks_of(w)),
               [&](std::int64_t begin, std::int64_t end) {
                 decode_half_chunk_scales<Simd>(w, begin, end, scales + begin * half_chunks_of(w));
               });
  return scales;
}

}  // namespace
}  // namespace qlora
