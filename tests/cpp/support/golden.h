// The golden bytes of tests/golden; make_golden.py there describes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "support/host_tensor.h"

/// The bytes of a file, e.g. "nf4_levels.bin".
std::vector<std::uint8_t> read_golden(const std::string& name);

/// The fp32 values of a file, as fp64.
std::vector<double> read_golden_floats(const std::string& name);

inline constexpr std::int64_t golden_n = 51, golden_k = 167;
inline constexpr std::int64_t golden_block_sizes[] = {32, 64, 256, 4096};

/// The input of the golden weights in a dtype that represents it exactly.
HostTensor make_golden_input(qlora::DType dtype);
