// The emulated tensor cores against the PTX ISA manual: who holds what is written down here from
// its formulas and figures, and owes nothing to the emulator or to the kernels' maps.
#include <cmath>

#include "cuda/emulator_fixture.h"
#include "cuda/mma.cuh"

namespace qlora::cuda {
namespace {

struct Place {
  int row, column;
};

// "Matrix Fragments for mma.m16n8k16 with floating point type", .f16 and .bf16: element i of lane
// `lane`, where groupID = %laneid >> 2 and threadID_in_group = %laneid % 4.

/// row = groupID for a0, a1, a4, a5, groupID + 8 for the others;
/// col = threadID_in_group * 2 + (i & 1) for i < 4, 8 more for i >= 4.
Place place_in_a(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  const bool is_upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {is_upper ? group : group + 8, thread_in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}

/// row = threadID_in_group * 2 + (i & 1) for i < 2, 8 more for i >= 2; col = groupID.
Place place_in_b(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2}; }

/// row = groupID for c0, c1, groupID + 8 for c2, c3; col = threadID_in_group * 2 + (i & 1).
Place place_in_d(int lane, int i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}

/// Entries of the manual's figures, to hold the formulas above to.
TEST(PtxManual, FormulasAgreeWithTheFigures) {
  struct Entry {
    int lane, i, row, column;
  };
  constexpr Entry a[] = {{0, 0, 0, 0},   {3, 1, 0, 7},   {0, 4, 0, 8},   {3, 5, 0, 15},
                         {4, 0, 1, 0},   {31, 1, 7, 7},  {28, 4, 7, 8},  {0, 2, 8, 0},
                         {3, 3, 8, 7},   {0, 6, 8, 8},   {3, 7, 8, 15},  {28, 2, 15, 0},
                         {31, 3, 15, 7}, {28, 6, 15, 8}, {31, 7, 15, 15}};
  constexpr Entry b[] = {{0, 0, 0, 0},  {0, 1, 1, 0},  {3, 0, 6, 0},  {3, 1, 7, 0},
                         {0, 2, 8, 0},  {3, 3, 15, 0}, {4, 0, 0, 1},  {28, 0, 0, 7},
                         {31, 1, 7, 7}, {28, 2, 8, 7}, {31, 3, 15, 7}};
  constexpr Entry d[] = {{0, 0, 0, 0},  {0, 1, 0, 1}, {3, 1, 0, 7}, {4, 0, 1, 0},
                         {31, 1, 7, 7}, {0, 2, 8, 0}, {3, 3, 8, 7}, {31, 3, 15, 7}};
  const auto expect = [](const Entry& entry, Place place) {
    EXPECT_EQ(place.row, entry.row) << "lane " << entry.lane << ", i " << entry.i;
    EXPECT_EQ(place.column, entry.column) << "lane " << entry.lane << ", i " << entry.i;
  };
  for (const Entry& entry : a) expect(entry, place_in_a(entry.lane, entry.i));
  for (const Entry& entry : b) expect(entry, place_in_b(entry.lane, entry.i));
  for (const Entry& entry : d) expect(entry, place_in_d(entry.lane, entry.i));
}

struct Registers {
  std::uint32_t a[32][4], b[32][2];
  float d[32][4];
};

template <typename T>
__global__ void multiply_kernel(Registers* registers) {
  const unsigned lane = threadIdx.x;
  multiply_accumulate<T>(registers->d[lane], registers->a[lane], registers->b[lane]);
}

/// Element i of a lane's registers: the lower half of a register comes first.
void set_element(std::uint32_t* registers, int i, std::uint16_t bits) {
  registers[i / 2] |= std::uint32_t{bits} << 16 * (i % 2);
}

template <typename T>
class EmulatorMma : public Emulator {};
using ElementTypes = testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(EmulatorMma, ElementTypes, );

TYPED_TEST(EmulatorMma, MultipliesWhatTheManualsLanesHold) {
  std::mt19937_64 generator(21);
  std::normal_distribution<float> normal;
  const auto random = [&] { return from_float<TypeParam>(normal(generator)); };
  TypeParam a[16][16], b[16][8];
  float c[16][8];
  for (auto& row : a) std::generate(std::begin(row), std::end(row), random);
  for (auto& row : b) std::generate(std::begin(row), std::end(row), random);
  for (auto& row : c)
    std::generate(std::begin(row), std::end(row), [&] { return normal(generator); });

  Registers registers{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const Place place = place_in_a(lane, i);
      set_element(registers.a[lane], i, a[place.row][place.column].bits);
    }
    for (int i = 0; i < 4; ++i) {
      const Place in_b = place_in_b(lane, i), in_d = place_in_d(lane, i);
      set_element(registers.b[lane], i, b[in_b.row][in_b.column].bits);
      registers.d[lane][i] = c[in_d.row][in_d.column];
    }
  }
  in_every_order([&] {
    Registers results = registers;
    this->run(multiply_kernel<TypeParam>, {1, 32}, &results);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto [row, column] = place_in_d(lane, i);
        double exact = c[row][column], magnitude = std::abs(exact);
        for (int k = 0; k < 16; ++k) {
          const double product = static_cast<double>(to_float(a[row][k])) *
                                 static_cast<double>(to_float(b[k][column]));
          exact += product;
          magnitude += std::abs(product);
        }
        // One rounding to fp32, and those of 16 sums in fp64.
        EXPECT_NEAR(results.d[lane][i], exact, std::abs(exact) * 0x1p-24 + magnitude * 0x1p-48)
            << "D[" << row << "][" << column << "]";
      }
    }
  });
}

struct Matrices {
  std::uint16_t plain[4][8][8];
  std::uint32_t loaded[32][4], loaded_transposed[32][4];
};

/// Rows lie in any order, as the lanes' addresses are their own.
__global__ void load_matrices_kernel(Matrices* matrices) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto row_of = [](int of_lane) {
    return dynamic_shared_memory<std::uint16_t>(16 * (of_lane * 13 % 32));
  };
  for (int column = 0; column < 8; ++column) {
    row_of(lane).store(column, matrices->plain[lane / 8][lane % 8][column]);
  }
  __syncwarp();
  load_matrices(matrices->loaded[lane], row_of(lane));
  load_matrices_transposed(matrices->loaded_transposed[lane], row_of(lane));
}

// "Warp-level matrix load instruction: ldmatrix": lanes 0 to 7 pass the rows of matrix 0, 8 to 15
// those of matrix 1, and so on; of each matrix, row r lies in lanes 4 r to 4 r + 3, two elements a
// lane. With .trans matrices are loaded in column-major format.
TEST_F(Emulator, LoadsMatricesAsTheManualDistributesThem) {
  Matrices matrices;
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        matrices.plain[matrix][row][column] =
            static_cast<std::uint16_t>(1000 * matrix + 10 * row + column);
      }
    }
  }
  in_every_order([&] {
    run(load_matrices_kernel, {1, 32, 32 * 16}, &matrices);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto& plain = matrices.plain[matrix];
      for (int row = 0; row < 8; ++row) {
        for (int i = 0; i < 8; ++i) {
          const int lane = 4 * row + i / 2, shift = 16 * (i % 2);
          EXPECT_EQ(matrices.loaded[lane][matrix] >> shift & 0xffff, plain[row][i]);
          EXPECT_EQ(matrices.loaded_transposed[lane][matrix] >> shift & 0xffff, plain[i][row]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace qlora::cuda
