"""Several LoRA updates on one base, each of its own rows, as one autograd node.

`torch.ops.qlora_native.lora_linear_groups`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qlora_native import _core
from qlora_native.ops.base_product import BaseWeight, base_forward, base_grad_input, rows_of
from qlora_native.ops.doors import direct_apply, needs_autograd, needs_dispatcher
from qlora_native.ops.kernel_choice import groups_prefer_native
from qlora_native.ops.linear import check_bias, check_input, grad_bias, nf4_linear_grad_input
from qlora_native.ops.lora_update import (
    BASE_SCHEMA,
    LoRAFactors,
    add_update,
    add_update_gradients,
    arguments_of,
    check_base,
    check_factors,
    dropped,
    weight_of,
)
from qlora_native.ops.storage import NF4Tensors, execution, in_memory, run_core


class LoRAGroup(NamedTuple):
    """An update of some rows: `factors` for rows `begin <= row < end` of `x.reshape(-1, k)`."""

    begin: int
    end: int
    factors: LoRAFactors


class _Groups(NamedTuple):
    """The groups of a call but for the tensors, as an operator takes them: an entry a group."""

    begins: list[int]
    ends: list[int]
    adapters: list[int]  # which of the call's pairs of factors
    seeds: list[int]  # which of the call's seeds; -1: no dropout
    scalings: list[float]
    ps: list[float]


def lora_linear_groups(
    x: Tensor, weight: BaseWeight, bias: Tensor | None, groups: Sequence[LoRAGroup]
) -> Tensor:
    """y = x · Wᵀ + bias, and for each group, y[begin:end] += its update of x[begin:end].

    The update is `scaling · (dropout(x[begin:end]) · Aᵀ) · Bᵀ` (Hu et al. 2021, section 4.1).
    Ranks, scalings and dropout may differ from group to group. Groups may overlap, and then add up
    in their order; rows in no group get the base alone; a pair of factors may be in several groups,
    and gets the sum of its gradients.

    Args:
        x: `[..., k]`, float32, bfloat16 or float16; its dtype is the compute dtype.
        weight: the frozen base: NF4, or a dense `[n, k]` that does not require a gradient.
        bias: `[n]` of x's dtype, or None.
        groups: rows of x and the factors for them, each as `lora_linear` takes them. The dropout
            mask of a group counts its elements from its first row.

    One autograd node that saves x and every group's x · Aᵀ; gradients of every order are right. One
    group over all rows gives the bits of `lora_linear`. Raises ValueError where shapes, dtypes,
    devices or rows do not fit.
    """
    n, k, stored = check_base("lora_linear_groups", weight)
    check_input("lora_linear_groups", x, k, stored.device)
    check_bias("lora_linear_groups", x, bias, n)
    plan, pairs, seeds = _listed(x, n, k, groups)
    if needs_dispatcher(x, bias, stored, *pairs):
        arguments = (x, bias, pairs[::2], pairs[1::2], seeds, *arguments_of(weight), *plan)
        return torch.ops.qlora_native.lora_linear_groups(*arguments)[0]
    if needs_autograd(x, bias, *pairs):
        return _apply_groups(x, bias, weight, plan, seeds, *pairs)
    return _forward(x, weight, bias, plan, pairs, seeds)[0]


def _listed(
    x: Tensor, n: int, k: int, groups: Sequence[LoRAGroup]
) -> tuple[_Groups, list[Tensor], list[Tensor]]:
    """The groups, checked; the different pairs of factors, A, B, A, B, …; and the seeds."""
    rows = x.shape[:-1].numel()
    plan = _Groups([], [], [], [], [], [])
    pairs: list[Tensor] = []
    seeds: list[Tensor] = []
    adapter_of: dict[tuple[int, int], int] = {}
    for index, (begin, end, (lora_a, lora_b, seed, scaling, p)) in enumerate(groups):
        if not 0 <= begin <= end <= rows:
            raise ValueError(
                f"lora_linear_groups: group {index} has rows {begin} to {end}, want "
                f"0 <= begin <= end <= {rows}, the rows of x"
            )
        key = id(lora_a), id(lora_b)
        adapter = adapter_of.get(key)
        if adapter is None:
            check_factors("lora_linear_groups", lora_a, lora_b, n, k, x.device)
            adapter = adapter_of[key] = len(adapter_of)
            pairs += (lora_a, lora_b)
        has_dropout = seed is not None and p != 0.0
        plan.begins.append(begin)
        plan.ends.append(end)
        plan.adapters.append(adapter)
        plan.seeds.append(len(seeds) if has_dropout else -1)
        plan.scalings.append(scaling)
        plan.ps.append(p if has_dropout else 0.0)
        if seed is not None and has_dropout:
            seeds.append(seed)
    return plan, pairs, seeds


def _unlisted(
    plan: _Groups, pairs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> list[tuple[int, LoRAGroup]]:
    """The groups, each with the number of its pair of factors."""
    return [
        (
            adapter,
            LoRAGroup(
                begin,
                end,
                LoRAFactors(
                    pairs[2 * adapter],
                    pairs[2 * adapter + 1],
                    None if seed < 0 else seeds[seed],
                    scaling,
                    p,
                ),
            ),
        )
        for begin, end, adapter, seed, scaling, p in zip(*plan, strict=True)
    ]


def _forward(
    x: Tensor,
    weight: BaseWeight,
    bias: Tensor | None,
    plan: _Groups,
    pairs: Sequence[Tensor],
    seeds: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """(y[..., n], every group's t[rows, r], one after another), without autograd."""
    x = in_memory(x)
    y = base_forward(x, weight, bias)
    if groups_prefer_native(x):
        stored = [in_memory(factor) for factor in pairs]
        t = x.new_empty(_t_count(plan, pairs[::2]))
        run_core(_core.lora_forward_grouped, x, stored, seeds, *plan, t, y, *execution(x))
        return y, t
    return y, _add_updates(x, y, plan, pairs, seeds)


def _add_updates(
    x: Tensor, y: Tensor, plan: _Groups, pairs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> Tensor:
    """The core's lora_forward_grouped by a call for each group; returns t."""
    x_rows, y_rows = rows_of(x), rows_of(y)
    parts = []
    for _, (begin, end, factors) in _unlisted(plan, pairs, seeds):
        if begin == end:
            continue
        x_group, y_group = (rows.narrow(0, begin, end - begin) for rows in (x_rows, y_rows))
        parts.append(add_update(dropped(x_group, factors), y_group, factors).view(-1))
    return torch.cat(parts) if parts else x.new_empty(0)


def _t_count(plan: _Groups, lora_a: Sequence[Tensor]) -> int:
    """The elements of every group's t."""
    return sum(
        (end - begin) * lora_a[adapter].shape[0]
        for begin, end, adapter in zip(plan.begins, plan.ends, plan.adapters, strict=True)
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    weight: BaseWeight,
    plan: _Groups,
    pairs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx, None unless asked for, and the gradients of the pairs of factors, of `_forward`."""
    x, dy = in_memory(x), in_memory(dy)
    dx = base_grad_input(dy, weight) if needs_dx else None
    if groups_prefer_native(x):
        stored = [in_memory(factor) for factor in pairs]
        found = [torch.empty_like(factor) for factor in stored]
        arguments = dy, x, t, stored, seeds, *plan, found, dx, *execution(x)
        run_core(_core.lora_backward_grouped, *arguments)
        return dx, found
    return dx, _update_gradients(dy, x, t, dx, plan, pairs, seeds)


def _update_gradients(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    dx: Tensor | None,
    plan: _Groups,
    pairs: Sequence[Tensor],
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    """The core's lora_backward_grouped by a call for each group; adds to dx."""
    # In fp32, so that a pair's sum over its groups is rounded once.
    sums: list[Tensor | None] = [None] * len(pairs)
    taken = 0
    for adapter, (begin, end, factors) in _unlisted(plan, pairs, seeds):
        if begin == end:
            continue
        factors = factors._replace(lora_a=factors.lora_a.float(), lora_b=factors.lora_b.float())
        r = factors.lora_a.shape[0]
        x_group, dy_group = (rows_of(rows).narrow(0, begin, end - begin) for rows in (x, dy))
        t_group = t.narrow(0, taken, (end - begin) * r).view(end - begin, r)
        taken += t_group.numel()
        dx_group = None if dx is None else rows_of(dx).narrow(0, begin, end - begin)
        dx_lora = dx_group
        if dx_group is not None and factors.seed is not None:
            dx_lora = torch.zeros_like(dx_group)  # passes the mask before it is added
        x_group = dropped(x_group, factors)
        parts = add_update_gradients(dy_group, x_group, t_group, factors, dx_lora)
        for i, part in enumerate(parts, start=2 * adapter):
            before = sums[i]
            sums[i] = part if before is None else before.add_(part)
        if dx_group is not None and dx_lora is not None and dx_lora is not dx_group:
            dx_group.add_(dropped(dx_lora, factors, out=dx_lora))
    return _in_dtypes(sums, pairs)


def _in_dtypes(gradients: Sequence[Tensor | None], factors: Sequence[Tensor]) -> list[Tensor]:
    """The sums in the dtype of their factors; zeros for those without a group."""
    return [
        torch.zeros_like(factor, memory_format=torch.contiguous_format)
        if gradient is None
        else gradient.to(factor.dtype)
        for gradient, factor in zip(gradients, factors, strict=True)
    ]


class _LoRALinearGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: BaseWeight,
        plan: _Groups,
        seeds: list[Tensor],
        *pairs: Tensor,
    ) -> Tensor:
        y, t = _forward(x, weight, bias, plan, pairs, seeds)
        _save(ctx, x, t, pairs, seeds, arguments_of(weight), plan)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dbias, _, _, _, *needs_pairs = ctx.needs_input_grad
        needs = needs_dx, needs_dbias, needs_pairs
        dx, dbias, gradients = _gradients(ctx, dy, needs, _backward_of_arguments)
        return dx, dbias, None, None, None, *gradients


_apply_groups = direct_apply(_LoRALinearGroups)


def _save(
    ctx: Any,
    x: Tensor,
    t: Tensor,
    pairs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    base: tuple[Any, ...],
    plan: _Groups,
) -> None:
    ctx.save_for_backward(x, t, *base[:4], *pairs, *seeds)
    ctx.sizes = base[4:]
    ctx.plan = plan
    ctx.pair_count = len(pairs)


def _gradients(
    ctx: Any, dy: Tensor, needs: tuple[bool, bool, Sequence[bool]], backward_function: Any
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """In x, bias and the pairs of factors."""
    needs_dx, needs_dbias, needs_pairs = needs
    x, t, *tensors = ctx.saved_tensors
    base = *tensors[:4], *ctx.sizes
    pairs, seeds = tensors[4 : 4 + ctx.pair_count], tensors[4 + ctx.pair_count :]
    dx = None
    gradients: list[Tensor] = []
    if needs_dx or any(needs_pairs):
        if torch.is_grad_enabled():  # create_graph=True, as in lora.py
            dx, gradients = _differentiable_backward(dy, x, pairs, seeds, base, ctx.plan)
        else:
            arguments = dy, x, t, pairs[::2], pairs[1::2], seeds, *base, *ctx.plan, needs_dx
            dx, gradients = backward_function(*arguments)
    return (
        dx if needs_dx else None,
        grad_bias(dy) if needs_dbias else None,
        [
            gradient if is_needed else None
            for gradient, is_needed in zip(gradients, needs_pairs, strict=True)
        ]
        if gradients
        else [None] * len(needs_pairs),
    )


def _differentiable_backward(
    dy: Tensor,
    x: Tensor,
    pairs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    base: tuple[Any, ...],
    plan: _Groups,
) -> tuple[Tensor, list[Tensor]]:
    """`_backward` as operations that autograd follows, for second derivatives."""
    weight = weight_of(base)
    dy_rows, x_rows = rows_of(dy), rows_of(x)
    if isinstance(weight, NF4Tensors):
        dx = nf4_linear_grad_input(dy_rows, weight)
    else:
        dx = torch.mm(dy_rows, weight.to(dy.dtype))
    gradients: list[Tensor | None] = [None] * len(pairs)
    for adapter, (begin, end, factors) in _unlisted(plan, pairs, seeds):
        dy_group, x_group = dy_rows[begin:end], x_rows[begin:end]
        mask = dropped(torch.ones_like(x_group, memory_format=torch.contiguous_format), factors)
        x_group = (x_group * mask).float()
        a, b = factors.lora_a.to(x.dtype), factors.lora_b.to(x.dtype)
        u = torch.mm(dy_group, b) * factors.scaling
        t = torch.mm(x_group.to(x.dtype), a.t())
        parts = (
            torch.mm(u.float().t(), x_group),
            torch.mm(dy_group.float().t(), t.float()) * factors.scaling,
        )
        for i, part in enumerate(parts, start=2 * adapter):
            before = gradients[i]
            gradients[i] = part if before is None else before + part
        update = torch.mm(u, a) * mask
        dx = torch.cat([dx[:begin], dx[begin:end] + update, dx[end:]])
    return dx.view_as(x), _in_dtypes(gradients, pairs)


# The operator takes the factors A and the factors B as a list each: its gradients are lists too.

_PLAN_SCHEMA = (
    "SymInt[] begins, SymInt[] ends, int[] adapters, int[] seed_indices, float[] scalings, "
    "float[] ps"
)


def _interleaved(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> list[Tensor]:
    return [factor for pair in zip(lora_a, lora_b, strict=True) for factor in pair]


def _backward_of_arguments(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    seeds: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor | None, list[Tensor]]:
    """`_backward` with the arguments of the operator."""
    base, plan, needs_dx = rest[:7], _Groups(*rest[7:-1]), rest[-1]
    pairs = _interleaved(lora_a, lora_b)
    return _backward(dy, x, t, weight_of(base), plan, pairs, seeds, needs_dx)


@torch.library.custom_op(
    "qlora_native::lora_linear_groups",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, Tensor[] seeds, "
    f"{BASE_SCHEMA}, {_PLAN_SCHEMA}) -> (Tensor, Tensor)",
)
def _lora_linear_groups_op(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    seeds: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    base, plan = rest[:7], _Groups(*rest[7:])
    return _forward(x, weight_of(base), bias, plan, _interleaved(lora_a, lora_b), seeds)


@_lora_linear_groups_op.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    seeds: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    n, plan = rest[4], _Groups(*rest[7:])
    return x.new_empty(*x.shape[:-1], n), x.new_empty(_t_count(plan, lora_a))


@torch.library.custom_op(
    "qlora_native::lora_linear_groups_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor t, Tensor[] lora_a, Tensor[] lora_b, Tensor[] seeds, "
    f"{BASE_SCHEMA}, {_PLAN_SCHEMA}, bool needs_dx) -> (Tensor, Tensor[])",
)
def _lora_linear_groups_backward_op(
    dy: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    """An operator has no optional outputs: dx is empty unless asked for."""
    dx, gradients = _backward_of_arguments(dy, x, *rest)
    return x.new_empty(0) if dx is None else dx, gradients


@_lora_linear_groups_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    def empty_like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dx = empty_like(x) if rest[-1] else x.new_empty(0)
    return dx, [empty_like(factor) for factor in _interleaved(lora_a, lora_b)]


def _setup_context(
    ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    x, _, lora_a, lora_b, seeds, *rest = inputs
    pairs = _interleaved(lora_a, lora_b)
    _save(ctx, x, output[1], pairs, seeds, tuple(rest[:7]), _Groups(*rest[7:]))


def _backward_through_dispatcher(ctx: Any, dy: Tensor, _grad_t: Tensor | None) -> tuple[Any, ...]:
    needs_dx, needs_dbias, needs_a, needs_b, *_ = ctx.needs_input_grad
    needs = (
        needs_dx,
        needs_dbias,
        [need for pair in zip(needs_a, needs_b, strict=True) for need in pair],
    )
    operator = torch.ops.qlora_native.lora_linear_groups_backward
    dx, dbias, gradients = _gradients(ctx, dy, needs, operator)
    nothing = [None] * (len(ctx.plan) + 7)
    no_seeds = [None] * (len(ctx.saved_tensors) - 6 - ctx.pair_count)
    return dx, dbias, gradients[::2], gradients[1::2], no_seeds, *nothing


_lora_linear_groups_op.register_autograd(_backward_through_dispatcher, setup_context=_setup_context)
