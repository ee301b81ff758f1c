// Which instruction set runs: the one that QLORA_NATIVE_CPU_ISA names, else the best. The variable
// is read once a process, so the tests of other values run in a process of their own.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "core/backend.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

constexpr char variable[] = "QLORA_NATIVE_CPU_ISA";

/// Reports on stderr what runs when the variable is `value`, and exits.
[[noreturn]] void report_set_and_exit(const char* value) {
  setenv(variable, value, 1);
  try {
    // The work first: it must be what makes the choice, not only the report of it.
    Generator generator(28);
    HostTensor w = HostTensor::random(DType::float32, {2, 32}, generator);
    StoredWeight weight(2, 32, 32, false);
    nf4_quantize(w.view(), weight.view(), {});
    std::fprintf(stderr, "active: %s.", cpu_info().active_set.c_str());
    std::_Exit(0);
  } catch (const Unsupported& error) {
    std::fprintf(stderr, "refused: %s.", error.what());
    std::_Exit(3);
  }
}

class InstructionSetDeathTest : public testing::Test {
 protected:
  // Each statement runs in a fresh process, where nothing has read the variable yet.
  InstructionSetDeathTest() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(InstructionSetDeathTest, ScalarCanBeAskedFor) {
  EXPECT_EXIT(report_set_and_exit("scalar"), testing::ExitedWithCode(0), "active: scalar\\.");
}

TEST_F(InstructionSetDeathTest, AnUnknownSetIsRefusedWithTheNamesThatThereAre) {
  EXPECT_EXIT(report_set_and_exit("sse9"), testing::ExitedWithCode(3),
              "refused: QLORA_NATIVE_CPU_ISA is 'sse9', but this build on this processor has: "
              "scalar.*\\.");
}

TEST_F(InstructionSetDeathTest, AnEmptyValueIsNoChoice) {
  const std::string best = cpu_info().sets.back();
  EXPECT_EXIT(report_set_and_exit(""), testing::ExitedWithCode(0), "active: " + best + "\\.");
}

TEST(InstructionSet, TheSetAskedForIsTheActiveOne) {
  const CpuInfo info = cpu_info();
  const char* const wanted = std::getenv(variable);
  EXPECT_EQ(info.active_set, wanted != nullptr && *wanted ? wanted : info.sets.back());
}

TEST(InstructionSet, ScalarIsAlwaysThereAndSetsAreNamedOnce) {
  std::vector<std::string> sets = cpu_info().sets;
  ASSERT_FALSE(sets.empty());
  EXPECT_EQ(sets.front(), "scalar");
  std::sort(sets.begin(), sets.end());
  EXPECT_EQ(std::adjacent_find(sets.begin(), sets.end()), sets.end());
}

}  // namespace
}  // namespace qlora
