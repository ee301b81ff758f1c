"""An optimiser's step on 16.8 M fp32 parameters."""

from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import torch
from torch import nn

import qlora_native as q
from checks import assert_close
from harness import OURS, Case, Work, copies_past_l3, in_turn

ELEMENTS = 2**24
_SIZE = "16.8 M fp32"
_RATE, _DECAY = 1e-3, 1e-2
_Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def works() -> Iterator[Work]:
    yield Work("AdamW 32-bit", _SIZE, _adamw32)
    yield Work("AdamW 8-bit", _SIZE, _adamw8)


def _adamw32() -> Case:
    contenders: dict[str, _Make] = {
        OURS: lambda p: q.PagedAdamW(p, lr=_RATE, weight_decay=_DECAY),
        "torch fused": lambda p: torch.optim.AdamW(p, _RATE, weight_decay=_DECAY, fused=True),
        "torch foreach": lambda p: torch.optim.AdamW(p, _RATE, weight_decay=_DECAY, foreach=True),
        "bitsandbytes": lambda p: bnb.optim.AdamW32bit(p, _RATE, weight_decay=_DECAY),
    }
    # Parameter and both moments are read and written, the gradient is read.
    return _case(contenders, state_bytes=8, moved_bytes=28, tolerance=1e-6)


def _adamw8() -> Case:
    contenders: dict[str, _Make] = {
        OURS: lambda p: q.PagedAdamW8bit(p, lr=_RATE, weight_decay=_DECAY),
        "torch fused, 32-bit": lambda p: torch.optim.AdamW(
            p, _RATE, weight_decay=_DECAY, fused=True
        ),
        "bitsandbytes": lambda p: bnb.optim.AdamW8bit(p, _RATE, weight_decay=_DECAY),
    }
    # A byte and 1/64 a moment, read and written.
    return _case(contenders, state_bytes=2, moved_bytes=16, tolerance=1e-3)


def _case(
    contenders: dict[str, _Make], state_bytes: int, moved_bytes: int, tolerance: float
) -> Case:
    rings = {
        name: copies_past_l3(lambda make=make: _stepper(make), (8 + state_bytes) * ELEMENTS)
        for name, make in contenders.items()
    }
    for name, ring in rings.items():
        parameter, step = ring[0]
        step(), step()
        reference = _two_steps_in_fp64()
        limit = tolerance if name == OURS else max(tolerance, 1e-5)
        assert_close(f"{name}: AdamW, two steps", parameter.detach(), reference, limit)
    return Case(
        {name: in_turn(ring, lambda one: one[1]()) for name, ring in rings.items()},
        bytes_moved=moved_bytes * ELEMENTS,
        bandwidth="copy",
    )


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(ELEMENTS, generator=generator) for _ in range(2))


def _stepper(make: _Make) -> tuple[nn.Parameter, Callable[[], object]]:
    start, gradient = _inputs()
    parameter = nn.Parameter(start)
    parameter.grad = gradient
    return parameter, make([parameter]).step


def _two_steps_in_fp64() -> torch.Tensor:
    """AdamW (Loshchilov & Hutter 2019) as published; the gradient is the same in both steps."""
    p, g = (tensor.double() for tensor in _inputs())
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in (1, 2):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p *= 1 - _RATE * _DECAY
        p -= _RATE * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return p
