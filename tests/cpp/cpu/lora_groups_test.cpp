// lora_forward_grouped and lora_backward_grouped give the bits of lora_forward, lora_backward and
// dropout, which have tests against fp64 of their own, called for one group after another.
#include <algorithm>
#include <cstring>

#include "core/operations.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

struct Group {
  std::int64_t begin, end, adapter;
  double p = 0.0;
};

struct Case {
  const char* name;
  std::vector<std::int64_t> ranks;
  std::vector<Group> groups;
};

constexpr std::int64_t m = 70, n = 33, k = 530;

// Groups of one row and of many, around the kernels' blocks; rows in no group; empty groups.
const std::vector<Case> cases = {
    {"no groups", {3}, {}},
    {"one", {5}, {{0, m, 0}}},
    {"side by side", {4, 17, 33, 2}, {{0, 1, 0}, {1, 9, 1}, {12, 60, 2}, {60, 60, 3}, {69, m, 3}}},
    {"in no order", {4, 8}, {{40, 70, 0}, {0, 40, 1}}},
    {"many and small",
     {1, 2, 3, 4, 5, 6, 7, 16},
     {{0, 2, 0},
      {2, 4, 1},
      {4, 6, 2},
      {6, 8, 3},
      {8, 10, 4},
      {10, 12, 5},
      {12, 14, 6},
      {14, 16, 7}}},
    {"overlapping", {4, 6, 16}, {{0, 40, 0}, {20, m, 1}, {0, m, 2}, {3, 5, 0}}},
    {"repeated", {4, 9}, {{0, 3, 0}, {3, 4, 1}, {4, 30, 0}, {30, 31, 1}, {50, m, 0}}},
    {"dropped", {4, 9, 3}, {{0, 3, 0, 0.5}, {3, 40, 1, 0.1}, {40, m, 2}, {2, 50, 0, 0.9}}},
    {"of rank 0", {0, 4, 0}, {{0, 3, 0}, {3, 6, 1}}},
};

/// The parameters: dtype of x, dtype of the factors.
class CpuLoRAGroups : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  const DType dtype = std::get<0>(GetParam()), factor_dtype = std::get<1>(GetParam());
};

/// The tensors of a case. `factor_dtype` is that of the factors' gradients too.
struct Tensors {
  std::vector<HostTensor> lora_a, lora_b, grad_a, grad_b, seeds;
  HostTensor x, y, dy, dx, t;

  Tensors(const Case& which, DType dtype, DType factor_dtype) {
    Generator generator{31};
    x = HostTensor::random(dtype, {m, k}, generator);
    y = HostTensor::random(dtype, {m, n}, generator);
    dy = HostTensor::random(dtype, {m, n}, generator);
    dx = HostTensor::random(dtype, {m, k}, generator);
    for (const std::int64_t r : which.ranks) {
      lora_a.push_back(HostTensor::random(factor_dtype, {r, k}, generator));
      lora_b.push_back(HostTensor::random(factor_dtype, {n, r}, generator));
      grad_a.emplace_back(factor_dtype, Shape{r, k});
      grad_b.emplace_back(factor_dtype, Shape{n, r});
    }
    std::int64_t t_count = 0;
    for (const Group& group : which.groups) {
      t_count += (group.end - group.begin) * which.ranks[static_cast<std::size_t>(group.adapter)];
      seeds.emplace_back(DType::int64, Shape{1}, std::vector<double>{double(seeds.size() + 5)});
    }
    t = HostTensor(dtype, {t_count});
  }

  std::vector<LoRAAdapter> adapters() {
    std::vector<LoRAAdapter> out;
    for (std::size_t i = 0; i < lora_a.size(); ++i) {
      out.push_back({lora_a[i].view(), lora_b[i].view(), grad_a[i].view(), grad_b[i].view()});
    }
    return out;
  }

  std::vector<LoRAGroup> groups(const Case& which) {
    std::vector<LoRAGroup> out;
    for (std::size_t i = 0; i < which.groups.size(); ++i) {
      const auto [begin, end, adapter, p] = which.groups[i];
      out.push_back(
          {begin, end, adapter, scaling_of(i), p, p > 0.0 ? seeds[i].view() : TensorView{}});
    }
    return out;
  }

  static float scaling_of(std::size_t group) {
    return 0.25f + 0.5f * static_cast<float>(group % 3);
  }
};

TensorView slice(TensorView view, std::int64_t begin, std::int64_t end) {
  view.data = view.as<std::uint8_t>() + begin * view.shape[1] * element_bytes(view.dtype);
  view.shape = {end - begin, view.shape[1]};
  return view;
}

/// A copy of rows after dropout, or of the rows.
HostTensor dropped(const LoRAGroup& group, const TensorView& rows) {
  HostTensor out(rows.dtype, rows.shape);
  if (group.p > 0.0) {
    dropout(rows, group.p, group.seed, out.view(), {});
  } else {
    std::copy_n(rows.as<std::uint8_t>(), out.bytes().size(), out.bytes().begin());
  }
  return out;
}

TEST_P(CpuLoRAGroups, ForwardIsThatOfEachGroupInTurn) {
  for (const Case& which : cases) {
    SCOPED_TRACE(which.name);
    Tensors expected(which, dtype, factor_dtype);
    TensorView t = expected.t.view();
    for (const LoRAGroup& group : expected.groups(which)) {
      const auto adapter = static_cast<std::size_t>(group.adapter);
      t.shape = {group.end - group.begin, which.ranks[adapter]};
      HostTensor x = dropped(group, slice(expected.x.view(), group.begin, group.end));
      lora_forward({x.view(), expected.lora_a[adapter].view(), expected.lora_b[adapter].view(),
                    group.scaling, t, slice(expected.y.view(), group.begin, group.end)},
                   {});
      t.data = t.as<std::uint8_t>() + t.numel() * element_bytes(dtype);
    }
    for (const int num_threads : {1, 3}) {
      Tensors actual(which, dtype, factor_dtype);
      const auto adapters = actual.adapters();
      const auto groups = actual.groups(which);
      lora_forward_grouped({actual.x.view(), adapters, groups, actual.t.view(), actual.y.view()},
                           {.num_threads = num_threads});
      EXPECT_EQ(actual.t.bytes(), expected.t.bytes()) << num_threads << " threads";
      EXPECT_EQ(actual.y.bytes(), expected.y.bytes()) << num_threads << " threads";
    }
  }
}

TEST_P(CpuLoRAGroups, BackwardIsThatOfEachGroupInTurn) {
  for (const Case& which : cases) {
    SCOPED_TRACE(which.name);
    // Factors in fp32 have the same values, and gradients that are not rounded.
    Tensors stored(which, dtype, factor_dtype), expected(which, dtype, DType::float32);
    std::vector<std::vector<double>> sums_a, sums_b;
    for (std::size_t i = 0; i < which.ranks.size(); ++i) {
      expected.lora_a[i] =
          HostTensor(DType::float32, {which.ranks[i], k}, stored.lora_a[i].values());
      expected.lora_b[i] =
          HostTensor(DType::float32, {n, which.ranks[i]}, stored.lora_b[i].values());
      sums_a.emplace_back(expected.grad_a[i].numel());
      sums_b.emplace_back(expected.grad_b[i].numel());
    }
    Generator generator{7};
    HostTensor all_t = HostTensor::random(dtype, {stored.t.numel()}, generator);
    TensorView t = all_t.view();
    for (const LoRAGroup& group : expected.groups(which)) {
      const auto adapter = static_cast<std::size_t>(group.adapter);
      const std::int64_t r = which.ranks[adapter];
      t.shape = {group.end - group.begin, r};
      HostTensor x = dropped(group, slice(stored.x.view(), group.begin, group.end));
      HostTensor grad_a(DType::float32, {r, k}), grad_b(DType::float32, {n, r});
      const TensorView dx = slice(stored.dx.view(), group.begin, group.end);
      HostTensor part(dtype, dx.shape, std::vector<double>(std::size_t(dx.numel()), 0.0));
      lora_backward({slice(stored.dy.view(), group.begin, group.end), x.view(), t,
                     expected.lora_a[adapter].view(), expected.lora_b[adapter].view(),
                     group.scaling, grad_a.view(), grad_b.view(), group.p > 0.0 ? part.view() : dx},
                    {});
      if (group.p > 0.0) {
        dropout(part.view(), group.p, group.seed, part.view(), {});
        HostTensor sum = part;
        std::memcpy(sum.bytes().data(), dx.data, sum.bytes().size());
        for (std::int64_t e = 0; e < part.numel(); ++e) {
          sum.set(e, static_cast<float>(sum[e]) + static_cast<float>(part[e]));
        }
        std::memcpy(dx.data, sum.bytes().data(), sum.bytes().size());
      }
      t.data = t.as<std::uint8_t>() + t.numel() * element_bytes(dtype);
      if (group.begin == group.end || r == 0) continue;
      const auto add = [](std::vector<double>& sums, const HostTensor& part_of_sum) {
        for (std::size_t e = 0; e < sums.size(); ++e) {
          sums[e] = static_cast<float>(sums[e]) +
                    static_cast<float>(part_of_sum[static_cast<std::int64_t>(e)]);
        }
      };
      add(sums_a[adapter], grad_a);
      add(sums_b[adapter], grad_b);
    }
    for (const int num_threads : {1, 3}) {
      Tensors actual(which, dtype, factor_dtype);
      const auto adapters = actual.adapters();
      const auto groups = actual.groups(which);
      lora_backward_grouped(
          {actual.dy.view(), actual.x.view(), all_t.view(), adapters, groups, actual.dx.view()},
          {.num_threads = num_threads});
      EXPECT_EQ(actual.dx.bytes(), stored.dx.bytes()) << num_threads << " threads";
      for (std::size_t i = 0; i < which.ranks.size(); ++i) {
        // Values, for a sum that starts from zero has no -0.
        const HostTensor grad_a(factor_dtype, {which.ranks[i], k}, sums_a[i]);
        const HostTensor grad_b(factor_dtype, {n, which.ranks[i]}, sums_b[i]);
        EXPECT_EQ(actual.grad_a[i].values(), grad_a.values()) << num_threads << " threads, " << i;
        EXPECT_EQ(actual.grad_b[i].values(), grad_b.values()) << num_threads << " threads, " << i;
      }
      Tensors without_dx(which, dtype, factor_dtype);
      const auto adapters_without_dx = without_dx.adapters();
      lora_backward_grouped({without_dx.dy.view(),
                             without_dx.x.view(),
                             all_t.view(),
                             adapters_without_dx,
                             groups,
                             {}},
                            {.num_threads = num_threads});
      for (std::size_t i = 0; i < which.ranks.size(); ++i) {
        EXPECT_EQ(without_dx.grad_a[i].bytes(), actual.grad_a[i].bytes());
        EXPECT_EQ(without_dx.grad_b[i].bytes(), actual.grad_b[i].bytes());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuLoRAGroups, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Factors" +
                                  name_of(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace qlora
