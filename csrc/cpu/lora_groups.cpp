#include "cpu/lora_groups.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "cpu/instruction_sets.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"

namespace qlora {
namespace {

/// Groups of one adapter, which one thread does in order, or all threads one after another.
struct Task {
  std::int64_t adapter;
  std::vector<std::size_t> groups;
  std::int64_t rows = 0;
};

/// Tasks that share neither a row nor an adapter.
using Wave = std::vector<Task>;

/// The groups with a row, in as few waves as keep the order of groups that share one.
std::vector<Wave> make_waves(std::span<const LoRAGroup> groups, std::size_t adapter_count) {
  constexpr std::size_t none = static_cast<std::size_t>(-1);
  std::vector<Wave> waves;
  std::map<std::int64_t, std::int64_t> taken;             // rows of the last wave: begin to end
  std::vector<std::size_t> task_of(adapter_count, none);  // in the last wave
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const LoRAGroup& group = groups[i];
    if (group.begin == group.end) continue;
    const auto next = taken.lower_bound(group.begin);
    const bool is_free = (next == taken.end() || next->first >= group.end) &&
                         (next == taken.begin() || std::prev(next)->second <= group.begin);
    if (waves.empty() || !is_free) {
      waves.emplace_back();
      taken.clear();
      std::fill(task_of.begin(), task_of.end(), none);
    }
    taken.emplace(group.begin, group.end);
    Wave& wave = waves.back();
    std::size_t& task = task_of[static_cast<std::size_t>(group.adapter)];
    if (task == none) {
      task = wave.size();
      wave.push_back({group.adapter, {}});
    }
    wave[task].groups.push_back(i);
    wave[task].rows += group.end - group.begin;
  }
  return waves;
}

/// Calls `run(task, threads)` for every task. One with more than its share of the rows gets all
/// threads, as do all where there are too few of them; the others get a thread each.
template <typename Run>
void run_wave(Wave& wave, int num_threads, const Run& run) {
  std::int64_t rows = 0;
  for (const Task& task : wave) rows += task.rows;
  const auto is_large = [&](const Task& task) { return task.rows * num_threads > rows; };
  const auto first_small = std::partition(wave.begin(), wave.end(), is_large);
  std::int64_t large_count = first_small - wave.begin();
  const auto count = static_cast<std::int64_t>(wave.size());
  if (count - large_count < num_threads) large_count = count;
  for (std::int64_t i = 0; i < large_count; ++i) {
    run(wave[static_cast<std::size_t>(i)], num_threads);
  }
  parallel_for(num_threads, count - large_count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      run(wave[static_cast<std::size_t>(large_count + i)], 1);
    }
  });
}

/// Rows [begin, end) of a matrix.
TensorView rows_of(const TensorView& matrix, std::int64_t begin, std::int64_t end) {
  TensorView rows = matrix;
  rows.data = matrix.as<std::uint8_t>() + begin * matrix.shape[1] * element_bytes(matrix.dtype);
  rows.shape = {end - begin, matrix.shape[1]};
  return rows;
}

/// Every group's t.
std::vector<TensorView> split_t(const TensorView& t, std::span<const LoRAAdapter> adapters,
                                std::span<const LoRAGroup> groups) {
  std::vector<TensorView> parts;
  parts.reserve(groups.size());
  TensorView part = t;
  for (const LoRAGroup& group : groups) {
    const std::int64_t r = adapters[static_cast<std::size_t>(group.adapter)].lora_a.shape[0];
    part.shape = {group.end - group.begin, r};
    parts.push_back(part);
    part.data = part.as<std::uint8_t>() + part.numel() * element_bytes(t.dtype);
  }
  return parts;
}

/// A matrix of its own memory.
class Scratch {
 public:
  explicit Scratch(const TensorView& like)
      : memory_(std::make_unique_for_overwrite<std::uint8_t[]>(bytes_of(like))), view_(like) {
    view_.data = memory_.get();
  }
  const TensorView& view() const { return view_; }
  void clear() { std::memset(memory_.get(), 0, bytes_of(view_)); }

 private:
  static std::size_t bytes_of(const TensorView& tensor) {
    return static_cast<std::size_t>(tensor.numel() * element_bytes(tensor.dtype));
  }

  std::unique_ptr<std::uint8_t[]> memory_;
  TensorView view_;
};

bool has_dropout(const LoRAGroup& group) { return group.seed.is_present && group.p > 0.0; }

void drop(const LoRAGroup& group, const TensorView& x, const TensorView& out, int num_threads) {
  const std::int64_t seed = *group.seed.as<const std::int64_t>();
  parallel_for(num_threads, x.numel(), elements_per_grain,
               [&](std::int64_t begin, std::int64_t end) {
                 kernels().dropout(x, group.p, seed, out, begin, end);
               });
}

/// out += addend, in fp32, rounded to the dtype of out.
void add(const TensorView& addend, const TensorView& out, int num_threads) {
  with_float_type(addend.dtype, [&]<typename A>(A) {
    with_float_type(out.dtype, [&]<typename T>(T) {
      const A* const in = addend.as<const A>();
      T* const to = out.as<T>();
      parallel_for(num_threads, out.numel(), elements_per_grain,
                   [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t e = begin; e < end; ++e) {
                       to[e] = from_float<T>(to_float(to[e]) + to_float(in[e]));
                     }
                   });
    });
  });
}

void forward_group(const LoRAForwardGrouped& arguments, std::size_t index, const TensorView& t,
                   int num_threads) {
  const LoRAGroup& group = arguments.groups[index];
  const LoRAAdapter& adapter = arguments.adapters[static_cast<std::size_t>(group.adapter)];
  LoRAForward forward = {.x = rows_of(arguments.x, group.begin, group.end),
                         .lora_a = adapter.lora_a,
                         .lora_b = adapter.lora_b,
                         .scaling = group.scaling,
                         .t = t,
                         .y = rows_of(arguments.y, group.begin, group.end)};
  if (!has_dropout(group)) return kernels().lora_forward(forward, num_threads);
  const Scratch dropped(forward.x);
  drop(group, forward.x, dropped.view(), num_threads);
  forward.x = dropped.view();
  kernels().lora_forward(forward, num_threads);
}

void backward_group(const LoRABackwardGrouped& arguments, std::size_t index, const TensorView& t,
                    const TensorView& grad_a, const TensorView& grad_b, int num_threads) {
  const LoRAGroup& group = arguments.groups[index];
  const LoRAAdapter& adapter = arguments.adapters[static_cast<std::size_t>(group.adapter)];
  const TensorView x = rows_of(arguments.x, group.begin, group.end);
  TensorView dx = arguments.dx;
  if (dx.is_present) dx = rows_of(dx, group.begin, group.end);
  LoRABackward backward = {.dy = rows_of(arguments.dy, group.begin, group.end),
                           .x = x,
                           .t = t,
                           .lora_a = adapter.lora_a,
                           .lora_b = adapter.lora_b,
                           .scaling = group.scaling,
                           .grad_a = grad_a,
                           .grad_b = grad_b,
                           .dx = dx};
  if (!has_dropout(group)) return kernels().lora_backward(backward, num_threads);
  const Scratch dropped(x);
  drop(group, x, dropped.view(), num_threads);
  backward.x = dropped.view();
  if (!dx.is_present) return kernels().lora_backward(backward, num_threads);
  // Dropout stands between x and A, so A's part of dx passes the mask before it is added.
  Scratch dx_lora(x);
  dx_lora.clear();
  backward.dx = dx_lora.view();
  kernels().lora_backward(backward, num_threads);
  drop(group, dx_lora.view(), dx_lora.view(), num_threads);
  add(dx_lora.view(), dx, num_threads);
}

/// The gradients of an adapter that has several groups: fp32 sums, rounded at the end.
class GradientSums {
 public:
  explicit GradientSums(const LoRAAdapter& adapter)
      : adapter_(adapter), sum_a_(in_floats(adapter.grad_a)), sum_b_(in_floats(adapter.grad_b)) {
    sum_a_.clear();
    sum_b_.clear();
  }

  void add_to(const Scratch& part_a, const Scratch& part_b, int num_threads) const {
    add(part_a.view(), sum_a_.view(), num_threads);
    add(part_b.view(), sum_b_.view(), num_threads);
  }

  Scratch part_a() const { return Scratch(sum_a_.view()); }
  Scratch part_b() const { return Scratch(sum_b_.view()); }

  void store() const {
    round_into(sum_a_.view(), adapter_.grad_a);
    round_into(sum_b_.view(), adapter_.grad_b);
  }

 private:
  static TensorView in_floats(TensorView view) {
    view.dtype = DType::float32;
    return view;
  }
  static void round_into(const TensorView& sum, const TensorView& out) {
    with_float_type(out.dtype, [&]<typename T>(T) {
      std::transform(sum.as<const float>(), sum.as<const float>() + sum.numel(), out.as<T>(),
                     [](float value) { return from_float<T>(value); });
    });
  }

  const LoRAAdapter& adapter_;
  Scratch sum_a_, sum_b_;
};

void write_zeros(const TensorView& tensor) {
  std::fill_n(tensor.as<std::uint8_t>(), tensor.numel() * element_bytes(tensor.dtype),
              std::uint8_t{0});
}

}  // namespace

void run_lora_forward_grouped(const LoRAForwardGrouped& arguments, int num_threads) {
  const auto t = split_t(arguments.t, arguments.adapters, arguments.groups);
  for (Wave& wave : make_waves(arguments.groups, arguments.adapters.size())) {
    run_wave(wave, num_threads, [&](const Task& task, int threads) {
      for (const std::size_t index : task.groups) {
        forward_group(arguments, index, t[index], threads);
      }
    });
  }
}

void run_lora_backward_grouped(const LoRABackwardGrouped& arguments, int num_threads) {
  const auto adapters = arguments.adapters;
  const auto t = split_t(arguments.t, adapters, arguments.groups);
  std::vector<std::int64_t> group_counts(adapters.size());
  for (const LoRAGroup& group : arguments.groups) {
    if (group.begin < group.end) ++group_counts[static_cast<std::size_t>(group.adapter)];
  }
  std::vector<std::unique_ptr<GradientSums>> sums(adapters.size());
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    if (group_counts[i] > 1) sums[i] = std::make_unique<GradientSums>(adapters[i]);
    if (group_counts[i] == 0) {
      write_zeros(adapters[i].grad_a);
      write_zeros(adapters[i].grad_b);
    }
  }
  for (Wave& wave : make_waves(arguments.groups, adapters.size())) {
    run_wave(wave, num_threads, [&](const Task& task, int threads) {
      const auto adapter = static_cast<std::size_t>(task.adapter);
      if (sums[adapter] == nullptr) {
        const auto& [lora_a, lora_b, grad_a, grad_b] = adapters[adapter];
        return backward_group(arguments, task.groups[0], t[task.groups[0]], grad_a, grad_b,
                              threads);
      }
      const Scratch part_a = sums[adapter]->part_a(), part_b = sums[adapter]->part_b();
      for (const std::size_t index : task.groups) {
        backward_group(arguments, index, t[index], part_a.view(), part_b.view(), threads);
        sums[adapter]->add_to(part_a, part_b, threads);
      }
    });
  }
  parallel_for(num_threads, static_cast<std::int64_t>(sums.size()), 1,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   if (const auto& sum = sums[static_cast<std::size_t>(i)]) sum->store();
                 }
               });
}

}  // namespace qlora
