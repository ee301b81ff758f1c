// Loops of nothing but arithmetic, each for one instruction set, and which of them can run here.

#ifndef QLORA_BENCHMARKS_PROBES_ARITHMETIC_H_
#define QLORA_BENCHMARKS_PROBES_ARITHMETIC_H_

#include <cstdint>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora_probes {

// ---- what the processor has

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
};

inline Features detect() {
  Features has;
#if defined(__x86_64__)
  // These look at XCR0 as well: the operating system must save the registers.
  has.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  has.avx512 = has.avx2 && __builtin_cpu_supports("avx512f");
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  has.avx512_bf16 = has.avx512 && (eax >> 5 & 1);
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  has.amx_bf16 = has.avx512 && (edx >> 22 & 1) && (edx >> 24 & 1) &&
                 syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
  return has;
}

inline const Features& features() {
  static const Features found = detect();
  return found;
}

// ---- arithmetic: independent sums, enough of them to hide the latency of one (4 to 6 cycles)

constexpr int kSums = 12;
constexpr std::int64_t kSteps = 200'000;
constexpr int kTileSums = 6;  // of the 8 tiles; 2 are operands
constexpr std::int64_t kTileSteps = kSteps / 10;

#if defined(__x86_64__)
// In assembly, because compilers may keep an array of sums in memory. The operands are zero, which takes as long.
#define QLORA_EACH_SUM(f, r) \
  f(r, 0) f(r, 1) f(r, 2) f(r, 3) f(r, 4) f(r, 5) f(r, 6) f(r, 7) f(r, 8) f(r, 9) f(r, 10) f(r, 11)
#define QLORA_ZERO(r, i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define QLORA_FMA(r, i) "vfmadd231ps %%" #r "15, %%" #r "15, %%" #r #i "\n\t"
#define QLORA_DOT(r, i) "vdpbf16ps %%" #r "15, %%" #r "15, %%" #r #i "\n\t"
#define QLORA_PEAK_LOOP(step, r) \
  std::int64_t left = kSteps;    \
  __asm__ volatile(QLORA_EACH_SUM(QLORA_ZERO, r) "vpxor %%xmm15, %%xmm15, %%xmm15\n"           \
                   "1:\n\t" QLORA_EACH_SUM(step, r) "dec %0\n\tjnz 1b\n\tvzeroupper"           \
                   : "+r"(left)                                                                \
                   :                                                                           \
                   : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",     \
                     "xmm8", "xmm9", "xmm10", "xmm11", "xmm15");

[[gnu::target("avx2,fma")]] inline void fma_avx2() { QLORA_PEAK_LOOP(QLORA_FMA, ymm) }
[[gnu::target("avx512f")]] inline void fma_avx512() { QLORA_PEAK_LOOP(QLORA_FMA, zmm) }
[[gnu::target("avx512f,avx512bf16")]] inline void dpbf16_avx512() {
  QLORA_PEAK_LOOP(QLORA_DOT, zmm)
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

[[gnu::target("amx-tile,amx-bf16")]] inline void dpbf16_amx() {
  // Static: GCC's intrinsic says that it reads 8 bytes, and stores to the rest would be dropped.
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
  for (std::int64_t i = 0; i < kTileSteps; ++i) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
}
#endif

/// `operations` floating-point operations a call of `run`, which is null where it cannot run.
struct PeakKernel {
  void (*run)() = nullptr;
  double operations = 0;
};

inline PeakKernel find_peak_kernel([[maybe_unused]] std::string_view name) {
#if defined(__x86_64__)
  constexpr double sums = static_cast<double>(kSums) * kSteps;
  constexpr double tiles = static_cast<double>(kTileSums) * kTileSteps;
  const Features& has = features();
  if (name == "fma_avx2" && has.avx2) return {fma_avx2, 2 * 8 * sums};
  if (name == "fma_avx512" && has.avx512) return {fma_avx512, 2 * 16 * sums};
  if (name == "vdpbf16ps" && has.avx512_bf16) return {dpbf16_avx512, 2 * 32 * sums};
  if (name == "tdpbf16ps" && has.amx_bf16) return {dpbf16_amx, 2 * 16 * 16 * 32 * tiles};
#endif
  return {};
}

}  // namespace qlora_probes

#endif  // QLORA_BENCHMARKS_PROBES_ARITHMETIC_H_
