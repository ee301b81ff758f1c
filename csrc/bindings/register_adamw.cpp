#include <vector>

#include <pybind11/stl.h>

#include "bindings/register.h"

namespace qlora {
namespace {

AdamWStep make_step(double lr, double beta1, double beta2, double eps, double weight_decay,
                    std::int64_t step, bool maximize) {
  return {.lr = lr,
          .beta1 = beta1,
          .beta2 = beta2,
          .eps = eps,
          .weight_decay = weight_decay,
          .step = step,
          .maximize = maximize};
}

using Tensors = std::vector<TensorView>;

/// The lists hold the same tensor of every parameter; they must be equally long.
void check_lengths(const char* operation, const Tensors& params,
                   std::initializer_list<const Tensors*> others) {
  for (const Tensors* other : others) {
    check(other->size() == params.size(), operation, ": ", params.size(), " params, but ",
          other->size(), " of another tensor");
  }
}

}  // namespace

void register_adamw(py::module_& module) {
  module.def(
      "adamw_step",
      [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
         const Tensors& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
         double weight_decay, std::int64_t step, bool maximize, int num_threads,
         std::uintptr_t stream) {
        check_lengths("adamw_step", params, {&grads, &exp_avgs, &exp_avg_sqs});
        std::vector<AdamWTensor> tensors;
        tensors.reserve(params.size());
        for (std::size_t i = 0; i < params.size(); ++i) {
          tensors.push_back({params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]});
        }
        adamw_step(tensors, make_step(lr, beta1, beta2, eps, weight_decay, step, maximize),
                   make_context(num_threads, stream));
      },
      py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
      py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
      py::arg("weight_decay"), py::arg("step"), py::arg("maximize"), py::arg("num_threads"),
      py::arg("stream"), NoGil());
  module.def(
      "adamw8bit_step",
      [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
         const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sqs,
         const Tensors& exp_avg_sq_absmaxes, double lr, double beta1, double beta2, double eps,
         double weight_decay, std::int64_t step, bool maximize, int num_threads,
         std::uintptr_t stream) {
        check_lengths("adamw8bit_step", params,
                      {&grads, &exp_avgs, &exp_avg_absmaxes, &exp_avg_sqs, &exp_avg_sq_absmaxes});
        std::vector<AdamW8bitTensor> tensors;
        tensors.reserve(params.size());
        for (std::size_t i = 0; i < params.size(); ++i) {
          tensors.push_back({params[i], grads[i], exp_avgs[i], exp_avg_absmaxes[i], exp_avg_sqs[i],
                             exp_avg_sq_absmaxes[i]});
        }
        adamw8bit_step(tensors, make_step(lr, beta1, beta2, eps, weight_decay, step, maximize),
                       make_context(num_threads, stream));
      },
      py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_absmaxes"),
      py::arg("exp_avg_sqs"), py::arg("exp_avg_sq_absmaxes"), py::kw_only(), py::arg("lr"),
      py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("step"),
      py::arg("maximize"), py::arg("num_threads"), py::arg("stream"), NoGil());
}

}  // namespace qlora
