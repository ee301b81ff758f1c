#include "cuda/nf4_matmul_plan.h"

#include <algorithm>
#include <limits>

#include "cuda/nf4_matmul_few_tokens_map.h"

namespace qlora::cuda {
namespace {

constexpr std::int64_t no_limit = std::numeric_limits<std::int64_t>::max();

/// The most tokens that each strategy takes, tried in this order; the workspace has the rest.
struct Limits {
  int min_compute_capability;
  std::int64_t plain;       // of a product that neither tensor-core kernel takes
  std::int64_t few_tokens;  // of those that a tensor-core kernel takes
  std::int64_t tiles;
};

// Computed from bytes and operations, not measured. The last line that fits a device holds.
//
//   plain        4: some 30 instructions a weight for each 16 tokens, 40 to 60 us for 4096 x 4096 on
//                an H200. A workspace there costs a write and a read of 4 bytes a weight (fp32),
//                31 us, and two more launches, whatever m.
//   few_tokens  32: beyond, the sums no longer fit the registers. From 16 on every thread block reads
//                as many bytes of activations, from L2, as of codes.
//   tiles      512: dequantising costs 0.58 ps a weight at 4.3 TB/s, and a launch. The dense product
//                saves, where it has instructions that this kernel does not use (wgmma on 9.0, tcgen05
//                on 10.0), some 2 fs a weight and token at usual efficiencies: they meet at 300 to
//                500 tokens.
//             1024  on 8.x and 12.x, where the dense product has the same mma.
constexpr Limits limits_of_devices[] = {
    {.min_compute_capability = 80, .plain = 4, .few_tokens = 32, .tiles = 1024},
    {.min_compute_capability = 90, .plain = 4, .few_tokens = 32, .tiles = 512},
    {.min_compute_capability = 120, .plain = 4, .few_tokens = 32, .tiles = 1024},
};

const Limits& limits_of(const DeviceTraits& device) {
  const Limits* found = limits_of_devices;
  for (const Limits& limits : limits_of_devices) {
    if (limits.min_compute_capability <= device.compute_capability) found = &limits;
  }
  return *found;
}

}  // namespace

const char* name_of(Strategy strategy) {
  switch (strategy) {
    case Strategy::plain: return "plain";
    case Strategy::few_tokens: return "few_tokens";
    case Strategy::tiles: return "tiles";
    case Strategy::workspace: return "workspace";
  }
  return "unknown";
}

FewTokensPlan plan_few_tokens(const NF4MatmulProblem& problem, const DeviceTraits& device) {
  const bool is_forward = problem.direction == Direction::forward;
  const std::int64_t columns = is_forward ? problem.n : problem.k;
  const std::int64_t terms = is_forward ? problem.k : problem.n;
  FewTokensPlan plan;
  plan.token_tiles = token_tiles_for(problem.m);
  const std::int64_t column_blocks =
      ceil_divide(columns, few_tokens_columns(problem.direction, plan.token_tiles));
  // Share each sum among so many thread blocks that all are resident at once and fill the device,
  // but leave each warp two units of work: one to load while it multiplies the other.
  const std::int64_t units = ceil_divide(terms, few_tokens_terms_per_unit(problem.direction));
  const std::int64_t wanted = few_tokens_resident_blocks(problem.direction, plan.token_tiles) *
                              device.multiprocessor_count / column_blocks;
  plan.split =
      static_cast<int>(std::max<std::int64_t>(1, std::min(wanted, units / (2 * few_tokens_warps))));
  plan.thread_blocks = plan.split * column_blocks;
  plan.shared_bytes = few_tokens_shared_bytes(problem.direction, plan.token_tiles);
  return plan;
}

NF4MatmulPlan plan_nf4_matmul(const NF4MatmulProblem& problem, const DeviceTraits& device) {
  const Limits& limits = limits_of(device);
  const std::int64_t m = problem.m;
  NF4MatmulPlan plan{};
  if (problem.is_taken_by_few_tokens && m <= limits.few_tokens) {
    plan.advised = plan.native = Strategy::few_tokens;
    plan.few_tokens = plan_few_tokens(problem, device);
  } else if (problem.is_taken_by_tiles) {
    plan.native = Strategy::tiles;
    plan.advised = m <= limits.tiles ? Strategy::tiles : Strategy::workspace;
  } else {
    plan.native = Strategy::plain;
    plan.advised = m <= limits.plain ? Strategy::plain : Strategy::workspace;
  }
  return plan;
}

std::ostream& operator<<(std::ostream& stream, const NF4MatmulPlan& plan) {
  stream << name_of(plan.advised);
  if (plan.advised != plan.native) stream << " (native: " << name_of(plan.native) << ')';
  if (plan.native == Strategy::few_tokens) {
    const FewTokensPlan& few = plan.few_tokens;
    stream << ": " << few.token_tiles << " tiles of tokens, split " << few.split << ", "
           << few.thread_blocks << " thread blocks, " << few.shared_bytes << " shared bytes";
  }
  return stream;
}

}  // namespace qlora::cuda
