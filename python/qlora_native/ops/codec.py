"""Quantise and dequantise: `torch.ops.qlora_native.nf4_quantize`, `.nf4_dequantize`, `…_absmax`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora_native import _core
from qlora_native.ops.doors import needs_dispatcher
from qlora_native.ops.storage import (
    FLOAT_DTYPES,
    NF4_SCHEMA,
    NF4Tensors,
    check_block_size,
    empty_nf4_tensors,
    execution,
    in_memory,
    run_core,
)


def quantize(
    w: Tensor, block_size: int, double_quant: bool, out: NF4Tensors | None = None
) -> NF4Tensors:
    """Quantise `w`, whose last dimension is k, the product of the others n; into `out`, if any."""
    check_block_size("nf4_quantize", block_size)
    if w.dtype not in FLOAT_DTYPES:
        raise ValueError(f"nf4_quantize: w is {w.dtype}, want float32, bfloat16 or float16")
    if w.dim() == 0:
        raise ValueError("nf4_quantize: w has no dimensions, want at least 1")
    k = w.shape[-1]
    n = w.numel() // k if k else 0
    w = w.detach()
    if needs_dispatcher(w):
        parts = torch.ops.qlora_native.nf4_quantize(w, n, k, block_size, double_quant)
        codes, absmax, nested_absmax, nested_offset = (*parts, None, None)[:4]
        made = NF4Tensors(codes, absmax, nested_absmax, nested_offset, n, k, block_size)
        return made if out is None else _copy_into(out, made)
    return _quantize(w, n, k, block_size, double_quant, out)


def _copy_into(out: NF4Tensors, made: NF4Tensors) -> NF4Tensors:
    for to, part in zip(out[:4], made[:4], strict=True):
        if to is not None and part is not None:
            to.copy_(part)
    return out


def _quantize(
    w: Tensor, n: int, k: int, block_size: int, double_quant: bool, out: NF4Tensors | None = None
) -> NF4Tensors:
    if out is None:
        out = empty_nf4_tensors(n, k, block_size, double_quant, w.device)
    run_core(_core.nf4_quantize, in_memory(w).view(n, k), out, *execution(w))
    return out


def dequantize(weight: NF4Tensors, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The dense weight `[n, k]` in `dtype`, or in `out` (of it, contiguous, n * k elements)."""
    if needs_dispatcher(weight.codes, out):
        dense = torch.ops.qlora_native.nf4_dequantize(*weight, dtype)
        return dense if out is None else out.copy_(dense.view_as(out))
    return _dequantize(weight, dtype, out)


def _dequantize(weight: NF4Tensors, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.codes.device)
    elif not out.is_inference():
        increment_version(out)  # so that autograd sees the write, as of any in-place operation
    run_core(_core.nf4_dequantize, weight, out, *execution(out))
    return out


def dequantize_absmax(weight: NF4Tensors) -> Tensor:
    """The scale of every block in fp32, `[blocks]`."""
    if needs_dispatcher(weight.codes):
        return torch.ops.qlora_native.nf4_dequantize_absmax(*weight)
    return _dequantize_absmax(weight)


def _dequantize_absmax(weight: NF4Tensors) -> Tensor:
    out = torch.empty(weight.absmax.shape[0], dtype=torch.float32, device=weight.codes.device)
    run_core(_core.nf4_dequantize_absmax, weight, out, *execution(out))
    return out


@torch.library.custom_op(
    "qlora_native::nf4_quantize",
    mutates_args=(),
    schema="(Tensor w, SymInt n, SymInt k, SymInt block_size, bool double_quant) -> Tensor[]",
)
def _nf4_quantize_op(
    w: Tensor, n: int, k: int, block_size: int, double_quant: bool
) -> list[Tensor]:
    return [part for part in _quantize(w, n, k, block_size, double_quant)[:4] if part is not None]


@_nf4_quantize_op.register_fake
def _(w: Tensor, n: int, k: int, block_size: int, double_quant: bool) -> list[Tensor]:
    out = empty_nf4_tensors(n, k, block_size, double_quant, w.device)
    return [part for part in out[:4] if part is not None]


@torch.library.custom_op(
    "qlora_native::nf4_dequantize",
    mutates_args=(),
    schema=f"({NF4_SCHEMA}, ScalarType dtype) -> Tensor",
)
def _nf4_dequantize_op(*arguments: Any) -> Tensor:
    *weight, dtype = arguments
    return _dequantize(NF4Tensors(*weight), dtype)


@_nf4_dequantize_op.register_fake
def _(*arguments: Any) -> Tensor:
    *parts, dtype = arguments
    weight = NF4Tensors(*parts)
    return weight.codes.new_empty((weight.n, weight.k), dtype=dtype)


@torch.library.custom_op(
    "qlora_native::nf4_dequantize_absmax", mutates_args=(), schema=f"({NF4_SCHEMA}) -> Tensor"
)
def _nf4_dequantize_absmax_op(*weight: Any) -> Tensor:
    return _dequantize_absmax(NF4Tensors(*weight))


@_nf4_dequantize_absmax_op.register_fake
def _(codes: Tensor, absmax: Tensor, *_: Any) -> Tensor:
    return codes.new_empty(absmax.shape[0], dtype=torch.float32)
