"""A frozen base and its LoRA update as one autograd node: `torch.ops.qlora_native.lora_linear`."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qlora_native import _core
from qlora_native.ops.base_product import (
    BaseWeight,
    autocast_disabled,
    base_forward,
    base_grad_input,
    rows_of,
)
from qlora_native.ops.doors import direct_apply, needs_autograd, needs_dispatcher
from qlora_native.ops.kernel_choice import lora_prefers_native
from qlora_native.ops.linear import (
    check_bias,
    check_input,
    grad_bias,
    nf4_linear_grad_input,
)
from qlora_native.ops.storage import FLOAT_DTYPES, NF4Tensors, execution, in_memory, run_core

_ROWS = 1024  # converted to fp32 at a time


class LoRAFactors(NamedTuple):
    """The trained part: `lora_a[r, k]`, `lora_b[n, r]`, and what is applied with them."""

    lora_a: Tensor
    lora_b: Tensor
    seed: Tensor | None  # of the dropout mask, int64 [1]; None: no dropout
    scaling: float
    p: float  # dropout probability


def lora_linear(
    x: Tensor,
    weight: BaseWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y[..., n] = x · Wᵀ + bias + scaling · (dropout(x) · Aᵀ) · Bᵀ (Hu et al. 2021, section 4.1).

    Args:
        x: `[..., k]`, float32, bfloat16 or float16; its dtype is the compute dtype.
        weight: the frozen base: NF4, or a dense `[n, k]` that does not require a gradient, cast
            to x's dtype where it has another.
        bias: `[n]` of x's dtype, or None.
        lora_a: `[r, k]`, float32, bfloat16 or float16; rounded to x's dtype once a call, its
            gradient is in its own.
        lora_b: `[n, r]`, of lora_a's dtype.
        scaling: the factor of the update, alpha / r as a rule.
        p: the probability with which an element of x is dropped before A, 0 <= p < 1.
        seed: int64 `[1]` on x's device; together with an element's index it decides what is
            dropped. None: nothing is.

    One autograd node that saves x and x · Aᵀ; gradients of every order are right. Raises ValueError
    where shapes, dtypes or devices do not fit.
    """
    if isinstance(weight, NF4Tensors):
        n, k, device = weight.n, weight.k, weight.codes.device
    else:
        (n, k), device = weight.shape, weight.device
        _check_dense_base(weight, x)
    check_input("lora_linear", x, k, device)
    check_bias("lora_linear", x, bias, n)
    r = lora_a.shape[0]
    if lora_a.shape != (r, k) or lora_b.shape != (n, r):
        raise ValueError(
            f"lora_linear: lora_a has shape {list(lora_a.shape)} and lora_b {list(lora_b.shape)}, "
            f"want [r, {k}] and [{n}, r]"
        )
    if lora_a.dtype not in FLOAT_DTYPES or lora_b.dtype != lora_a.dtype:
        raise ValueError(
            f"lora_linear: lora_a is {lora_a.dtype} and lora_b {lora_b.dtype}, want one dtype of "
            "float32, bfloat16 and float16 for both"
        )
    if lora_a.device != x.device or lora_b.device != x.device:
        raise ValueError(
            f"lora_linear: lora_a is on {lora_a.device} and lora_b on {lora_b.device}, x is on "
            f"{x.device}"
        )
    if p == 0.0:
        seed = None
    stored = weight.codes if isinstance(weight, NF4Tensors) else weight
    if needs_dispatcher(x, bias, lora_a, lora_b, stored):
        arguments = (x, bias, lora_a, lora_b, seed, *_arguments_of(weight), scaling, p)
        return torch.ops.qlora_native.lora_linear(*arguments)[0]
    if needs_autograd(x, bias, lora_a, lora_b):
        return _apply_lora(x, bias, lora_a, lora_b, seed, weight, scaling, p)
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return forward(x, weight, bias, factors)[0]


def _check_dense_base(weight: Tensor, x: Tensor) -> None:
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"lora_linear: the base weight is {weight.dtype}, want a float dtype")
    if weight.requires_grad:
        raise ValueError(
            "lora_linear: the base weight requires a gradient, but LoRA's base is frozen; "
            "call weight.requires_grad_(False)"
        )


def _weight_of(base: tuple[Any, ...]) -> BaseWeight:
    """The weight from the operator's arguments: a dense one has no scales."""
    return base[0] if base[1] is None else NF4Tensors(*base)


def _arguments_of(weight: BaseWeight) -> tuple[Any, ...]:
    """The operator's arguments from the weight."""
    if isinstance(weight, NF4Tensors):
        return weight
    return (weight, None, None, None, *weight.shape, 0)


def _dropped(x: Tensor, factors: LoRAFactors, out: Tensor | None = None) -> Tensor:
    """x after dropout; x itself without."""
    if factors.seed is None:
        return x
    out = torch.empty_like(x) if out is None else out
    run_core(_core.dropout, x, factors.p, factors.seed, out, *execution(x))
    return out


def forward(
    x: Tensor, weight: BaseWeight, bias: Tensor | None, factors: LoRAFactors
) -> tuple[Tensor, Tensor]:
    """(y[..., n], t[m, r] = dropout(x) · Aᵀ) of x[..., k], m rows in all, without autograd."""
    x = in_memory(x)
    y = base_forward(x, weight, bias)
    lora_a, lora_b, _, scaling, _ = factors
    dropped = _dropped(x, factors)
    if lora_prefers_native(x, lora_b):
        t = x.new_empty(x.shape[:-1].numel(), lora_a.shape[0])
        a, b = in_memory(lora_a), in_memory(lora_b)
        run_core(_core.lora_forward, dropped, a, b, scaling, t, y, *execution(x))
        return y, t
    with autocast_disabled(x):
        t = torch.mm(rows_of(dropped), lora_a.to(x.dtype).t())
        rows_of(y).addmm_(t, lora_b.to(x.dtype).t(), alpha=scaling)
    return y, t


def backward(
    dy: Tensor, x: Tensor, t: Tensor, weight: BaseWeight, factors: LoRAFactors, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, grad_a, grad_b) of `forward`; dx is None unless asked for."""
    x, dy = in_memory(x), in_memory(dy)
    lora_a, lora_b, seed, scaling, _ = factors
    dx = base_grad_input(dy, weight) if needs_dx else None
    dropped = _dropped(x, factors)
    # Dropout stands between x and A, so A's part of dx passes the mask before it is added.
    dx_lora = dx if seed is None or dx is None else torch.zeros_like(dx)
    if lora_prefers_native(x, lora_b):
        a, b = in_memory(lora_a), in_memory(lora_b)
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        gradients = grad_a, grad_b, dx_lora
        run_core(_core.lora_backward, dy, dropped, t, a, b, scaling, *gradients, *execution(x))
    else:
        with autocast_disabled(x):
            b = lora_b.to(x.dtype)
            rows = rows_of(dy)
            u = torch.addmm(dy.new_zeros(1), rows, b, beta=0, alpha=scaling)  # scaled, rounded once
            grad_a = _sum_of_outer_products(u, rows_of(dropped)).to(lora_a.dtype)
            grad_b = _sum_of_outer_products(rows, t).mul_(scaling).to(lora_b.dtype)
            if dx_lora is not None:
                rows_of(dx_lora).addmm_(u, lora_a.to(x.dtype))
    if dx is not None and dx_lora is not dx:
        dx.add_(_dropped(dx_lora, factors, out=dx_lora))
    return dx, grad_a, grad_b


def _sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ[p, m] · b[m, q] in fp32, where torch.mm would round the sums to the operands' dtype.

    A run of rows at a time is converted, not the whole of an activation.
    """
    if a.dtype == torch.float32:
        return torch.mm(a.t(), b)
    sums = a.new_zeros((a.shape[1], b.shape[1]), dtype=torch.float32)
    for rows_a, rows_b in zip(a.split(_ROWS), b.split(_ROWS), strict=True):
        sums.addmm_(rows_a.float().t(), rows_b.float())
    return sums


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        seed: Tensor | None,
        weight: BaseWeight,
        scaling: float,
        p: float,
    ) -> Tensor:
        factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
        y, t = forward(x, weight, bias, factors)
        _save(ctx, x, t, factors, _arguments_of(weight))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, _backward_of_arguments), None, None, None, None


_apply_lora = direct_apply(_LoRALinear)


def _save(ctx: Any, x: Tensor, t: Tensor, factors: LoRAFactors, base: tuple[Any, ...]) -> None:
    lora_a, lora_b, seed, scaling, p = factors
    ctx.save_for_backward(x, t, lora_a, lora_b, seed, *base[:4])
    ctx.numbers = (*base[4:], scaling, p)


def _gradients(ctx: Any, dy: Tensor, backward_function: Any) -> tuple[Tensor | None, ...]:
    """In x, bias, lora_a and lora_b, of the arguments the four that have one."""
    needs_dx, needs_dbias, needs_da, needs_db = ctx.needs_input_grad[:4]
    x, t, *tensors = ctx.saved_tensors
    dx = grad_a = grad_b = None
    if needs_dx or needs_da or needs_db:
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True: a gradient of the gradients may be asked for
            dx, grad_a, grad_b = _differentiable_backward(dy, x, *tensors, *ctx.numbers)
        else:
            dx, grad_a, grad_b = backward_function(dy, x, t, *tensors, *ctx.numbers, needs_dx)
    return (
        dx if needs_dx else None,
        grad_bias(dy) if needs_dbias else None,
        grad_a if needs_da else None,
        grad_b if needs_db else None,
    )


def _differentiable_backward(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` as operations that autograd follows, for second derivatives; x of any rank."""
    *base, scaling, p = rest
    weight = _weight_of(tuple(base))
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    if isinstance(weight, NF4Tensors):
        dx = nf4_linear_grad_input(dy, weight)
    else:
        dx = torch.matmul(dy, weight.to(dy.dtype))
    mask = _dropped(torch.ones_like(x, memory_format=torch.contiguous_format), factors)
    n, k = dy.shape[-1], x.shape[-1]
    dropped = (x * mask).reshape(-1, k).float()
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    u = torch.matmul(dy, b) * scaling
    t = torch.mm(dropped.to(x.dtype), a.t())
    grad_a = torch.mm(u.reshape(-1, u.shape[-1]).float().t(), dropped)
    grad_b = torch.mm(dy.reshape(-1, n).float().t(), t.float()) * scaling
    return (
        dx + torch.matmul(u, a) * mask,
        grad_a.to(lora_a.dtype),
        grad_b.to(lora_b.dtype),
    )


def _backward_of_arguments(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`backward` with the arguments of the operator."""
    *base, scaling, p, needs_dx = rest
    weight = _weight_of(tuple(base))
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return backward(dy, x, t, weight, factors, needs_dx)


# A base in an operator's schema: NF4Tensors, or a dense weight without scales.
_BASE_SCHEMA = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "SymInt n, SymInt k, SymInt block_size"
)


@torch.library.custom_op(
    "qlora_native::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? seed, "
    f"{_BASE_SCHEMA}, float scaling, float p) -> (Tensor, Tensor)",
)
def _lora_linear_op(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *base, scaling, p = rest
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return forward(x, _weight_of(tuple(base)), bias, factors)


@_lora_linear_op.register_fake
def _(
    x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    n = lora_b.shape[0]
    return x.new_empty(*x.shape[:-1], n), x.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0])


@torch.library.custom_op(
    "qlora_native::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor t, Tensor lora_a, Tensor lora_b, Tensor? seed, "
    f"{_BASE_SCHEMA}, float scaling, float p, bool needs_dx) -> (Tensor, Tensor, Tensor)",
)
def _lora_linear_backward_op(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An operator has no optional outputs: dx is empty unless asked for."""
    dx, grad_a, grad_b = _backward_of_arguments(dy, x, *rest)
    return x.new_empty(0) if dx is None else dx, grad_a, grad_b


@_lora_linear_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, t: Tensor, lora_a: Tensor, lora_b: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def empty_like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    needs_dx = rest[-1]
    return empty_like(x) if needs_dx else x.new_empty(0), empty_like(lora_a), empty_like(lora_b)


def _setup_context(
    ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    x, _, lora_a, lora_b, seed, *base, scaling, p = inputs
    _save(ctx, x, output[1], LoRAFactors(lora_a, lora_b, seed, scaling, p), tuple(base))


def _backward_through_dispatcher(
    ctx: Any, dy: Tensor, _grad_t: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, dy, torch.ops.qlora_native.lora_linear_backward)
    return *gradients, *(None,) * 10


_lora_linear_op.register_autograd(_backward_through_dispatcher, setup_context=_setup_context)
