// Picks the codec's kernels and queues them.
#include "cuda/nf4_codec.h"

#include "cuda/launch.cuh"
#include "cuda/nf4_dequantize.cuh"
#include "cuda/nf4_nested_scales.cuh"
#include "cuda/nf4_quantize.cuh"

namespace qlora::cuda {
namespace {

std::int64_t element_count(const NF4Weight& weight) { return weight.n * weight.k; }

std::int64_t block_count(const NF4Weight& weight) {
  return nf4_block_count(element_count(weight), weight.block_size);
}

bool is_aligned(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

/// Whether a chunk is one access in the dense tensor and one in the codes.
template <typename T>
bool are_chunks_aligned(const void* dense, const void* codes) {
  return is_aligned(dense, 16) && is_aligned(codes, elements_per_chunk<T> / 2);
}

template <typename T>
using QuantizeKernel = void (*)(NF4QuantizeArguments<T>);

template <typename T>
QuantizeKernel<T> choose_quantize_kernel(std::int64_t block_size) {
  if (block_size > elements_per_step<T>) return nf4_quantize_long_blocks_kernel<T>;
  switch (lanes_per_block<T>(block_size)) {
    case 4:
      if constexpr (sizeof(T) == 2) return nf4_quantize_short_blocks_kernel<T, 4>;
      break;
    case 8: return nf4_quantize_short_blocks_kernel<T, 8>;
    case 16: return nf4_quantize_short_blocks_kernel<T, 16>;
    case 32: return nf4_quantize_short_blocks_kernel<T, 32>;
  }
  throw InvalidArgument(message("nf4_quantize: no kernel for block_size ", block_size));
}

template <typename T>
void launch_quantize_blocks(const TensorView& w, const NF4Weight& out, float* absmax,
                            unsigned long long* first_bad_block, cudaStream_t stream) {
  const NF4QuantizeArguments<T> arguments{
      .w = w.as<const T>(),
      .codes = out.codes.as<std::uint8_t>(),
      .absmax = absmax,
      .first_bad_block = first_bad_block,
      .element_count = element_count(out),
      .chunks_per_block_log2 = chunks_per_block_log2<T>(out.block_size),
      .is_aligned = are_chunks_aligned<T>(w.data, out.codes.data)};
  const std::int64_t tiles = out.block_size > elements_per_step<T>
                                 ? block_count(out)
                                 : tile_count<T>(element_count(out), quantize_steps_per_tile);
  launch("nf4_quantize", choose_quantize_kernel<T>(out.block_size),
         {thread_blocks_for_tiles(tiles), threads_per_thread_block}, stream, arguments);
}

void launch_quantize_scales(const NF4Weight& out, const NF4QuantizeScratch& scratch,
                            cudaStream_t stream) {
  const std::int64_t blocks = block_count(out);
  const std::int64_t groups = nf4_nested_block_count(blocks);
  float* const offset = out.nested_offset.as<float>();
  if (groups > 0) {
    launch("nf4_quantize: sums of the scales", nf4_sum_scales_kernel,
           {thread_blocks_for_items(groups, threads_per_sum_block), threads_per_sum_block}, stream,
           scratch.absmax, scratch.sums, blocks);
  }
  launch("nf4_quantize: mean of the scales", nf4_mean_of_scales_kernel, {1, lanes_per_warp}, stream,
         scratch.sums, blocks, offset);
  if (groups > 0) {
    launch("nf4_quantize: nested scales", nf4_quantize_scales_kernel,
           {thread_blocks_for_items(groups, 1), threads_per_scale_block,
            warps_per_scale_block * static_cast<int>(sizeof(float))},
           stream, scratch.absmax, offset, out.absmax.as<std::uint8_t>(),
           out.nested_absmax.as<float>(), blocks);
  }
}

template <typename T>
void launch_dequantize(const NF4Weight& weight, const TensorView& out, cudaStream_t stream) {
  const NF4DequantizeArguments<T> arguments{
      .codes = weight.codes.as<const std::uint8_t>(),
      .scales = scales_of(weight),
      .out = out.as<T>(),
      .element_count = element_count(weight),
      .chunks_per_block_log2 = chunks_per_block_log2<T>(weight.block_size),
      .is_aligned = are_chunks_aligned<T>(out.data, weight.codes.data)};
  const std::int64_t tiles = tile_count<T>(element_count(weight), dequantize_steps_per_tile);
  launch("nf4_dequantize",
         weight.is_nested() ? nf4_dequantize_kernel<T, true> : nf4_dequantize_kernel<T, false>,
         {thread_blocks_for_tiles(tiles), threads_per_thread_block}, stream, arguments);
}

constexpr std::size_t absmax_begin = 16;

std::size_t sums_begin(const NF4Weight& out) {
  return absmax_begin + 16 * static_cast<std::size_t>(ceil_divide(4 * block_count(out), 16));
}

}  // namespace

std::size_t NF4QuantizeScratch::bytes_for(const NF4Weight& out) {
  if (!out.is_nested()) return absmax_begin;
  return sums_begin(out) + 8 * static_cast<std::size_t>(nf4_nested_block_count(block_count(out)));
}

NF4QuantizeScratch::NF4QuantizeScratch(std::byte* memory, const NF4Weight& out)
    : first_bad_block(reinterpret_cast<unsigned long long*>(memory)),
      absmax(reinterpret_cast<float*>(memory + absmax_begin)),
      sums(reinterpret_cast<double*>(memory + sums_begin(out))) {}

void launch_nf4_quantize(const TensorView& w, const NF4Weight& out,
                         const NF4QuantizeScratch& scratch, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(scratch.first_bad_block, 0xff, sizeof no_bad_block, stream),
             "nf4_quantize");
  float* const absmax = out.is_nested() ? scratch.absmax : out.absmax.as<float>();
  if (element_count(out) > 0) {
    with_float_type(w.dtype, [&]<typename T>(T) {
      launch_quantize_blocks<T>(w, out, absmax, scratch.first_bad_block, stream);
    });
  }
  if (out.is_nested()) launch_quantize_scales(out, scratch, stream);
}

void launch_nf4_dequantize(const NF4Weight& weight, const TensorView& out, cudaStream_t stream) {
  if (element_count(weight) == 0) return;
  with_float_type(out.dtype, [&]<typename T>(T) { launch_dequantize<T>(weight, out, stream); });
}

void launch_nf4_dequantize_absmax(const NF4Weight& weight, float* out, cudaStream_t stream) {
  const std::int64_t blocks = block_count(weight);
  if (blocks == 0) return;
  if (!weight.is_nested()) {
    check_cuda(cudaMemcpyAsync(out, weight.absmax.data, 4 * static_cast<std::size_t>(blocks),
                               cudaMemcpyDeviceToDevice, stream),
               "nf4_dequantize_absmax");
    return;
  }
  launch("nf4_dequantize_absmax", nf4_dequantize_absmax_kernel,
         {thread_blocks_for_items(blocks, threads_per_thread_block), threads_per_thread_block},
         stream, scales_of(weight), out, blocks);
}

}  // namespace qlora::cuda
