#include <vector>

#include <pybind11/stl.h>

#include "bindings/register.h"

namespace qlora {
namespace {

using Tensors = std::vector<TensorView>;
using Integers = std::vector<std::int64_t>;

/// The lists hold the same of every group; they must be equally long. `seed_indices` are into
/// `seeds`, -1 for a group without dropout.
std::vector<LoRAGroup> make_groups(const char* operation, const Integers& begins,
                                   const Integers& ends, const Integers& adapters,
                                   const Tensors& seeds, const Integers& seed_indices,
                                   const std::vector<float>& scalings,
                                   const std::vector<double>& ps) {
  const std::size_t count = begins.size();
  for (const std::size_t other :
       {ends.size(), adapters.size(), seed_indices.size(), scalings.size(), ps.size()}) {
    check(other == count, operation, ": ", count, " groups, but ", other, " of another list");
  }
  const auto seed_count = static_cast<std::int64_t>(seeds.size());
  std::vector<LoRAGroup> groups(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t seed = seed_indices[i];
    check(-1 <= seed && seed < seed_count, operation, ": group ", i, " has seed ", seed,
          ", want -1 or one of ", seed_count);
    groups[i] = {.begin = begins[i],
                 .end = ends[i],
                 .adapter = adapters[i],
                 .scaling = scalings[i],
                 .p = ps[i],
                 .seed = seed < 0 ? TensorView{} : seeds[static_cast<std::size_t>(seed)]};
  }
  return groups;
}

/// Without gradients: `gradients` is empty. Else A's and B's in turn, as the factors.
std::vector<LoRAAdapter> make_adapters(const char* operation, const Tensors& factors,
                                       const Tensors& gradients) {
  check(factors.size() % 2 == 0, operation, ": ", factors.size(), " factors, want pairs");
  check(gradients.empty() || gradients.size() == factors.size(), operation, ": ", factors.size(),
        " factors, but ", gradients.size(), " gradients");
  std::vector<LoRAAdapter> adapters(factors.size() / 2);
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    adapters[i] = {.lora_a = factors[2 * i], .lora_b = factors[2 * i + 1]};
    if (gradients.empty()) continue;
    adapters[i].grad_a = gradients[2 * i];
    adapters[i].grad_b = gradients[2 * i + 1];
  }
  return adapters;
}

}  // namespace

void register_lora(py::module_& module) {
  module.def(
      "lora_forward",
      [](const TensorView& x, const TensorView& lora_a, const TensorView& lora_b, float scaling,
         const TensorView& t, const TensorView& y, int num_threads, std::uintptr_t stream) {
        lora_forward({.x = rows_of(x),
                      .lora_a = lora_a,
                      .lora_b = lora_b,
                      .scaling = scaling,
                      .t = t,
                      .y = rows_of(y)},
                     make_context(num_threads, stream));
      },
      py::arg("x"), py::arg("lora_a"), py::arg("lora_b"), py::arg("scaling"), py::arg("t"),
      py::arg("y"), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "lora_backward",
      [](const TensorView& dy, const TensorView& x, const TensorView& t, const TensorView& lora_a,
         const TensorView& lora_b, float scaling, const TensorView& grad_a,
         const TensorView& grad_b, const TensorView& dx, int num_threads, std::uintptr_t stream) {
        lora_backward({.dy = rows_of(dy),
                       .x = rows_of(x),
                       .t = t,
                       .lora_a = lora_a,
                       .lora_b = lora_b,
                       .scaling = scaling,
                       .grad_a = grad_a,
                       .grad_b = grad_b,
                       .dx = rows_of(dx)},
                      make_context(num_threads, stream));
      },
      py::arg("dy"), py::arg("x"), py::arg("t"), py::arg("lora_a"), py::arg("lora_b"),
      py::arg("scaling"), py::arg("grad_a"), py::arg("grad_b"), py::arg("dx").none(true),
      py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "lora_forward_grouped",
      [](const TensorView& x, const Tensors& factors, const Tensors& seeds, const Integers& begins,
         const Integers& ends, const Integers& adapters, const Integers& seed_indices,
         const std::vector<float>& scalings, const std::vector<double>& ps, const TensorView& t,
         const TensorView& y, int num_threads, std::uintptr_t stream) {
        const char* const operation = "lora_forward_grouped";
        const auto groups =
            make_groups(operation, begins, ends, adapters, seeds, seed_indices, scalings, ps);
        const auto pairs = make_adapters(operation, factors, {});
        lora_forward_grouped(
            {.x = rows_of(x), .adapters = pairs, .groups = groups, .t = t, .y = rows_of(y)},
            make_context(num_threads, stream));
      },
      py::arg("x"), py::arg("factors"), py::arg("seeds"), py::arg("begins"), py::arg("ends"),
      py::arg("adapters"), py::arg("seed_indices"), py::arg("scalings"), py::arg("ps"),
      py::arg("t"), py::arg("y"), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "lora_backward_grouped",
      [](const TensorView& dy, const TensorView& x, const TensorView& t, const Tensors& factors,
         const Tensors& seeds, const Integers& begins, const Integers& ends,
         const Integers& adapters, const Integers& seed_indices, const std::vector<float>& scalings,
         const std::vector<double>& ps, const Tensors& gradients, const TensorView& dx,
         int num_threads, std::uintptr_t stream) {
        const char* const operation = "lora_backward_grouped";
        const auto groups =
            make_groups(operation, begins, ends, adapters, seeds, seed_indices, scalings, ps);
        const auto pairs = make_adapters(operation, factors, gradients);
        lora_backward_grouped({.dy = rows_of(dy),
                               .x = rows_of(x),
                               .t = t,
                               .adapters = pairs,
                               .groups = groups,
                               .dx = rows_of(dx)},
                              make_context(num_threads, stream));
      },
      py::arg("dy"), py::arg("x"), py::arg("t"), py::arg("factors"), py::arg("seeds"),
      py::arg("begins"), py::arg("ends"), py::arg("adapters"), py::arg("seed_indices"),
      py::arg("scalings"), py::arg("ps"), py::arg("gradients"), py::arg("dx").none(true),
      py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "dora_scale",
      [](const TensorView& rows, const TensorView& gain, const TensorView& addend,
         const TensorView& bias, const TensorView& y, int num_threads, std::uintptr_t stream) {
        dora_scale({.rows = rows_of(rows),
                    .gain = gain,
                    .addend = rows_of(addend),
                    .bias = bias,
                    .y = rows_of(y)},
                   make_context(num_threads, stream));
      },
      py::arg("rows"), py::arg("gain"), py::arg("addend").none(true), py::arg("bias").none(true),
      py::arg("y"), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "dora_scale_backward",
      [](const TensorView& dy, const TensorView& rows, const TensorView& gain,
         const TensorView& scaled, const TensorView& sums, int num_threads, std::uintptr_t stream) {
        dora_scale_backward({.dy = rows_of(dy),
                             .rows = rows_of(rows),
                             .gain = gain,
                             .scaled = rows_of(scaled),
                             .sums = sums},
                            make_context(num_threads, stream));
      },
      py::arg("dy"), py::arg("rows").none(true), py::arg("gain"), py::arg("scaled"),
      py::arg("sums").none(true), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "dropout",
      [](const TensorView& x, double p, const TensorView& seed, const TensorView& out,
         int num_threads,
         std::uintptr_t stream) { dropout(x, p, seed, out, make_context(num_threads, stream)); },
      py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("out"), py::arg("num_threads"),
      py::arg("stream"), NoGil());
}

}  // namespace qlora
