#include "cuda/nf4_matmul_dispatch.h"

#include "cuda/nf4_matmul_few_tokens.h"
#include "cuda/nf4_matmul_plain.h"
#include "cuda/nf4_matmul_tiles.h"
#include "cuda/runtime.h"

namespace qlora::cuda {
namespace {

NF4MatmulProblem problem_of(const NF4Matmul& matmul, const DeviceTraits& device) {
  return {.direction = matmul.direction,
          .m = matmul.m(),
          .n = matmul.weight.n,
          .k = matmul.weight.k,
          .is_taken_by_few_tokens = nf4_matmul_few_tokens_supports(matmul),
          .is_taken_by_tiles = nf4_matmul_tiles_supports(matmul, device)};
}

}  // namespace

void run_nf4_matmul(const NF4Matmul& matmul, cudaStream_t stream) {
  if (matmul.m() == 0 || matmul.columns() == 0) return;
  if (matmul.reduced() == 0) return launch_nf4_matmul_plain(matmul, stream);  // bias or zeros
  const char* const operation = operation_of(matmul.direction);
  const DeviceTraits& device = device_traits(matmul.input.device.index, operation);
  const NF4MatmulPlan plan = plan_nf4_matmul(problem_of(matmul, device), device);
  switch (plan.native) {
    case Strategy::plain: return launch_nf4_matmul_plain(matmul, stream);
    case Strategy::few_tokens: return launch_nf4_matmul_few_tokens(matmul, plan.few_tokens, stream);
    case Strategy::tiles: return launch_nf4_matmul_tiles(matmul, device, stream);
    case Strategy::workspace: break;
  }
  throw Unsupported(message(operation, ": no kernel for the strategy ", name_of(plan.native)));
}

Strategy advise_nf4_matmul(const NF4MatmulShape& shape, const DeviceTraits& device) {
  if (shape.m == 0 || shape.n == 0 || shape.k == 0) return Strategy::plain;
  const auto tensor = [&](std::int64_t columns) {
    TensorView view;  // at address 0, which is aligned to anything
    view.dtype = shape.dtype;
    view.shape = {shape.m, columns};
    view.is_present = true;
    return view;
  };
  NF4Matmul matmul;
  matmul.direction = shape.is_grad_input ? Direction::grad_input : Direction::forward;
  matmul.input = tensor(shape.is_grad_input ? shape.n : shape.k);
  matmul.output = tensor(shape.is_grad_input ? shape.k : shape.n);
  matmul.weight.n = shape.n;
  matmul.weight.k = shape.k;
  matmul.weight.block_size = shape.block_size;
  return plan_nf4_matmul(problem_of(matmul, device), device).advised;
}

}  // namespace qlora::cuda
