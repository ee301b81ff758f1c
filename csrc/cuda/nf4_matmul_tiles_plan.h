// How the tensor-core kernel for the middle cuts a product into thread blocks: by a model of its
// time, as no table of shapes would fit every number of multiprocessors.
//
// The numbers are computed or assumed, not measured; a measurement should replace them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/device_traits.h"
#include "cuda/nf4_matmul_tiles_map.h"
#include "format/nf4_layout.h"

namespace qlora::cuda::tiles {

/// What there are kernels for.
struct Configuration {
  int tokens;            // of a thread block
  int clocks_per_stage;  // of shared memory, forward and gradient's mean: nf4_matmul_tiles.cuh
};
inline constexpr Configuration configurations[] = {{64, 704}, {128, 1024}};

// More partial sums would cost more to add than more thread blocks save; fewer stages than these
// would not repay filling and draining the copies' pipeline, which is some 3 stages' time.
inline constexpr std::int64_t max_splits = 8;
inline constexpr std::int64_t min_stages_per_split = 4;
inline constexpr std::int64_t stages_to_fill_the_pipeline = 3;

// A thread block that has a multiprocessor to itself, one warp for each scheduler, waits for its own
// results: it takes half as long again. Assumed.
inline constexpr double slowdown_of_one_alone = 1.5;

// The kernel that adds partial sums: its launch, and fp32 written and read at what L2 moves for a
// multiprocessor in a clock. Assumed.
inline constexpr double clocks_of_a_launch = 3500.0;
inline constexpr double l2_bytes_per_clock = 24.0;

struct Plan {
  int tokens = 0;  // of a thread block
  std::int64_t token_tiles = 0, column_tiles = 0, splits = 0;
  std::int64_t stage_count = 0, stages_per_split = 0;

  constexpr std::int64_t thread_blocks() const { return token_tiles * column_tiles * splits; }
};

/// The plan with tiles of `tokens` tokens and about `splits` splits, none of them empty.
constexpr Plan make_plan(std::int64_t m, std::int64_t columns, std::int64_t reduced, int tokens,
                         std::int64_t splits) {
  Plan plan{.tokens = tokens,
            .token_tiles = ceil_divide(m, tokens),
            .column_tiles = ceil_divide(columns, columns_per_tile),
            .splits = 1,
            .stage_count = ceil_divide(reduced, reduced_per_stage)};
  plan.stages_per_split = ceil_divide(plan.stage_count, splits);
  if (plan.stages_per_split > 0) {
    plan.splits = ceil_divide(plan.stage_count, plan.stages_per_split);
  }
  return plan;
}

/// Whether there is a plan, without choosing one: a kernel fits the device, and the most thread blocks
/// that a plan can have fit a grid.
constexpr bool has_plan(std::int64_t m, std::int64_t columns, const DeviceTraits& device) {
  const int tokens = configurations[0].tokens;  // the fewest: least memory, most thread blocks
  return shared_bytes(tokens) <= device.max_shared_bytes &&
         make_plan(m, columns, 0, tokens, 1).thread_blocks() <=
             std::numeric_limits<int>::max() / max_splits;
}

/// The clocks that a plan is thought to take.
constexpr double estimate_clocks(const Plan& plan, int clocks_per_stage, std::int64_t m,
                                 std::int64_t columns, const DeviceTraits& device) {
  const int multiprocessors = std::max(1, device.multiprocessor_count);
  const std::int64_t busiest = ceil_divide(plan.thread_blocks(), multiprocessors);
  // A multiprocessor has 1 KB more than a thread block may ask for, and keeps 1 KB for each.
  const bool is_alone =
      busiest == 1 || 2 * (shared_bytes(plan.tokens) + 1024) > device.max_shared_bytes + 1024;
  const double in_turn = static_cast<double>(busiest) * (is_alone ? slowdown_of_one_alone : 1.0);
  const std::int64_t fills = is_alone ? busiest : ceil_divide(busiest, 2);  // the rest overlaps
  double clocks = (static_cast<double>(plan.stages_per_split) * in_turn +
                   static_cast<double>(fills * stages_to_fill_the_pipeline)) *
                  clocks_per_stage;
  if (plan.splits > 1) {
    const double bytes = 2.0 * 4.0 * static_cast<double>(m) * static_cast<double>(columns) *
                         static_cast<double>(plan.splits);
    clocks += clocks_of_a_launch + bytes / (l2_bytes_per_clock * multiprocessors);
  }
  return clocks;
}

/// The quickest by the model; its `tokens` are 0 if no kernel fits the device.
constexpr Plan choose_plan(std::int64_t m, std::int64_t columns, std::int64_t reduced,
                           const DeviceTraits& device) {
  Plan best;
  double best_clocks = std::numeric_limits<double>::infinity();
  for (const Configuration& configuration : configurations) {
    if (shared_bytes(configuration.tokens) > device.max_shared_bytes) continue;
    for (std::int64_t splits = 1; splits <= max_splits; ++splits) {
      const Plan plan = make_plan(m, columns, reduced, configuration.tokens, splits);
      if (splits > 1 && plan.stages_per_split < min_stages_per_split) break;
      const double clocks =
          estimate_clocks(plan, configuration.clocks_per_stage, m, columns, device);
      if (clocks < best_clocks) {
        best = plan;
        best_clocks = clocks;
      }
    }
  }
  return best;
}

}  // namespace qlora::cuda::tiles
