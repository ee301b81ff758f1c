"""What a call costs before any arithmetic: a layer so small that nothing else is left."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from checks import TOLERANCE, assert_product
from harness import OURS, Case, Work
from rows_linear import train
from weights import Weights

_SIZE = 64


def works() -> Iterator[Work]:
    for key, backward in (("forward", False), ("forward + backward", True)):
        yield Work(
            f"call overhead, {key}",
            f"{_SIZE}×{_SIZE}, one thread",
            partial(_overhead, backward=backward),
        )


def _overhead(backward: bool) -> Case:
    """One token in bf16, layers in training mode, on one thread."""
    weights = Weights(_SIZE, _SIZE)
    layers: dict[str, nn.Module] = {
        OURS: weights.make_ours(),
        "bitsandbytes": weights.linear4bit().train(),
        "nn.Linear": weights.linear(torch.bfloat16),
    }
    x = torch.randn(1, _SIZE, dtype=torch.bfloat16)
    dy = torch.randn(1, _SIZE, dtype=torch.bfloat16)
    w = layers[OURS].dequantize(torch.bfloat16)
    y, dx = train(x, dy)(layers[OURS])
    assert_product("64×64 forward", y, x, w, TOLERANCE[torch.bfloat16])
    assert_product("64×64 dX", dx, dy, w.T, TOLERANCE[torch.bfloat16])

    def caller(layer: nn.Module) -> Callable[[], object]:
        step = train(x, dy)
        if backward:
            return lambda: step(layer)
        return lambda: layer(x)

    return Case({name: caller(layer) for name, layer in layers.items()}, threads=1)
