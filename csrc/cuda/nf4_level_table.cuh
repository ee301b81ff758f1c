// Levels from shared memory, for kernels that decode many weights a thread.
#pragma once

#include "cuda/nf4_decode.cuh"
#include "cuda/shared_memory.cuh"

namespace qlora::cuda {

/// The 16 levels in fp32, once for each lane, in the lane's own bank: a look-up is one read without
/// a conflict whatever the codes.
///
/// A table of the 256 pairs would save 1.5 of 4.5 instructions a weight, at the same number of bytes
/// read, but takes 32 KB to be free of conflicts; this one takes 2. (Tables of the 16 products of a
/// block, in registers, looked up by prmt, cost 3 instructions a weight besides making them, which
/// takes 32 for a lane's 16 weights of a block.)
class NF4LevelTable {
 public:
  static constexpr int bytes = nf4_level_count * lanes_per_warp * 4;

  /// `table` is aligned to 128 bytes.
  __device__ NF4LevelTable(Shared<unsigned char> table, int lane)
      : table_(table), lane_(4 * lane) {}

  /// Writes thread `thread` of `threads`' part. A barrier must follow.
  __device__ static void fill(Shared<unsigned char> table, int thread, int threads) {
    for (int i = thread; i < nf4_level_count * lanes_per_warp; i += threads) {
      table.as<float>().store(i, device_levels.values[i / lanes_per_warp]);
    }
  }

  /// The level of bits [shift, shift + 4) of `word`.
  __device__ float operator()(std::uint32_t word, int shift) const {
    // The code becomes bits 7 to 10 of the address, the lane is bits 2 to 6: a shift and a LOP3.
    const std::uint32_t code = shift < 7 ? word << (7 - shift) : word >> (shift - 7);
    return (table_ + static_cast<int>((code & 0x780u) | lane_)).template as<float>().load();
  }

 private:
  Shared<unsigned char> table_;
  std::uint32_t lane_;
};

}  // namespace qlora::cuda
