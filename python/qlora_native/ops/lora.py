"""A frozen base and its LoRA update as one autograd node: `torch.ops.qlora_native.lora_linear`."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qlora_native.ops.base_product import BaseWeight, base_forward, base_grad_input
from qlora_native.ops.doors import direct_apply, needs_autograd, needs_dispatcher
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
from qlora_native.ops.storage import NF4Tensors, in_memory

__all__ = ["LoRAFactors", "lora_linear"]


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
    n, k, stored = check_base("lora_linear", weight)
    check_input("lora_linear", x, k, stored.device)
    check_bias("lora_linear", x, bias, n)
    check_factors("lora_linear", lora_a, lora_b, n, k, x.device)
    if p == 0.0:
        seed = None
    if needs_dispatcher(x, bias, lora_a, lora_b, stored):
        arguments = (x, bias, lora_a, lora_b, seed, *arguments_of(weight), scaling, p)
        return torch.ops.qlora_native.lora_linear(*arguments)[0]
    if needs_autograd(x, bias, lora_a, lora_b):
        return _apply_lora(x, bias, lora_a, lora_b, seed, weight, scaling, p)
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return forward(x, weight, bias, factors)[0]


def forward(
    x: Tensor, weight: BaseWeight, bias: Tensor | None, factors: LoRAFactors
) -> tuple[Tensor, Tensor]:
    """(y[..., n], t[m, r] = dropout(x) · Aᵀ) of x[..., k], m rows in all, without autograd."""
    x = in_memory(x)
    y = base_forward(x, weight, bias)
    return y, add_update(dropped(x, factors), y, factors)


def backward(
    dy: Tensor, x: Tensor, t: Tensor, weight: BaseWeight, factors: LoRAFactors, needs_dx: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, grad_a, grad_b) of `forward`; dx is None unless asked for."""
    x, dy = in_memory(x), in_memory(dy)
    dx = base_grad_input(dy, weight) if needs_dx else None
    # Dropout stands between x and A, so A's part of dx passes the mask before it is added.
    dx_lora = dx if factors.seed is None or dx is None else torch.zeros_like(dx)
    grad_a, grad_b = add_update_gradients(dy, dropped(x, factors), t, factors, dx_lora)
    if dx is not None and dx_lora is not None and dx_lora is not dx:
        dx.add_(dropped(dx_lora, factors, out=dx_lora))
    return dx, grad_a, grad_b


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
        _save(ctx, x, t, factors, arguments_of(weight))
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
    weight = weight_of(tuple(base))
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    if isinstance(weight, NF4Tensors):
        dx = nf4_linear_grad_input(dy, weight)
    else:
        dx = torch.matmul(dy, weight.to(dy.dtype))
    mask = dropped(torch.ones_like(x, memory_format=torch.contiguous_format), factors)
    n, k = dy.shape[-1], x.shape[-1]
    dropped_x = (x * mask).reshape(-1, k).float()
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    u = torch.matmul(dy, b) * scaling
    t = torch.mm(dropped_x.to(x.dtype), a.t())
    grad_a = torch.mm(u.reshape(-1, u.shape[-1]).float().t(), dropped_x)
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
    weight = weight_of(tuple(base))
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return backward(dy, x, t, weight, factors, needs_dx)


@torch.library.custom_op(
    "qlora_native::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? seed, "
    f"{BASE_SCHEMA}, float scaling, float p) -> (Tensor, Tensor)",
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
    return forward(x, weight_of(tuple(base)), bias, factors)


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
    f"{BASE_SCHEMA}, float scaling, float p, bool needs_dx) -> (Tensor, Tensor, Tensor)",
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
