"""y = x · dequantize(W)ᵀ + bias: `torch.ops.qlora_native.nf4_linear` and its input gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qlora_native.ops.base_product import base_forward, base_grad_input
from qlora_native.ops.doors import direct_apply, needs_autograd, needs_dispatcher
from qlora_native.ops.storage import FLOAT_DTYPES, NF4_SCHEMA, NF4Tensors


def nf4_linear(x: Tensor, weight: NF4Tensors, bias: Tensor | None = None) -> Tensor:
    """y[..., n] = x[..., k] · dequantize(W, x.dtype)ᵀ + bias[n].

    Sums are in fp32 and rounded once to x.dtype.

    x and bias are float32, bfloat16 or float16, on the weight's device. Gradients flow to x and
    bias, twice where asked. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    check_input("nf4_linear", x, weight.k, weight.codes.device)
    check_bias("nf4_linear", x, bias, weight.n)
    if needs_dispatcher(x, weight.codes, bias):
        return torch.ops.qlora_native.nf4_linear(x, bias, *weight)
    if needs_autograd(x, bias):
        return _apply_linear(x, bias, weight)
    return base_forward(x, weight, bias)


def nf4_linear_grad_input(dy: Tensor, weight: NF4Tensors) -> Tensor:
    """dx[..., k] = dy[..., n] · dequantize(W, dy.dtype): the gradient of nf4_linear in x."""
    if needs_dispatcher(dy, weight.codes):
        return torch.ops.qlora_native.nf4_linear_grad_input(dy, *weight)
    if needs_autograd(dy):
        return _apply_grad_input(dy, weight)
    return base_grad_input(dy, weight)


def check_input(operation: str, x: Tensor, k: int, device: torch.device) -> None:
    """Raise ValueError unless x is a float tensor [..., k] on `device`."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{operation}: x is {x.dtype}, want float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{operation}: x has shape {list(x.shape)}, w has k={k}: want [..., {k}]")
    if x.device != device:
        raise ValueError(f"{operation}: x is on {x.device}, the weight is on {device}")


def check_bias(operation: str, x: Tensor, bias: Tensor | None, n: int) -> None:
    """Raise ValueError unless bias is absent or fits y[..., n]."""
    if bias is not None and (
        bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device
    ):
        raise ValueError(
            f"{operation}: bias is {bias.dtype} {list(bias.shape)} on {bias.device}, "
            f"want {x.dtype} [{n}] on {x.device}"
        )


def grad_bias(dy: Tensor) -> Tensor:
    """Sum over all but the last dimension in fp32, rounded to dy.dtype."""
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(dy.dtype)


# nf4_linear is linear in x and its gradient linear in dy, each with the other as its derivative:
# that makes gradients of every order right. An autograd.Function takes the weight as one argument,
# an operator as the seven that NF4Tensors lists.


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: NF4Tensors) -> Tensor:
        _save_weight(ctx, weight)
        return base_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy), None


class _NF4LinearGradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: NF4Tensors) -> Tensor:
        _save_weight(ctx, weight)
        return base_grad_input(dy, weight)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return nf4_linear(ddx, _saved_weight(ctx)), None


_apply_linear = direct_apply(_NF4Linear)
_apply_grad_input = direct_apply(_NF4LinearGradInput)


def _save_weight(ctx: Any, weight: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*weight[:4])
    ctx.sizes = weight[4:]


def _saved_weight(ctx: Any) -> NF4Tensors:
    return NF4Tensors(*ctx.saved_tensors, *ctx.sizes)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """In x and bias, of the arguments the two that have one."""
    needs_dx, needs_dbias, *_ = ctx.needs_input_grad
    dx = nf4_linear_grad_input(dy, _saved_weight(ctx)) if needs_dx else None
    return dx, grad_bias(dy) if needs_dbias else None


def _gradients_through_dispatcher(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy), *(None,) * 7


def _gradients_of_grad_input(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    return nf4_linear(ddx, _saved_weight(ctx)), *(None,) * 7


@torch.library.custom_op(
    "qlora_native::nf4_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {NF4_SCHEMA}) -> Tensor",
)
def _nf4_linear_op(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return base_forward(x, NF4Tensors(*weight), bias)


@torch.library.custom_op(
    "qlora_native::nf4_linear_grad_input",
    mutates_args=(),
    schema=f"(Tensor dy, {NF4_SCHEMA}) -> Tensor",
)
def _nf4_linear_grad_input_op(dy: Tensor, *weight: Any) -> Tensor:
    return base_grad_input(dy, NF4Tensors(*weight))


@_nf4_linear_op.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], NF4Tensors(*weight).n)


@_nf4_linear_grad_input_op.register_fake
def _(dy: Tensor, *weight: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], NF4Tensors(*weight).k)


def _setup_linear(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_weight(ctx, inputs[2:])


def _setup_grad_input(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_weight(ctx, inputs[1:])


_nf4_linear_op.register_autograd(_gradients_through_dispatcher, setup_context=_setup_linear)
_nf4_linear_grad_input_op.register_autograd(
    _gradients_of_grad_input, setup_context=_setup_grad_input
)
