#include "cpu/amx/kernels.h"
#include "cpu/amx/tile_configuration.h"
#include "cpu/avx512_bf16/lora_tiles.h"

namespace qlora::amx {
namespace {

using avx512::StridedTileProduct;
using avx512::tile_floats;

/// Products by `tdpbf16ps`. Tiles 0 to 3 hold sums[row tile][column tile], 4 and 5 row tiles, 6 and
/// 7 column tiles.
struct TileMultiplier {
  static void begin() { configure_tiles(); }
  static void end() { _tile_release(); }

  static void multiply(const StridedTileProduct& p) {
    if (p.row_tiles == 2) {
      p.column_tiles == 2 ? multiply_tiles<2, 2>(p) : multiply_tiles<2, 1>(p);
    } else {
      p.column_tiles == 2 ? multiply_tiles<1, 2>(p) : multiply_tiles<1, 1>(p);
    }
  }

 private:
  template <int row_tiles, int column_tiles>
  QLORA_INLINE static void multiply_tiles(const StridedTileProduct& p) {
    constexpr bool two_rows = row_tiles == 2, two_columns = column_tiles == 2;
    constexpr int line = 64;  // bytes
    const std::int64_t a_line = p.a_stride * 2, sums_line = p.sums_stride * 4;
    float* const sums0 = p.sums;
    float* const sums1 = p.sums + 16 * p.sums_stride;
    publish_stores();
    if (p.is_first) {
      _tile_zero(0);
      if (two_columns) _tile_zero(1);
      if (two_rows) _tile_zero(2);
      if (two_rows && two_columns) _tile_zero(3);
    } else {
      _tile_loadd(0, sums0, sums_line);
      if (two_columns) _tile_loadd(1, sums0 + 16, sums_line);
      if (two_rows) _tile_loadd(2, sums1, sums_line);
      if (two_rows && two_columns) _tile_loadd(3, sums1 + 16, sums_line);
    }
    const BFloat16* a = p.a;
    const float* b = p.b;
    for (std::int64_t pair = 0; pair < p.inner_pairs; pair += 16) {
      _tile_loadd(4, a, a_line);
      _tile_loadd(6, b, line);
      _tile_dpbf16ps(0, 4, 6);
      if (two_columns) {
        _tile_loadd(7, b + p.b_tile_stride, line);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (two_rows) {
        _tile_loadd(5, a + 16 * p.a_stride, a_line);
        _tile_dpbf16ps(2, 5, 6);
        if (two_columns) _tile_dpbf16ps(3, 5, 7);
      }
      a += 32;
      b += tile_floats;
    }
    _tile_stored(0, sums0, sums_line);
    if (two_columns) _tile_stored(1, sums0 + 16, sums_line);
    if (two_rows) _tile_stored(2, sums1, sums_line);
    if (two_rows && two_columns) _tile_stored(3, sums1 + 16, sums_line);
  }
};

using Engine = avx512::TileLoRA<TileMultiplier>;

}  // namespace

void lora_forward(const LoRAForward& arguments, int num_threads) {
  if (!avx512::prefers_tiles(arguments.x)) {
    return avx512_kernels().lora_forward(arguments, num_threads);
  }
  run_lora_forward<Engine>(arguments, num_threads);
}

void lora_backward(const LoRABackward& arguments, int num_threads) {
  if (!avx512::prefers_tiles(arguments.x)) {
    return avx512_kernels().lora_backward(arguments, num_threads);
  }
  run_lora_backward<Engine>(arguments, num_threads);
}

}  // namespace qlora::amx
