"""Products with a 4-bit weight: forward, and forward + input gradient."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from checks import PEER_TOLERANCE, TOLERANCE, assert_product
from goals import BNB_TRAINING
from harness import OURS, Case, Work, in_turn
from weights import Weights, runs_avx512_bf16

FORWARD_TOKENS = (1, 4, 8, 16, 64, 256, 1024)
STEP_TOKENS = (16, 256, 1024)
FP32_TOKENS = (64, 256, 1024)
_LARGE = 64  # tokens from which a processor without bf16 arithmetic may prefer fp32


def works(weights: Weights) -> Iterator[Work]:
    size = weights.size
    for m in FORWARD_TOKENS:
        yield Work("forward", size, lambda m=m: _forward(weights, m), m)
    for m in STEP_TOKENS:
        yield Work("forward + dX", size, lambda m=m: _forward_and_gradient(weights, m), m)
    for m in FP32_TOKENS:
        yield Work("forward, fp32 activations", size, lambda m=m: _forward_fp32(weights, m), m)


def _forward(weights: Weights, m: int) -> Case:
    """Evaluation in bf16, without autograd; bitsandbytes on both its paths where m is large."""
    x = torch.randn(m, weights.k, dtype=torch.bfloat16)
    layers = {
        OURS: weights.ours,
        "bitsandbytes": weights.theirs_evaluating,
        "torch bf16": weights.dense_bf16,
    }
    calls = {name: in_turn(ring, _evaluate(x)) for name, ring in layers.items()}
    if m >= _LARGE:
        training = in_turn(weights.theirs_training, _evaluate(x))
        calls[BNB_TRAINING] = training
        if not runs_avx512_bf16():
            calls["torch fp32"] = in_turn(weights.dense_fp32, _evaluate(x.float()))
    w = weights.ours[0].dequantize(torch.bfloat16)
    for name in (OURS, "bitsandbytes"):
        tolerance = TOLERANCE[torch.bfloat16] if name == OURS else PEER_TOLERANCE
        assert_product(f"{name}: forward, m = {m}", calls[name](), x, w, tolerance)
    return _case(weights, calls, m, 1)


def _forward_fp32(weights: Weights, m: int) -> Case:
    """Evaluation in fp32: products and sums in fp32, not in bf16 as bitsandbytes does."""
    x = torch.randn(m, weights.k)
    calls = {
        OURS: in_turn(weights.ours, _evaluate(x)),
        "torch fp32": in_turn(weights.dense_fp32, _evaluate(x)),
    }
    w = weights.ours[0].dequantize(torch.float32)
    assert_product(f"forward in fp32, m = {m}", calls[OURS](), x, w, TOLERANCE[torch.float32])
    return _case(weights, calls, m, 1, "fp32")


def _forward_and_gradient(weights: Weights, m: int) -> Case:
    """Training in bf16, with autograd: y = x · Wᵀ and dX = dY · W."""
    x = torch.randn(m, weights.k, dtype=torch.bfloat16)
    dy = torch.randn(m, weights.n, dtype=torch.bfloat16)
    layers = {
        OURS: weights.ours,
        "bitsandbytes": weights.theirs_training,
        "torch bf16": weights.dense_bf16,
    }
    calls = {name: in_turn(ring, train(x, dy)) for name, ring in layers.items()}
    if not runs_avx512_bf16():
        calls["torch fp32"] = in_turn(weights.dense_fp32, train(x.float(), dy.float()))
    w = weights.ours[0].dequantize(torch.bfloat16)
    for name in (OURS, "bitsandbytes"):
        tolerance = TOLERANCE[torch.bfloat16] if name == OURS else PEER_TOLERANCE
        y, dx = calls[name]()
        assert_product(f"{name}: forward, m = {m}", y, x, w, tolerance)
        assert_product(f"{name}: dX, m = {m}", dx, dy, w.T, tolerance)
    return _case(weights, calls, m, 2)


def _evaluate(x: Tensor) -> Callable[[nn.Module], Tensor]:
    def call(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def train(x: Tensor, dy: Tensor) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    """A call that takes a layer forward and backward and returns (y, dX)."""
    x = x.detach().requires_grad_()

    def call(layer: nn.Module) -> tuple[Tensor, Tensor]:
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y, x.grad

    return call


def _case(
    weights: Weights,
    calls: dict[str, Callable[[], object]],
    m: int,
    products: int,
    dtype: str = "bf16",
) -> Case:
    return Case(
        calls,
        bytes_moved=products * weights.nf4_bytes,
        operations=2.0 * products * m * weights.n * weights.k,
        dtype=dtype,
    )
