#include "cuda/architectures.h"

#include <gtest/gtest.h>

namespace qlora::cuda {
namespace {

constexpr char shipped[] = "80-real,86-real,89-real,90a-real,100-real,120";

TEST(CudaArchitectures, TheShippedOnesServeTheseGpus) {
  for (const int capability : {80, 86, 87, 89, 90, 100, 103, 120, 121, 130}) {
    EXPECT_TRUE(has_code_for(shipped, capability)) << capability;
  }
  for (const int capability : {70, 75, 110}) {
    EXPECT_FALSE(has_code_for(shipped, capability)) << capability;
  }
}

TEST(CudaArchitectures, MachineCodeServesItsMajorVersionAndALetterOneGpu) {
  EXPECT_TRUE(has_code_for("86-real", 89));
  EXPECT_FALSE(has_code_for("86-real", 80));
  EXPECT_FALSE(has_code_for("86-real", 90));
  EXPECT_TRUE(has_code_for("90a-real", 90));
  EXPECT_FALSE(has_code_for("100a-real", 103));
  EXPECT_TRUE(has_code_for("100f-real", 103));
  EXPECT_FALSE(has_code_for("100f", 120));
}

TEST(CudaArchitectures, PtxServesEveryLaterGpu) {
  EXPECT_TRUE(has_code_for("80", 120));
  EXPECT_TRUE(has_code_for("80-virtual", 86));
  EXPECT_FALSE(has_code_for("90a", 100));
  EXPECT_FALSE(has_code_for("90", 89));
}

TEST(CudaArchitectures, WordsServeAll) {
  EXPECT_TRUE(has_code_for("native", 90));
  EXPECT_FALSE(has_code_for("", 90));
}

}  // namespace
}  // namespace qlora::cuda
