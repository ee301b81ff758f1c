// A run for an instruction set that this build or processor lacks skips, in sight: ctest asks for
// every set by name.
#include <cstdio>
#include <cstdlib>

#include <gtest/gtest.h>

#include "core/backend.h"

namespace {

class CpuSetEnvironment : public testing::Environment {
 public:
  void SetUp() override {
    if (std::getenv("QLORA_NATIVE_CPU_ISA") == nullptr) return;
    try {
      qlora::cpu_info();
    } catch (const qlora::Unsupported& error) {
      // GoogleTest 1.12 counts tests that are skipped here as passed; ctest looks for this line.
      std::printf("[  SKIPPED ] all tests: %s\n", error.what());
      GTEST_SKIP() << error.what();
    }
  }
};

const testing::Environment* const environment =
    testing::AddGlobalTestEnvironment(new CpuSetEnvironment);

}  // namespace
