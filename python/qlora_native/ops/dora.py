"""DoRA: an update whose rows are normalised and scaled: `torch.ops.qlora_native.dora_linear`."""

import math
from typing import Any

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
from qlora_native.ops.codec import dequantize, dequantize_absmax
from qlora_native.ops.doors import direct_apply, needs_autograd, needs_dispatcher
from qlora_native.ops.linear import (
    check_bias,
    check_input,
    grad_bias,
    nf4_linear,
    nf4_linear_grad_input,
)
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
from qlora_native.ops.storage import FLOAT_DTYPES, NF4Tensors, execution, in_memory, run_core

_NORM_ELEMENTS = 1 << 20  # of a weight that are dense at a time


def dora_linear(
    x: Tensor,
    weight: BaseWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    weight_norm_squared: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y[..., n] = x · (g ⊙ (W + scaling · B·A))ᵀ + bias, g = magnitude / ‖W + scaling · B·A‖.

    Norms are those of rows, and constant in backward (Liu et al. 2024, section 4.3); a row whose
    norm is zero has a gain of 0. They take no dense W:

        ‖W_n + s(BA)_n‖² = ‖W_n‖² + 2s · B_n · (W·Aᵀ)_n + s² · B_n·(A·Aᵀ)·B_nᵀ

    With dropout, as PEFT defines it, the mask is before all but the base's own product:

        y = x·Wᵀ + bias + (g - 1) ⊙ (dropout(x)·Wᵀ) + g ⊙ (scaling · dropout(x)·Aᵀ·Bᵀ)

    which takes a second product with W, forward and backward.

    Args:
        x: `[..., k]`, float32, bfloat16 or float16; its dtype is the compute dtype.
        weight: the frozen base: NF4, or a dense `[n, k]` that does not require a gradient.
        bias: `[n]` of x's dtype, or None.
        lora_a: `[r, k]`, float32, bfloat16 or float16, as `lora_linear` takes it.
        lora_b: `[n, r]`, of lora_a's dtype.
        magnitude: `[n]`, float32, bfloat16 or float16; its gradient is in its own dtype.
        scaling: the factor of the update, alpha / r as a rule.
        weight_norm_squared: `[n]` float32, the ‖W_n‖² that `row_norms_squared` gives.
        p: the probability with which an element of x is dropped, 0 <= p < 1.
        seed: int64 `[1]` on x's device, of the mask. None: nothing is dropped.

    One autograd node. It saves x, dropout(x)·Aᵀ `[m, r]`, and the norms `[n]`; and the rows before
    they are scaled, `[m, n]`, where the magnitude wants a gradient. Gradients of every order are
    right. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    n, k, stored = check_base("dora_linear", weight)
    check_input("dora_linear", x, k, stored.device)
    check_bias("dora_linear", x, bias, n)
    check_factors("dora_linear", lora_a, lora_b, n, k, x.device)
    _check_rows("magnitude", magnitude, n, FLOAT_DTYPES, x.device)
    _check_rows("weight_norm_squared", weight_norm_squared, n, (torch.float32,), x.device)
    if p == 0.0:
        seed = None
    tensors = x, bias, lora_a, lora_b, magnitude, seed, weight_norm_squared
    if needs_dispatcher(x, bias, lora_a, lora_b, magnitude, weight_norm_squared, stored):
        arguments = (*tensors, *arguments_of(weight), scaling, p)
        return torch.ops.qlora_native.dora_linear(*arguments)[0]
    if needs_autograd(x, bias, lora_a, lora_b, magnitude):
        return _apply_dora(*tensors, weight, scaling, p)
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return _forward(x, weight, bias, factors, magnitude, weight_norm_squared)[0]


def row_norms_squared(weight: BaseWeight) -> Tensor:
    """‖W_n‖² of every row of a base `[n, k]`, fp32 `[n]`: some rows are dense at a time."""
    n, k, stored = check_base("row_norms_squared", weight)
    out = torch.empty(n, dtype=torch.float32, device=stored.device)
    if n * k == 0:
        return out.zero_()
    if isinstance(weight, Tensor):
        step = max(_NORM_ELEMENTS // k, 1)
        for begin in range(0, n, step):
            out[begin : begin + step] = weight[begin : begin + step].float().square().sum(1)
        return out
    # Rows that end on a whole byte and a whole block are a weight of their own.
    unit = math.lcm(k, 2, weight.block_size) // k
    step = max(_NORM_ELEMENTS // k // unit, 1) * unit
    absmax = dequantize_absmax(weight).view(torch.uint8).view(-1, 4)
    codes = weight.codes.reshape(-1)
    for begin in range(0, n, step):
        rows = min(step, n - begin)
        first, last = begin * k, (begin + rows) * k
        blocks = absmax[first // weight.block_size : -(-last // weight.block_size)]
        part = codes[first // 2 : (last + 1) // 2]
        shape = (rows, k // 2) if k % 2 == 0 else (-1, 1)
        piece = NF4Tensors(part.view(shape), blocks, None, None, rows, k, weight.block_size)
        out[begin : begin + rows] = dequantize(piece, torch.float32).square_().sum(1)
    return out


def row_gains(magnitude: Tensor, weight: Tensor) -> Tensor:
    """magnitude / ‖weight_n‖ of the rows of a dense `[n, k]` in fp32; 0 for a row of zeros."""
    norms = torch.linalg.vector_norm(weight.float(), dim=1)
    return magnitude.float() / norms.masked_fill_(norms == 0, torch.inf)


def _check_rows(
    argument: str, tensor: Tensor, n: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.shape != (n,) or tensor.dtype not in dtypes or tensor.device != device:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"dora_linear: {argument} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"want {wanted} [{n}] on {device}"
        )


def _norms(weight: BaseWeight, factors: LoRAFactors, dtype: torch.dtype, squared: Tensor) -> Tensor:
    """‖W_n + scaling · (BA)_n‖ of every row, fp32 `[n]`, with factors rounded to `dtype`.

    Infinity for a row of zeros, whose gain and gradients are then 0.
    """
    a, b = factors.lora_a.to(dtype), factors.lora_b.to(dtype)
    products = base_forward(in_memory(a), weight, None)  # A · Wᵀ, [r, n]
    with autocast_disabled(a):
        a, b = a.float(), b.float()
        # Of B_n: 2s · (W·Aᵀ)_n + s² · (A·Aᵀ)·B_nᵀ.
        inner = torch.addmm(
            products.t().float(),
            b,
            torch.mm(a, a.t()),
            beta=2 * factors.scaling,
            alpha=factors.scaling**2,
        )
        norms_squared = squared + inner.mul_(b).sum(1)
    return norms_squared.masked_fill_(norms_squared <= 0, torch.inf).sqrt_()


def _forward(
    x: Tensor,
    weight: BaseWeight,
    bias: Tensor | None,
    factors: LoRAFactors,
    magnitude: Tensor,
    weight_norm_squared: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y[..., n], t[m, r], rows before they are scaled [..., n], norms [n]), without autograd."""
    x = in_memory(x)
    norms = _norms(weight, factors, x.dtype, weight_norm_squared)
    x_dropped = dropped(x, factors)
    rows = base_forward(x_dropped, weight, None)
    t = add_update(x_dropped, rows, factors)
    # Of what was dropped, the base's product alone.
    addend = None if factors.seed is None else base_forward(x - x_dropped, weight, None)
    return _scale(rows, magnitude / norms, addend, bias), t, rows, norms


def _scale(rows: Tensor, gain: Tensor, addend: Tensor | None, bias: Tensor | None) -> Tensor:
    """y[..., n] = gain[n] · rows + addend + bias, rounded once; not in the memory of rows."""
    if rows.is_cpu:
        y = torch.empty_like(rows) if addend is None else addend
        bias = None if bias is None else in_memory(bias)
        run_core(_core.dora_scale, rows, gain, addend, bias, y, *execution(rows))
        return y
    y = rows * gain
    if addend is not None:
        y += addend
    if bias is not None:
        y += bias
    return y.to(rows.dtype)


def _scale_backward(dy: Tensor, rows: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of `_scale`: the gradient in rows, and in gain in fp32 unless rows are absent."""
    if dy.is_cpu:
        scaled = torch.empty_like(dy)
        sums = None if rows is None else torch.empty_like(gain)
        run_core(_core.dora_scale_backward, dy, rows, gain, scaled, sums, *execution(dy))
        return scaled, sums
    sums = None
    if rows is not None:
        sums = (rows_of(dy).float() * rows_of(rows)).sum(0)
    return (dy * gain).to(dy.dtype), sums


def _backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    rows: Tensor | None,
    norms: Tensor,
    weight: BaseWeight,
    factors: LoRAFactors,
    magnitude: Tensor,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """(dx, grad_a, grad_b, grad_magnitude) of `_forward`.

    dx is None unless asked for, grad_magnitude without the rows.
    """
    x, dy = in_memory(x), in_memory(dy)
    scaled, sums = _scale_backward(dy, rows, magnitude / norms)
    grad_magnitude = None if sums is None else (sums / norms).to(magnitude.dtype)
    dx = base_grad_input(scaled, weight) if needs_dx else None
    grad_a, grad_b = add_update_gradients(scaled, dropped(x, factors), t, factors, dx)
    if dx is not None and factors.seed is not None:
        dx_base = base_grad_input(dy, weight)
        dx.sub_(dx_base)
        dx = dropped(dx, factors, out=dx).add_(dx_base)
    return dx, grad_a, grad_b, grad_magnitude


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        seed: Tensor | None,
        weight_norm_squared: Tensor,
        weight: BaseWeight,
        scaling: float,
        p: float,
    ) -> Tensor:
        factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
        y, *kept = _forward(x, weight, bias, factors, magnitude, weight_norm_squared)
        _save(ctx, x, kept, factors, magnitude, arguments_of(weight))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, _backward_of_arguments), *(None,) * 5


_apply_dora = direct_apply(_DoRALinear)


def _save(
    ctx: Any,
    x: Tensor,
    kept: list[Tensor],
    factors: LoRAFactors,
    magnitude: Tensor,
    base: tuple[Any, ...],
) -> None:
    t, rows, norms = kept
    lora_a, lora_b, seed, scaling, p = factors
    saved_rows = rows if ctx.needs_input_grad[4] else None
    saved = x, t, saved_rows, norms, lora_a, lora_b, magnitude, seed, *base[:4]
    ctx.save_for_backward(*saved)
    ctx.numbers = (*base[4:], scaling, p)


def _gradients(ctx: Any, dy: Tensor, backward_function: Any) -> tuple[Tensor | None, ...]:
    """In x, bias, lora_a, lora_b and magnitude."""
    needs_dx, needs_dbias, *needs = ctx.needs_input_grad[:5]
    saved, numbers = ctx.saved_tensors, ctx.numbers
    found: tuple[Tensor | None, ...] = (None,) * 4
    if needs_dx or any(needs):
        if torch.is_grad_enabled():  # create_graph=True, as in lora.py
            x, _, _, norms, *rest = saved
            found = _differentiable_backward(dy, x, norms, *rest, *numbers)
        else:
            found = backward_function(dy, *saved, *numbers, needs_dx)
    dx, *gradients = found
    return (
        dx if needs_dx else None,
        grad_bias(dy) if needs_dbias else None,
        *(
            gradient if is_needed else None
            for gradient, is_needed in zip(gradients, needs, strict=True)
        ),
    )


def _differentiable_backward(
    dy: Tensor,
    x: Tensor,
    norms: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """`_backward` as operations that autograd follows, for second derivatives."""
    *base, scaling, p = rest
    weight = weight_of(tuple(base))
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)

    def product(rows: Tensor) -> Tensor:
        if isinstance(weight, NF4Tensors):
            return nf4_linear(rows, weight)
        return torch.mm(rows, weight.to(rows.dtype).t())

    def grad_input(rows: Tensor) -> Tensor:
        if isinstance(weight, NF4Tensors):
            return nf4_linear_grad_input(rows, weight)
        return torch.mm(rows, weight.to(rows.dtype))

    dy_rows, x_rows = rows_of(dy), rows_of(x)
    mask = dropped(torch.ones_like(x_rows, memory_format=torch.contiguous_format), factors)
    x_dropped = x_rows * mask
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    t = torch.mm(x_dropped, a.t())
    rows = product(x_dropped) + torch.mm(t, b.t()) * scaling
    scaled = (dy_rows * (magnitude.float() / norms)).to(dy.dtype)
    u = torch.mm(scaled, b) * scaling
    dx = grad_input(scaled) + torch.mm(u, a)
    if seed is not None:
        dx_base = grad_input(dy_rows)
        dx = (dx - dx_base) * mask + dx_base
    grad_a = torch.mm(u.float().t(), x_dropped.float())
    grad_b = torch.mm(scaled.float().t(), t.float()) * scaling
    grad_magnitude = (dy_rows.float() * rows).sum(0) / norms
    return (
        dx.view_as(x),
        grad_a.to(lora_a.dtype),
        grad_b.to(lora_b.dtype),
        grad_magnitude.to(magnitude.dtype),
    )


def _backward_of_arguments(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    rows: Tensor | None,
    norms: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """`_backward` with the arguments of the operator."""
    *base, scaling, p, needs_dx = rest
    weight = weight_of(tuple(base))
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return _backward(dy, x, t, rows, norms, weight, factors, magnitude, needs_dx)


@torch.library.custom_op(
    "qlora_native::dora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    f"Tensor? seed, Tensor weight_norm_squared, {BASE_SCHEMA}, float scaling, float p) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _dora_linear_op(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    seed: Tensor | None,
    weight_norm_squared: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *base, scaling, p = rest
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    return _forward(x, weight_of(tuple(base)), bias, factors, magnitude, weight_norm_squared)


@_dora_linear_op.register_fake
def _(
    x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = lora_b.shape[0]
    return (
        x.new_empty(*x.shape[:-1], n),
        x.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0]),
        x.new_empty(*x.shape[:-1], n),
        x.new_empty(n, dtype=torch.float32),
    )


@torch.library.custom_op(
    "qlora_native::dora_linear_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor t, Tensor? rows, Tensor norms, Tensor lora_a, "
    f"Tensor lora_b, Tensor magnitude, Tensor? seed, {BASE_SCHEMA}, float scaling, float p, "
    "bool needs_dx) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _dora_linear_backward_op(
    dy: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator has no optional outputs: what was not asked for is empty."""
    dx, grad_a, grad_b, grad_magnitude = _backward_of_arguments(dy, x, *rest)
    return (
        x.new_empty(0) if dx is None else dx,
        grad_a,
        grad_b,
        x.new_empty(0) if grad_magnitude is None else grad_magnitude,
    )


@_dora_linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    rows: Tensor | None,
    norms: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty_like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return (
        empty_like(x) if rest[-1] else x.new_empty(0),
        empty_like(lora_a),
        empty_like(lora_b),
        x.new_empty(0) if rows is None else empty_like(magnitude),
    )


def _setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, lora_a, lora_b, magnitude, seed, _, *base, scaling, p = inputs
    factors = LoRAFactors(lora_a, lora_b, seed, scaling, p)
    _save(ctx, x, list(output[1:]), factors, magnitude, tuple(base))


def _backward_through_dispatcher(
    ctx: Any, dy: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, dy, torch.ops.qlora_native.dora_linear_backward)
    return *gradients, *(None,) * 11


_dora_linear_op.register_autograd(_backward_through_dispatcher, setup_context=_setup_context)
