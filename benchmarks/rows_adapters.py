"""Many adapters in a batch beside one, and DoRA beside LoRA: a layer forward and backward."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from checks import assert_close
from harness import OURS, Case, Work
from qlora_native import ops
from qlora_native.ops import LoRAFactors, LoRAGroup, NF4Tensors
from weights import Weights

ADAPTERS, TOKENS_A_SEQUENCE, DORA_TOKENS, RANK = 32, (1, 4, 16, 64), 512, 16
# t and the factors are rounded to bf16: a few roundings, not one.
_TOLERANCE = 2**-7


def works(weights: Weights) -> Iterator[Work]:
    for tokens in TOKENS_A_SEQUENCE:
        for name, trains in (("forward", False), ("forward + backward", True)):
            yield Work(
                f"{ADAPTERS} adapters, {tokens} tokens each, {name}",
                weights.size,
                lambda tokens=tokens, trains=trains: _groups(weights, tokens, trains),
                ADAPTERS * tokens,
            )
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield Work(
            f"DoRA forward + backward, {name} factors",
            weights.size,
            lambda dtype=dtype: _dora(weights, dtype),
            DORA_TOKENS,
        )


def _groups(weights: Weights, tokens: int, trains: bool) -> Case:
    """A sequence of every adapter, beside all of them with the first one."""
    weight = weights.ours[0].tensors()
    adapters = [_factors(weight) for _ in range(ADAPTERS)]
    groups = [LoRAGroup(i * tokens, (i + 1) * tokens, adapters[i]) for i in range(ADAPTERS)]
    x, dy = _batch(weight, ADAPTERS * tokens)
    a, b, _, scaling, _ = adapters[0]

    def mixed() -> Tensor:
        return ops.lora_linear_groups(x, weight, None, groups)

    def single() -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, scaling)

    w = ops.dequantize(weight, torch.bfloat16).double()
    with torch.no_grad():
        for y, (begin, end, (a_, b_, *_)) in zip(mixed().split(tokens), groups, strict=True):
            update = x[begin:end].double() @ a_.bfloat16().double().T @ b_.bfloat16().double().T
            expected = x[begin:end].double() @ w.T + scaling * update
            assert_close("adapters: forward", y, expected, _TOLERANCE)
    if not trains:
        return Case({OURS: torch.no_grad()(mixed), "one adapter": torch.no_grad()(single)})
    factors = [factor for adapter in adapters for factor in adapter[:2]]
    return Case({OURS: _train(mixed, x, factors, dy), "one adapter": _train(single, x, [a, b], dy)})


def _dora(weights: Weights, dtype: torch.dtype) -> Case:
    weight = weights.ours[0].tensors()
    a, b, _, scaling, _ = _factors(weight, dtype)
    squared = ops.row_norms_squared(weight)
    magnitude = (1.1 * squared.sqrt()).to(dtype).requires_grad_()
    x, dy = _batch(weight, DORA_TOKENS)

    def dora() -> Tensor:
        return ops.dora_linear(x, weight, None, a, b, magnitude, scaling, squared)

    def lora() -> Tensor:
        return ops.lora_linear(x, weight, None, a, b, scaling)

    with torch.no_grad():
        w = ops.dequantize(weight, torch.float32).double()
        w += scaling * (b.bfloat16().double() @ a.bfloat16().double())
        w *= (magnitude.double() / w.norm(dim=1))[:, None]
        assert_close("DoRA: forward", dora(), x.double() @ w.T, _TOLERANCE)
    return Case({OURS: _train(dora, x, [a, b, magnitude], dy), "LoRA": _train(lora, x, [a, b], dy)})


def _factors(weight: NF4Tensors, dtype: torch.dtype = torch.float32) -> LoRAFactors:
    a = torch.empty(RANK, weight.k).uniform_(-1 / math.sqrt(weight.k), 1 / math.sqrt(weight.k))
    b = 0.02 * torch.randn(weight.n, RANK)
    return LoRAFactors(a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), None, 2.0, 0.0)


def _batch(weight: NF4Tensors, tokens: int) -> tuple[Tensor, Tensor]:
    """x and dy."""
    x = torch.randn(tokens, weight.k, dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn(tokens, weight.n, dtype=torch.bfloat16)


def _train(
    forward: Callable[[], Tensor], x: Tensor, trained: list[Tensor], dy: Tensor
) -> Callable[[], None]:
    """Forward and backward; the gradients are made anew each time."""

    def call() -> None:
        for tensor in (x, *trained):
            tensor.grad = None
        forward().backward(dy)

    return call
