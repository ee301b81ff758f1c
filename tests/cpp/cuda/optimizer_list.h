// Lists of parameters with their state, in the CPU's memory and, as a copy, in the emulated device's.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "core/operations.h"
#include "format/nf4_layout.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {

inline TensorView on_cuda(TensorView view) {
  view.device = {DeviceType::cuda, 0};
  return view;
}

/// How a list is stepped.
struct StepKind {
  OptimizerRule rule = OptimizerRule::adamw;
  bool is_8bit = false;
  bool is_stochastic = false;  // the rounding of bfloat16 parameters

  const char* operation() const { return optimizer_step_name(rule, is_8bit); }
  std::string name() const {
    return std::string(rule == OptimizerRule::adamw ? "AdamW" : "Lion") +
           (is_8bit ? "In8Bits" : "In32Bits") + (is_stochastic ? "Stochastic" : "");
  }
};

inline constexpr StepKind adamw_8bit{.is_8bit = true};
inline auto step_kinds(bool is_stochastic) {
  constexpr OptimizerRule adamw = OptimizerRule::adamw, lion = OptimizerRule::lion;
  return testing::Values(StepKind{adamw, false, is_stochastic},
                         StepKind{adamw, true, is_stochastic}, StepKind{lion, false, is_stochastic},
                         StepKind{lion, true, is_stochastic});
}

/// One parameter. Lion has no second moment, 32-bit state no absmax, and a step count that the host
/// keeps is no step_count.
struct Parameter {
  HostTensor param, grad, exp_avg, exp_avg_sq, absmax, absmax_sq, step_count;

  static constexpr int tensor_count = 7;
  std::array<HostTensor*, tensor_count> tensors() {
    return {&param, &grad, &exp_avg, &exp_avg_sq, &absmax, &absmax_sq, &step_count};
  }
};

struct ParameterKind {
  DType param = DType::float32, grad = DType::float32;
  bool has_step_count = false;
};

inline HostTensor zeros(DType dtype, std::int64_t count) {
  return {dtype, {count}, std::vector<double>(static_cast<std::size_t>(count))};
}

/// Values of many magnitudes and both signs, and zeros.
inline void fill_spread(HostTensor& tensor, Generator& generator) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> exponent(-20.0, 3.0);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    tensor.set(i, i % 19 == 0 ? 0.0 : normal(generator) * std::exp2(exponent(generator)));
  }
}

inline Parameter make_parameter(const StepKind& step, const ParameterKind& kind, std::int64_t count,
                                Generator& generator) {
  const auto state = [&](bool is_there, DType dtype, std::int64_t size) {
    return is_there ? zeros(dtype, size) : HostTensor();
  };
  const std::int64_t blocks = ceil_divide(count, state_block_size);
  const DType moment = step.is_8bit ? DType::uint8 : DType::float32;
  const bool has_second = step.rule == OptimizerRule::adamw;
  Parameter p{.param = HostTensor(kind.param, {count}),
              .grad = HostTensor(kind.grad, {count}),
              .exp_avg = state(true, moment, count),
              .exp_avg_sq = state(has_second, moment, count),
              .absmax = state(step.is_8bit, DType::float32, blocks),
              .absmax_sq = state(step.is_8bit && has_second, DType::float32, blocks),
              .step_count = state(kind.has_step_count, DType::float32, 1)};
  fill_spread(p.param, generator);
  return p;
}

/// Gradients with, from time to time, a block of zeros and one whose squares are subnormal.
inline void draw_gradient(Parameter& p, std::int64_t t, Generator& generator) {
  fill_spread(p.grad, generator);
  const auto each = [&](std::int64_t begin, std::int64_t end, double value) {
    for (std::int64_t i = begin; i < std::min(end, p.grad.numel()); ++i) {
      p.grad.set(i, i % 3 ? value : 0.0);
    }
  };
  if (t <= 2) each(256, 512, 0.0);
  each(512, 768, 1e-20);
}

using Views = std::array<TensorView, Parameter::tensor_count>;

inline OptimizerTensor as_32bit(const Views& v) {
  return with_32bit_state(v[0], v[1], v[2], v[3], v[6]);
}
inline OptimizerTensor as_8bit(const Views& v) {
  return with_8bit_state(v[0], v[1], v[2], v[4], v[3], v[5], v[6]);
}

inline std::vector<OptimizerTensor> optimizer_tensors(const std::vector<Views>& list,
                                                      const StepKind& kind) {
  std::vector<OptimizerTensor> tensors(list.size());
  std::transform(list.begin(), list.end(), tensors.begin(), kind.is_8bit ? as_8bit : as_32bit);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].number = 1000 + static_cast<std::int64_t>(i);
  }
  return tensors;
}

/// Steps a list of parameters that these views are of.
inline void step_list(const std::vector<Views>& list, const StepKind& kind,
                      const OptimizerStep& step, void* stream = nullptr) {
  optimizer_step(kind.rule, optimizer_tensors(list, kind), step, {.stream = stream});
}

/// Elements [begin, end) of a tensor; begin is a multiple of 256. The last piece counts the step.
inline OptimizerTensor piece_of(OptimizerTensor tensor, std::int64_t begin, std::int64_t end) {
  const auto cut = [](TensorView& view, std::int64_t first, std::int64_t last) {
    if (!view.is_present) return;
    view.data = view.as<std::uint8_t>() + first * element_bytes(view.dtype);
    view.shape = {last - first};
  };
  OptimizerState& state = tensor.state;
  tensor.counts_step = end == tensor.param.numel();
  tensor.first_element += begin;
  for (TensorView* view : {&tensor.param, &tensor.grad, &state.exp_avg, &state.exp_avg_sq}) {
    cut(*view, begin, end);
  }
  for (TensorView* view : {&state.exp_avg_absmax, &state.exp_avg_sq_absmax}) {
    cut(*view, begin / state_block_size, ceil_divide(end, state_block_size));
  }
  return tensor;
}

inline std::vector<Views> cpu_views(std::vector<Parameter>& list) {
  std::vector<Views> out;
  for (Parameter& p : list) {
    Views& views = out.emplace_back();
    const auto tensors = p.tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) views[i] = tensors[i]->view();
  }
  return out;
}

/// A copy of a list in memory of the device that ends with each tensor's last element and begins
/// `offset` elements past a multiple of 16 bytes.
class DeviceList {
 public:
  explicit DeviceList(std::vector<Parameter>& list, std::size_t offset = 0) {
    for (Parameter& p : list) {
      Views& views = views_.emplace_back();
      const auto tensors = p.tensors();
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        views[i] = on_cuda(tensors[i]->view());
        if (!views[i].is_present) continue;
        const std::size_t shift = offset * bytes_of_element(*tensors[i]);
        auto& memory = memory_.emplace_back(shift + tensors[i]->bytes().size());
        std::copy(tensors[i]->bytes().begin(), tensors[i]->bytes().end(), memory.begin() + shift);
        views[i].data = memory.data() + shift;
      }
    }
  }

  const std::vector<Views>& views() const { return views_; }

  void set_gradients(std::vector<Parameter>& list) {
    for (std::size_t i = 0; i < list.size(); ++i) {
      std::copy(list[i].grad.bytes().begin(), list[i].grad.bytes().end(),
                views_[i][1].as<std::uint8_t>());
    }
  }

  testing::AssertionResult equals(std::vector<Parameter>& list) const {
    static constexpr const char* names[] = {"param",  "grad",      "exp_avg",   "exp_avg_sq",
                                            "absmax", "absmax_sq", "step_count"};
    for (std::size_t i = 0; i < list.size(); ++i) {
      const auto tensors = list[i].tensors();
      for (std::size_t j = 0; j < tensors.size(); ++j) {
        const std::vector<std::uint8_t>& wanted = tensors[j]->bytes();
        const auto* const actual = views_[i][j].as<const std::uint8_t>();
        const auto difference = std::mismatch(wanted.begin(), wanted.end(), actual).first;
        if (difference == wanted.end()) continue;
        const auto element =
            static_cast<std::size_t>(difference - wanted.begin()) / bytes_of_element(*tensors[j]);
        return testing::AssertionFailure()
               << names[j] << " of parameter " << i << " (" << list[i].param.numel()
               << " elements) differs at " << element;
      }
    }
    return testing::AssertionSuccess();
  }

 private:
  static std::size_t bytes_of_element(const HostTensor& tensor) {
    switch (tensor.dtype()) {
      case DType::uint8: return 1;
      case DType::float32: return 4;
      default: return 2;
    }
  }

  std::vector<Views> views_;
  std::vector<std::vector<std::uint8_t>> memory_;
};

/// Steps that differ in everything but their tensors and how these are rounded.
inline OptimizerStep step_number(std::int64_t t, const StepKind& kind) {
  OptimizerStep step;
  step.step = t;
  if (kind.is_stochastic) step.rounding_seed = 0x123456789abcdef0u;
  step.lr = 0.01 * static_cast<double>(t);
  step.maximize = t % 2 == 0;
  step.weight_decay = t % 3 == 0 ? 0.5 : 0.0;
  if (t % 4 == 0) step.beta2 = 0.95, step.eps = 0.0;
  return step;
}

/// Steps a list on the CPU and on the emulated device `steps` times, and compares all bytes.
inline void expect_the_cpu_bits(std::vector<Parameter> list, const StepKind& kind, int steps,
                                Generator& generator, std::size_t offset = 0) {
  DeviceList on_device(list, offset);
  for (std::int64_t t = 1; t <= steps; ++t) {
    for (Parameter& p : list) draw_gradient(p, t, generator);
    on_device.set_gradients(list);
    step_list(cpu_views(list), kind, step_number(t, kind));
    step_list(on_device.views(), kind, step_number(t, kind));
    ASSERT_TRUE(on_device.equals(list)) << "step " << t;
  }
}

}  // namespace qlora
