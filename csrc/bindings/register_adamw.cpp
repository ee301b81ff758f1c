#include <vector>

#include <pybind11/stl.h>

#include "bindings/register.h"

namespace qlora {
namespace {

AdamWStep make_step(double lr, double beta1, double beta2, double eps, double weight_decay,
                    std::int64_t step, bool maximize, const TensorView& lr_tensor,
                    const TensorView& grad_scale, const TensorView& found_inf) {
  return {{.lr = lr,
           .beta1 = beta1,
           .beta2 = beta2,
           .eps = eps,
           .weight_decay = weight_decay,
           .step = step,
           .maximize = maximize},
          lr_tensor,
          grad_scale,
          found_inf};
}

using Tensors = std::vector<TensorView>;

/// The lists hold the same tensor of every parameter; they must be equally long. No step counts are
/// absent ones.
void check_lengths(const char* operation, const Tensors& params, const Tensors& step_counts,
                   std::initializer_list<const Tensors*> others) {
  const auto check_length = [&](const Tensors& other) {
    check(other.size() == params.size(), operation, ": ", params.size(), " params, but ",
          other.size(), " of another tensor");
  };
  for (const Tensors* other : others) check_length(*other);
  if (!step_counts.empty()) check_length(step_counts);
}

TensorView step_count_of(const Tensors& step_counts, std::size_t i) {
  return step_counts.empty() ? TensorView{} : step_counts[i];
}

}  // namespace

void register_adamw(py::module_& module) {
  module.def(
      "adamw_step",
      [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
         const Tensors& exp_avg_sqs, const Tensors& step_counts, double lr, double beta1,
         double beta2, double eps, double weight_decay, std::int64_t step, bool maximize,
         const TensorView& lr_tensor, const TensorView& grad_scale, const TensorView& found_inf,
         int num_threads, std::uintptr_t stream) {
        check_lengths("adamw_step", params, step_counts, {&grads, &exp_avgs, &exp_avg_sqs});
        std::vector<AdamWTensor> tensors;
        tensors.reserve(params.size());
        for (std::size_t i = 0; i < params.size(); ++i) {
          tensors.push_back(
              {params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], step_count_of(step_counts, i)});
        }
        adamw_step(tensors,
                   make_step(lr, beta1, beta2, eps, weight_decay, step, maximize, lr_tensor,
                             grad_scale, found_inf),
                   make_context(num_threads, stream));
      },
      py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
      py::kw_only(), py::arg("step_counts"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("step"), py::arg("maximize"),
      py::arg("lr_tensor") = py::none(), py::arg("grad_scale") = py::none(),
      py::arg("found_inf") = py::none(), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "adamw8bit_step",
      [](const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
         const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sqs,
         const Tensors& exp_avg_sq_absmaxes, const Tensors& step_counts, double lr, double beta1,
         double beta2, double eps, double weight_decay, std::int64_t step, bool maximize,
         const TensorView& lr_tensor, const TensorView& grad_scale, const TensorView& found_inf,
         int num_threads, std::uintptr_t stream) {
        check_lengths("adamw8bit_step", params, step_counts,
                      {&grads, &exp_avgs, &exp_avg_absmaxes, &exp_avg_sqs, &exp_avg_sq_absmaxes});
        std::vector<AdamW8bitTensor> tensors;
        tensors.reserve(params.size());
        for (std::size_t i = 0; i < params.size(); ++i) {
          tensors.push_back({params[i], grads[i], exp_avgs[i], exp_avg_absmaxes[i], exp_avg_sqs[i],
                             exp_avg_sq_absmaxes[i], step_count_of(step_counts, i)});
        }
        adamw8bit_step(tensors,
                       make_step(lr, beta1, beta2, eps, weight_decay, step, maximize, lr_tensor,
                                 grad_scale, found_inf),
                       make_context(num_threads, stream));
      },
      py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_absmaxes"),
      py::arg("exp_avg_sqs"), py::arg("exp_avg_sq_absmaxes"), py::kw_only(), py::arg("step_counts"),
      py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("step"), py::arg("maximize"), py::arg("lr_tensor") = py::none(),
      py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none(), py::arg("num_threads"),
      py::arg("stream"), NoGil());
}

}  // namespace qlora
