"""lora_linear_groups: several updates on one base, as one autograd node."""

import pytest
import torch
from torch import Tensor, nn

from qlora_native import _core, ops
from qlora_native.nn.nf4_linear import NF4Linear
from qlora_native.ops import (
    LoRAFactors,
    LoRAGroup,
    lora_groups,
    lora_linear,
    lora_linear_groups,
    lora_update,
)
from support import (
    Approximate,
    assert_near,
    assert_within,
    dense_weight,
    make_base,
    over_bases,
    over_dtypes,
    same_bits,
)

N, K, M = 37, 70, 12


@pytest.fixture(params=[True, False], ids=["core", "composed"], autouse=True)
def _both_ways(request, monkeypatch):
    """By the core's operation, and by that for one update, as on CUDA; lora_linear likewise."""
    monkeypatch.setattr(lora_groups, "groups_prefer_native", lambda _: request.param)
    monkeypatch.setattr(lora_update, "lora_prefers_native", lambda *_: request.param)


def base_of(kind: str, dtype: torch.dtype) -> tuple[nn.Module, ops.NF4Tensors | Tensor, Tensor]:
    """A layer, its weight as the operations take it, and its bias in `dtype`."""
    layer = make_base(kind, dtype, N, K).requires_grad_(False)
    weight = layer.tensors() if isinstance(layer, NF4Linear) else layer.weight
    return layer, weight, layer.bias.to(dtype)


def factors_of(
    r: int, dtype: torch.dtype = torch.float32, scaling: float = 0.7, p: float = 0.0
) -> LoRAFactors:
    lora_a = torch.randn(r, K).div_(K**0.5).to(dtype).requires_grad_()
    lora_b = torch.randn(N, r).to(dtype).requires_grad_()
    seed = torch.randint(2**63 - 1, (1,)) if p else None
    return LoRAFactors(lora_a, lora_b, seed, scaling, p)


def disjoint_groups(dtype: torch.dtype = torch.float32, p: float = 0.0) -> list[LoRAGroup]:
    """Different ranks and scalings, an empty group, and rows 5 and 11 with the base alone."""
    return [
        LoRAGroup(0, 1, factors_of(4, dtype, 0.5, p)),
        LoRAGroup(1, 5, factors_of(7, dtype, 1.5, p / 2)),
        LoRAGroup(6, 6, factors_of(2, dtype)),
        LoRAGroup(6, 11, factors_of(16, dtype, 0.25)),
    ]


def mask_of(factors: LoRAFactors, rows: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(rows, K, dtype=dtype)
    if factors.seed is None:
        return ones
    out = torch.empty_like(ones)
    _core.dropout(ones, factors.p, factors.seed, out, 1, 0)
    return out


def results(
    x: Tensor, dy: Tensor, weight: ops.NF4Tensors | Tensor, bias: Tensor, groups: list[LoRAGroup]
) -> dict[str, Tensor]:
    """y, dx, and the gradient of every factor: "a0", "b0", … by the first group that has it."""
    x = x.detach().requires_grad_()
    y = lora_linear_groups(x, weight, bias, groups)
    wanted = {"dx": x}
    for index, (_, _, factors) in enumerate(groups):
        if all(factors.lora_a is not tensor for tensor in wanted.values()):
            wanted |= {f"a{index}": factors.lora_a, f"b{index}": factors.lora_b}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def expected_results(
    x: Tensor, dy: Tensor, layer: nn.Module, bias: Tensor, groups: list[LoRAGroup]
) -> dict[str, Approximate]:
    """The same in fp64, with the tolerance of the steps that the docstrings name."""
    dtype = x.dtype
    w = Approximate(dense_weight(layer, dtype))
    y = (Approximate(x) @ w.t() + Approximate(bias)).rounded_to(dtype)
    dx = (Approximate(dy) @ w).rounded_to(dtype)
    out: dict[str, Approximate] = {}
    names: dict[int, int] = {}
    for index, (begin, end, factors) in enumerate(groups):
        mask = mask_of(factors, end - begin, dtype).double()
        a, b = (Approximate(f.to(dtype)) for f in (factors.lora_a, factors.lora_b))
        dropped = Approximate(x[begin:end].double() * mask).rounded_to(dtype)
        dy_group = Approximate(dy[begin:end])
        t = (dropped @ a.t()).rounded_to(dtype)
        u = ((dy_group @ b) * factors.scaling).rounded_to(dtype)
        passed = (u @ a).rounded_to(dtype)
        dx_group = Approximate(passed.value * mask, passed.error * mask).rounded_to(dtype)
        for total, part in ((y, (t @ b.t()) * factors.scaling), (dx, dx_group)):
            rows = Approximate(total.value[begin:end], total.error[begin:end])
            rows = (rows + part).rounded_to(dtype)
            total.value[begin:end], total.error[begin:end] = rows.value, rows.error
        first = names.setdefault(id(factors.lora_a), index)
        parts = {"a": u.t() @ dropped, "b": (dy_group.t() @ t) * factors.scaling}
        for letter, part in parts.items():
            before = out.get(f"{letter}{first}")
            out[f"{letter}{first}"] = part if before is None else before + part
    factor_dtype = groups[0].factors.lora_a.dtype
    gradients = {name: gradient.rounded_to(factor_dtype) for name, gradient in out.items()}
    return {"y": y, "dx": dx, **gradients}


def check(kind: str, dtype: torch.dtype, groups: list[LoRAGroup], m: int = M) -> None:
    layer, weight, bias = base_of(kind, dtype)
    x, dy = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    actual = results(x, dy, weight, bias, groups)
    expected = expected_results(x, dy, layer, bias, groups)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_within(actual[name], expected[name])


# ---- numbers


@over_bases
@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_results_match_an_fp64_composition(kind, dtype, p):
    check(kind, dtype, disjoint_groups(p=p))


@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_factors_of_16_bits_get_gradients_of_16_bits(dtype, p):
    check("nf4", dtype, disjoint_groups(dtype, p))


@over_bases
@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_groups_that_overlap_add_up(kind, dtype, p):
    groups = [
        LoRAGroup(0, 8, factors_of(4, p=p)),
        LoRAGroup(3, M, factors_of(6)),
        LoRAGroup(0, M, factors_of(3, p=p)),
    ]
    check(kind, dtype, groups)


@over_dtypes
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_a_pair_of_factors_in_several_groups_gets_the_sum_of_its_gradients(dtype, factor_dtype):
    shared, other = factors_of(4, factor_dtype), factors_of(5, factor_dtype)
    groups = [
        LoRAGroup(0, 2, shared),
        LoRAGroup(2, 5, other),
        LoRAGroup(5, 9, shared._replace(scaling=2.0)),
        LoRAGroup(9, 12, shared),
    ]
    check("nf4", dtype, groups)


def test_a_factor_that_two_pairs_share_gets_the_sum_of_its_gradients():
    _, weight, bias = base_of("nf4", torch.float32)
    first, second = factors_of(4), factors_of(4)
    tied = second._replace(lora_a=first.lora_a)
    x = torch.randn(M, K)
    y = lora_linear_groups(x, weight, bias, [LoRAGroup(0, 6, first), LoRAGroup(6, M, tied)])
    gradient = torch.autograd.grad(y.sum(), first.lora_a)[0]
    copy = tied._replace(lora_a=first.lora_a.detach().clone().requires_grad_())
    y = lora_linear_groups(x, weight, bias, [LoRAGroup(0, 6, first), LoRAGroup(6, M, copy)])
    parts = torch.autograd.grad(y.sum(), (first.lora_a, copy.lora_a))
    assert_near(gradient, parts[0] + parts[1])


@over_bases
@over_dtypes
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_one_group_over_all_rows_gives_the_bits_of_lora_linear(kind, dtype, m, p):
    _, weight, bias = base_of(kind, dtype)
    factors = factors_of(6, p=p)
    x, dy = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    actual = results(x, dy, weight, bias, [LoRAGroup(0, m, factors)])
    x = x.requires_grad_()
    a, b, seed, scaling, _ = factors
    y = lora_linear(x, weight, bias, a, b, scaling, p, seed)
    expected = (y, *torch.autograd.grad(y, (x, a, b), dy))
    for got, want in zip(actual.values(), expected, strict=True):
        assert same_bits(got, want)


@over_dtypes
def test_rows_without_a_group_get_the_bits_of_the_base(dtype):
    layer, weight, bias = base_of("nf4", dtype)
    x = torch.randn(M, K, dtype=dtype)
    y = lora_linear_groups(x, weight, bias, disjoint_groups())
    for row in (5, 11):
        assert same_bits(y[row], layer(x)[row])
    assert same_bits(lora_linear_groups(x, weight, bias, []), layer(x))


def test_x_of_any_rank_and_stride_gives_the_same_bits():
    _, weight, bias = base_of("nf4", torch.float32)
    groups = disjoint_groups(p=0.3)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    expected = results(x, dy, weight, bias, groups)
    strided = torch.randn(K, 4, 3).permute(2, 1, 0)
    strided.copy_(x.view(3, 4, K))
    actual = results(strided, dy.view(3, 4, N), weight, bias, groups)
    for name, want in expected.items():
        assert same_bits(actual[name].reshape(want.shape), want)


def test_only_what_asks_for_a_gradient_gets_one():
    _, weight, bias = base_of("nf4", torch.float32)
    groups = disjoint_groups()
    groups[1].factors.lora_a.requires_grad_(False)
    x = torch.randn(M, K)
    lora_linear_groups(x, weight, bias, groups).sum().backward()
    assert x.grad is None
    assert groups[1].factors.lora_a.grad is None
    assert groups[1].factors.lora_b.grad is not None
    empty = groups[2].factors
    assert (empty.lora_a.grad == 0).all()
    assert (empty.lora_b.grad == 0).all()
    bias.requires_grad_()
    lora_linear_groups(x, weight, bias, groups).sum().backward()
    assert same_bits(bias.grad, torch.full((N,), float(M)))


@over_bases
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_are_right(kind, p):
    _, weight, bias = base_of(kind, torch.float32)
    dense = ops.dequantize(weight, torch.float32) if kind == "nf4" else weight
    shared = factors_of(3, p=p)
    groups = [LoRAGroup(0, 2, shared), LoRAGroup(1, 4, factors_of(2)), LoRAGroup(4, 5, shared)]
    x = torch.randn(2, 3, K, requires_grad=True)

    def composition(x: Tensor) -> Tensor:
        rows = x.view(6, K)
        y = rows @ dense.t() + bias
        for begin, end, factors in groups:
            mask = mask_of(factors, end - begin, torch.float32)
            update = (rows[begin:end] * mask) @ factors.lora_a.t() @ factors.lora_b.t()
            y = y + torch.nn.functional.pad(update, (0, 0, begin, 6 - end)) * factors.scaling
        return y.view(2, 3, N)

    found = []
    for y in (lora_linear_groups(x, weight, bias, groups), composition(x)):
        inputs = (x, shared.lora_a, shared.lora_b)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(penalty, inputs))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected)


# ---- bad input


@pytest.mark.parametrize("rows", [(0, 13), (-1, 3), (5, 4)])
def test_rows_out_of_range_are_refused(rows):
    _, weight, bias = base_of("nf4", torch.float32)
    groups = [LoRAGroup(0, 2, factors_of(2)), LoRAGroup(*rows, factors_of(2))]
    message = rf"lora_linear_groups: group 1 has rows {rows[0]} to {rows[1]}, want .* <= 12"
    with pytest.raises(ValueError, match=message):
        lora_linear_groups(torch.randn(M, K), weight, bias, groups)


def test_factors_of_another_layer_are_refused():
    _, weight, bias = base_of("nf4", torch.float32)
    wrong = LoRAFactors(torch.zeros(2, K + 1), torch.zeros(N, 2), None, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"lora_a has shape \[2, 71\].*want \[r, 70\]"):
        lora_linear_groups(torch.randn(M, K), weight, bias, [LoRAGroup(0, 1, wrong)])
    wrong = factors_of(2)._replace(lora_b=torch.zeros(N, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="one dtype"):
        lora_linear_groups(torch.randn(M, K), weight, bias, [LoRAGroup(0, 1, wrong)])


def test_a_probability_out_of_range_is_refused():
    _, weight, bias = base_of("nf4", torch.float32)
    factors = LoRAFactors(torch.zeros(2, K), torch.zeros(N, 2), torch.zeros(1).long(), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"p (of group 0 )?is 1, want 0 <= p < 1"):
        lora_linear_groups(torch.randn(M, K), weight, bias, [LoRAGroup(0, 1, factors)])
