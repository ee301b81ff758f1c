// ldmatrix and mma, transcribed from the PTX ISA manual.
#include <array>
#include <cstring>

#include "cuda/emulation/emulator.h"
#include "cuda/emulation/shared_memory.h"
#include "cuda/emulation/thread_block.h"

namespace emulator {
namespace {

/// What a lane brings to mma.m16n8k16, and with d what it takes away.
struct Fragments {
  std::uint32_t a[4], b[2];
  float d[4];
};
static_assert(sizeof(Fragments) <= Slots::bytes_per_lane);

std::uint16_t half(std::uint32_t word, unsigned odd) {
  return static_cast<std::uint16_t>(word >> 16 * odd);
}

/// D += A · B for the whole warp, in fp64, rounded once.
template <typename T>
void multiply(Slots& slots) {
  const auto value = [](std::uint16_t bits) {
    return static_cast<double>(qlora::to_float(T{bits}));
  };
  std::array<Fragments, lanes> all;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    std::memcpy(&all[lane], slots.of_lane[lane].data(), sizeof(Fragments));
  }
  double a[16][16], b[16][8];
  for (unsigned row = 0; row < 16; ++row) {
    for (unsigned k = 0; k < 16; ++k) {
      const Fragments& holder = all[row % 8 * 4 + k % 8 / 2];
      a[row][k] = value(half(holder.a[row / 8 + k / 8 * 2], k % 2));
    }
  }
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned column = 0; column < 8; ++column) {
      b[k][column] = value(half(all[column * 4 + k % 8 / 2].b[k / 8], k % 2));
    }
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = static_cast<double>(all[lane].d[i]);
      for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      all[lane].d[i] = static_cast<float>(sum);
    }
    std::memcpy(slots.of_lane[lane].data(), &all[lane], sizeof(Fragments));
  }
}

}  // namespace

template <typename T>
void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  std::memcpy(mine.d, d, sizeof mine.d);
  const Slots& slots = exchange_in_warp("mma.m16n8k16", all_lanes, &mine, sizeof mine, multiply<T>);
  std::memcpy(&mine, slots.of_lane[lane()].data(), sizeof mine);
  std::memcpy(d, mine.d, sizeof mine.d);
}

template void multiply_accumulate<qlora::BFloat16>(float (&)[4], const std::uint32_t (&)[4],
                                                   const std::uint32_t (&)[2]);
template void multiply_accumulate<qlora::Float16>(float (&)[4], const std::uint32_t (&)[4],
                                                  const std::uint32_t (&)[2]);

void load_matrices(std::uint32_t (&r)[4], const void* row, bool is_transposed) {
  constexpr std::size_t row_bytes = 16;
  the_shared_memory().read(this_thread(), row, row_bytes, row_bytes);
  const Slots& slots = exchange_in_warp(is_transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4",
                                        all_lanes, row, row_bytes);
  const auto element = [&](unsigned matrix, unsigned at_row, unsigned column) {
    std::uint16_t bits;  // lane 8 i + j brought row j of matrix i
    std::memcpy(&bits, slots.of_lane[8 * matrix + at_row].data() + 2 * column, sizeof bits);
    return std::uint32_t{bits};
  };
  const unsigned i = lane() / 4, j = 2 * (lane() % 4);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    r[matrix] = is_transposed ? element(matrix, j, i) | element(matrix, j + 1, i) << 16
                              : element(matrix, i, j) | element(matrix, i, j + 1) << 16;
  }
}

}  // namespace emulator
