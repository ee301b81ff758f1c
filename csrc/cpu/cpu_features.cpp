#include "cpu/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <initializer_list>

namespace qlora {
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool has_bits(std::uint64_t value, std::initializer_list<int> bits) {
  for (const int bit : bits) {
    if ((value >> bit & 1) == 0) return false;
  }
  return true;
}

/// The register states that the operating system saves (XCR0).
std::uint64_t enabled_states() {
  std::uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

/// Linux hands out the 8 KB of tile state on request only, to the process.
bool request_tile_state() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  // Bit numbers: Intel SDM volume 2, CPUID; XCR0: volume 1, section 13.3.
  CpuFeatures found;
  const Registers leaf1 = cpuid(1), leaf7 = cpuid(7), leaf7_1 = cpuid(7, 1);
  if (!has_bits(leaf1.ecx, {27})) return found;  // OSXSAVE
  const std::uint64_t states = enabled_states();
  found.avx2 = has_bits(states, {1, 2}) &&                     // SSE, AVX
               has_bits(leaf1.ecx, {12, 28, 29}) &&            // FMA, AVX, F16C
               has_bits(leaf7.ebx, {5});                       // AVX2
  found.avx512 = found.avx2 && has_bits(states, {5, 6, 7}) &&  // opmask, both halves of zmm
                 has_bits(leaf7.ebx, {16, 17, 30, 31});        // F, DQ, BW, VL
  found.avx512_bf16 = found.avx512 && has_bits(leaf7_1.eax, {5});
  found.amx_bf16 = found.avx512_bf16 && has_bits(states, {17, 18}) &&  // tile configuration, data
                   has_bits(leaf7.edx, {22, 24}) &&                    // AMX-BF16, AMX-TILE
                   request_tile_state();
  return found;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace qlora

#else

namespace qlora {

const CpuFeatures& cpu_features() {
  static const CpuFeatures none;
  return none;
}

}  // namespace qlora

#endif
