"""The low-rank update of LoRA without autograd, and what its operations share.

lora.py makes an operation of one update, lora_groups.py of many, dora.py of one that is normalised.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.ops.base_product import BaseWeight, autocast_disabled, rows_of
from qlora_native.ops.kernel_choice import lora_prefers_native
from qlora_native.ops.storage import FLOAT_DTYPES, NF4Tensors, execution, in_memory, run_core

_ROWS = 1024  # converted to fp32 at a time

# A base in an operator's schema: NF4Tensors, or a dense weight without scales.
BASE_SCHEMA = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "SymInt n, SymInt k, SymInt block_size"
)


class LoRAFactors(NamedTuple):
    """The trained part: `lora_a[r, k]`, `lora_b[n, r]`, and what is applied with them."""

    lora_a: Tensor
    lora_b: Tensor
    seed: Tensor | None  # of the dropout mask, int64 [1]; None: no dropout
    scaling: float
    p: float  # dropout probability


def check_base(operation: str, weight: BaseWeight) -> tuple[int, int, Tensor]:
    """n, k and the tensor that holds the weight; ValueError unless it is a frozen base."""
    if isinstance(weight, NF4Tensors):
        return weight.n, weight.k, weight.codes
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{operation}: the base weight is {weight.dtype}, want a float dtype")
    if weight.requires_grad:
        raise ValueError(
            f"{operation}: the base weight requires a gradient, but LoRA's base is frozen; "
            "call weight.requires_grad_(False)"
        )
    n, k = weight.shape
    return n, k, weight


def check_factors(
    operation: str, lora_a: Tensor, lora_b: Tensor, n: int, k: int, device: torch.device
) -> None:
    """Raise ValueError unless the factors fit each other and a base [n, k] on `device`."""
    r = lora_a.shape[0]
    if lora_a.shape != (r, k) or lora_b.shape != (n, r):
        raise ValueError(
            f"{operation}: lora_a has shape {list(lora_a.shape)} and lora_b {list(lora_b.shape)}, "
            f"want [r, {k}] and [{n}, r]"
        )
    if lora_a.dtype not in FLOAT_DTYPES or lora_b.dtype != lora_a.dtype:
        raise ValueError(
            f"{operation}: lora_a is {lora_a.dtype} and lora_b {lora_b.dtype}, want one dtype of "
            "float32, bfloat16 and float16 for both"
        )
    if lora_a.device != device or lora_b.device != device:
        raise ValueError(
            f"{operation}: lora_a is on {lora_a.device} and lora_b on {lora_b.device}, x is on "
            f"{device}"
        )


def weight_of(base: tuple[Any, ...]) -> BaseWeight:
    """The weight from the operator's arguments: a dense one has no scales."""
    return base[0] if base[1] is None else NF4Tensors(*base)


def arguments_of(weight: BaseWeight) -> tuple[Any, ...]:
    """The operator's arguments from the weight."""
    if isinstance(weight, NF4Tensors):
        return weight
    return (weight, None, None, None, *weight.shape, 0)


def dropped(x: Tensor, factors: LoRAFactors, out: Tensor | None = None) -> Tensor:
    """x after dropout; x itself without."""
    if factors.seed is None:
        return x
    out = torch.empty_like(x) if out is None else out
    run_core(_core.dropout, x, factors.p, factors.seed, out, *execution(x))
    return out


def add_update(x: Tensor, y: Tensor, factors: LoRAFactors) -> Tensor:
    """y[..., n] += scaling · t · Bᵀ, and t[m, r] = x[..., k] · Aᵀ; x is dropped already."""
    lora_a, lora_b, _, scaling, _ = factors
    if lora_prefers_native(x, lora_b):
        t = x.new_empty(x.shape[:-1].numel(), lora_a.shape[0])
        a, b = in_memory(lora_a), in_memory(lora_b)
        run_core(_core.lora_forward, x, a, b, scaling, t, y, *execution(x))
        return t
    with autocast_disabled(x):
        t = torch.mm(rows_of(x), lora_a.to(x.dtype).t())
        rows_of(y).addmm_(t, lora_b.to(x.dtype).t(), alpha=scaling)
    return t


def add_update_gradients(
    dy: Tensor, x: Tensor, t: Tensor, factors: LoRAFactors, dx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """grad_a and grad_b of `add_update`; its gradient in x is added to dx, if there is one."""
    lora_a, lora_b, _, scaling, _ = factors
    if lora_prefers_native(x, lora_b):
        a, b = in_memory(lora_a), in_memory(lora_b)
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        run_core(_core.lora_backward, dy, x, t, a, b, scaling, grad_a, grad_b, dx, *execution(x))
        return grad_a, grad_b
    with autocast_disabled(x):
        rows = rows_of(dy)
        b = lora_b.to(x.dtype)
        u = torch.addmm(dy.new_zeros(1), rows, b, beta=0, alpha=scaling)  # scaled, rounded once
        grad_a = _sum_of_outer_products(u, rows_of(x)).to(lora_a.dtype)
        grad_b = _sum_of_outer_products(rows, t).mul_(scaling).to(lora_b.dtype)
        if dx is not None:
            rows_of(dx).addmm_(u, lora_a.to(x.dtype))
    return grad_a, grad_b


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
