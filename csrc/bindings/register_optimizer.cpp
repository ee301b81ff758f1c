#include <functional>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "bindings/paged_memory.h"
#include "bindings/register.h"
#include "core/paged_state.h"

namespace qlora {
namespace {

using SharedState = std::shared_ptr<PagedState>;

OptimizerRule parse_rule(const std::string& text) {
  if (text == "adamw") return OptimizerRule::adamw;
  if (text == "lion") return OptimizerRule::lion;
  throw InvalidArgument(message("PagedState: rule is '", text, "', want adamw or lion"));
}

SharedState make_state(const std::string& device, const std::string& rule, bool is_8bit,
                       std::int64_t elements, std::int64_t page_bytes, const std::string& strategy,
                       std::optional<std::int64_t> resident_bytes,
                       const DirectoryArgument& page_file) {
  const py::gil_scoped_release no_gil;  // pinning memory takes a while
  const char* const operation = "PagedState";
  return SharedState(new PagedState(parse_device(operation, device), parse_rule(rule), is_8bit,
                                    {.elements = elements,
                                     .page_bytes = page_bytes,
                                     .strategy = parse_strategy(operation, strategy),
                                     .resident_bytes = resident_bytes,
                                     .page_file = to_page_file(page_file)}),
                     DeleteWithoutGil{});
}

PagedMemory memory_of_plane(const PagedState& state, int plane, std::int64_t first_element,
                            std::int64_t count) {
  check(plane >= 0 && plane < state.plane_count(), "PagedState.memory: plane is ", plane,
        ", want 0 to ", state.plane_count() - 1);
  check(first_element >= 0 && first_element % state_block_size == 0 && count >= 0 &&
            count <= state.elements() && first_element <= state.elements() - count,
        "PagedState.memory: the range is ", count, " elements from ", first_element,
        " on, want a part of the ", state.elements(), " that begins at a multiple of ",
        state_block_size);
  return memory_of(state.shared_plane(plane), state.plane_range(plane, first_element, count));
}

using Tensors = std::vector<TensorView>;
using Integers = std::vector<std::int64_t>;

/// A step on a list of parameters with state in pages, in three parts, so that of several steps all
/// are checked, and then all have the memory that they need, before the first is taken. The caller
/// keeps the tensors until it has run.
class PagedStep {
 public:
  PagedStep(SharedState state, const Tensors& params, const Tensors& grads,
            const Tensors& step_counts, const Integers& first_elements, const Integers& numbers,
            double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
            std::optional<std::uint64_t> rounding_seed, const TensorView& lr_tensor,
            const TensorView& grad_scale, const TensorView& found_inf)
      : state_(std::move(state)) {
    const std::size_t count = params.size();
    for (const std::size_t other :
         {grads.size(), step_counts.size(), first_elements.size(), numbers.size()}) {
      check(other == count, "PagedStep: ", count, " params, but ", other, " of another list");
    }
    tensors_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      tensors_.push_back({params[i], grads[i], step_counts[i], first_elements[i], numbers[i]});
    }
    step_.lr = lr;
    step_.beta1 = beta1;
    step_.beta2 = beta2;
    step_.eps = eps;
    step_.weight_decay = weight_decay;
    step_.maximize = maximize;
    step_.rounding_seed = rounding_seed;
    step_.lr_tensor = lr_tensor;
    step_.grad_scale = grad_scale;
    step_.found_inf = found_inf;
    validate_paged_optimizer_step(*state_, tensors_, step_);
  }

  void prepare(int num_threads, std::uintptr_t stream) {
    queue_ =
        prepare_paged_optimizer_step(*state_, tensors_, step_, make_context(num_threads, stream));
  }

  void run() {
    check(queue_ != nullptr, "PagedStep.run: the step is not prepared, or has run");
    std::exchange(queue_, nullptr)();
  }

 private:
  SharedState state_;
  std::vector<PagedTensor> tensors_;
  OptimizerStep step_;
  std::function<void()> queue_;
};

}  // namespace

void register_optimizer(py::module_& module) {
  py::class_<PagedState, SharedState>(module, "PagedState")
      .def(py::init(&make_state), py::arg("device"), py::arg("rule"), py::arg("is_8bit"),
           py::arg("elements"), py::kw_only(),
           py::arg("page_bytes") = PagedStateOptions{}.page_bytes,
           py::arg("strategy") = "automatic", py::arg("resident_bytes") = py::none(),
           py::arg("page_file") = py::none())
      .def_property_readonly("device",
                             [](const PagedState& state) { return message(state.device()); })
      .def_property_readonly("strategy",
                             [](const PagedState& state) { return message(state.strategy()); })
      .def_property_readonly("is_8bit", &PagedState::is_8bit)
      .def_property_readonly("elements", &PagedState::elements)
      .def_property_readonly("bytes", &PagedState::bytes)
      .def_property_readonly("page_bytes", &PagedState::page_bytes)
      .def_property_readonly("page_count", &PagedState::page_count)
      .def("memory", &memory_of_plane, py::arg("plane"), py::arg("first_element"), py::arg("count"))
      .def(
          "join",
          [](PagedState& state, std::uintptr_t stream) {
            state.join(reinterpret_cast<void*>(stream));
          },
          py::arg("stream"), NoGil())
      .def("report", [](const PagedState& state) { return report_of(state.report()); });

  py::class_<PagedStep>(module, "PagedStep")
      .def(py::init<SharedState, const Tensors&, const Tensors&, const Tensors&, const Integers&,
                    const Integers&, double, double, double, double, double, bool,
                    std::optional<std::uint64_t>, const TensorView&, const TensorView&,
                    const TensorView&>(),
           py::arg("state"), py::arg("params"), py::arg("grads"), py::arg("step_counts"),
           py::arg("first_elements"), py::arg("numbers"), py::kw_only(), py::arg("lr"),
           py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
           py::arg("maximize"), py::arg("rounding_seed") = py::none(),
           py::arg("lr_tensor") = py::none(), py::arg("grad_scale") = py::none(),
           py::arg("found_inf") = py::none())
      .def("prepare", &PagedStep::prepare, py::arg("num_threads"), py::arg("stream"), NoGil())
      .def("run", &PagedStep::run, NoGil());
}

}  // namespace qlora
