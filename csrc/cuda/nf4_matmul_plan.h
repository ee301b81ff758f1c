// Which kernel takes a product with an NF4 weight, and how it is cut: a function of sizes and of the
// device's numbers alone, so that a table of tests can hold it without a GPU.
#pragma once

#include <ostream>

#include "cuda/device_traits.h"
#include "cuda/nf4_matmul.h"

namespace qlora::cuda {

enum class Strategy {
  plain,       // any dtype, shape and address
  few_tokens,  // tensor cores, a few tokens: bound by reading the weight
  tiles,       // tensor cores, tens to hundreds of tokens
  workspace,   // the caller dequantises and calls a dense product; no kernel of the core
};

const char* name_of(Strategy strategy);

/// What a plan depends on of a product.
struct NF4MatmulProblem {
  Direction direction = Direction::forward;
  std::int64_t m = 0, n = 0, k = 0;
  bool is_taken_by_few_tokens = false;  // by its dtype, shape and addresses, whatever m
  bool is_taken_by_tiles = false;
};

/// How the kernel for few tokens is launched (nf4_matmul_few_tokens_map.h).
struct FewTokensPlan {
  int token_tiles = 0;  // of 8 tokens
  int split = 0;        // thread blocks that share a sum; above 1 a second kernel adds up
  std::int64_t thread_blocks = 0;
  int shared_bytes = 0;

  friend bool operator==(const FewTokensPlan&, const FewTokensPlan&) = default;
};

struct NF4MatmulPlan {
  Strategy advised;          // to a caller that has the workspace as a choice
  Strategy native;           // what nf4_linear itself runs: `advised`, or else the best kernel
  FewTokensPlan few_tokens;  // if that is `native`
};

NF4MatmulPlan plan_nf4_matmul(const NF4MatmulProblem& problem, const DeviceTraits& device);

/// For any m up to nf4_max_few_tokens.
FewTokensPlan plan_few_tokens(const NF4MatmulProblem& problem, const DeviceTraits& device);

std::ostream& operator<<(std::ostream& stream, const NF4MatmulPlan& plan);

}  // namespace qlora::cuda
