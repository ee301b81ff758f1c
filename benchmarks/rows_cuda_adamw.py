"""An optimiser's step on a GPU, bf16 parameters and gradients: a LoRA set, and one large tensor."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import qlora_native as q
from checks import assert_close
from cuda_clock import HOST, KERNELS, Round
from cuda_device import copies_past_l2
from cuda_harness import CudaCase
from cuda_peers import add_peer
from cuda_peers import bitsandbytes as bnb
from goals import BNB, LORA_SET
from harness import OURS, Work

_RATE, _DECAY = 1e-2, 1e-2
_TORCH = "torch fused, bf16 state"
# Read and written a parameter: p, g in bf16, two moments in fp32, or a byte and 1/64 each.
_BYTES = {"32": 2 + 2 + 2 + 4 * 4, "8": 2 + 2 + 2 + 4 * (1 + 4 / 256)}
# Of the largest parameter, which is ten steps wide: a step rounds once to bf16. Peers only have to
# do the same work: some keep their state in fewer bits.
_TOLERANCE, _PEER_TOLERANCE = 2**-8, 2**-2
_Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def works(device: torch.device, shrink: int = 1) -> Iterator[Work]:
    """`shrink`: sets this many times smaller, for a CPU."""
    pairs, single = 224 // shrink, 2**24 // shrink
    sets = {
        LORA_SET: [(16, 4096 // shrink), (4096 // shrink, 16)] * pairs,
        "one tensor, 16.8 M": [(single,)],
    }
    for size, shapes in sets.items():
        for bits in ("32", "8"):
            for suffix, clock in (("", KERNELS), (", with the host", HOST)):
                yield Work(
                    f"AdamW {bits}-bit{suffix}",
                    size,
                    lambda s=shapes, b=bits, c=clock: _adamw(s, b, c, device),
                )


def _adamw(shapes: list[tuple], bits: str, clock: str, device: torch.device) -> CudaCase:
    count = sum(torch.Size(shape).numel() for shape in shapes)
    kinds = {"32": q.PagedAdamW, "8": q.PagedAdamW8bit}

    def round_of(make: _Make) -> Round:
        sets = copies_past_l2(
            lambda: _Steps(shapes, make, device), int(_BYTES[bits] * count), device
        )
        return Round(sets, lambda one: one())

    def check(name: str, one: Round, tolerance: float) -> None:
        steps = one.items[0]
        steps(), steps()
        for i in {0, len(shapes) - 1}:
            reference = _two_steps_in_fp64(shapes[i], i, device)
            if name == OURS and bits == "8":
                reference = _two_steps_on_the_cpu(shapes[i], i, device, make_ours)
            assert_close(f"{name}: AdamW", steps.parameters[i].detach(), reference, tolerance)

    def make_ours(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        return kinds[bits](p, lr=_RATE, weight_decay=_DECAY)

    ours = round_of(make_ours)
    check(OURS, ours, _TOLERANCE)
    case = CudaCase({OURS: ours}, clock=clock, bytes_moved=int(_BYTES[bits] * count))

    def theirs(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        kind = bnb.optim.AdamW32bit if bits == "32" else bnb.optim.AdamW8bit
        return kind(p, _RATE, weight_decay=_DECAY)

    def torchs(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, _RATE, weight_decay=_DECAY, fused=True)

    for name, make in ((BNB, theirs), (_TORCH, torchs)):

        def make_round(name: str = name, make: _Make = make) -> Round:
            one = round_of(make)
            check(name, one, _PEER_TOLERANCE)
            return one

        add_peer(case.contenders, case.notes, name, make_round)
    return case


class _Steps:
    """A set of parameters with gradients that stay, and its optimiser: a call is a step."""

    def __init__(self, shapes: list[tuple], make: _Make, device: torch.device) -> None:
        self.parameters = []
        for i, shape in enumerate(shapes):
            start, gradient = _inputs(shape, i, device)
            parameter = nn.Parameter(start)
            parameter.grad = gradient
            self.parameters.append(parameter)
        self.optimizer = make(self.parameters)

    def __call__(self) -> None:
        self.optimizer.step()


def _inputs(shape: tuple, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    return tuple((0.02 * tensor).bfloat16() for tensor in drawn)


def _two_steps_on_the_cpu(shape: tuple, seed: int, device: torch.device, make: _Make) -> Tensor:
    """By the CPU backend, whose 8-bit state is tested against references of its own."""
    start, gradient = _inputs(shape, seed, device)
    parameter = nn.Parameter(start.cpu())
    parameter.grad = gradient.cpu()
    optimizer = make([parameter])
    optimizer.step(), optimizer.step()
    return parameter.detach().to(device)


def _two_steps_in_fp64(shape: tuple, seed: int, device: torch.device) -> Tensor:
    """AdamW (Loshchilov & Hutter 2019) as published, p in bf16; the gradient stays the same."""
    p, g = (tensor.double() for tensor in _inputs(shape, seed, device))
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in (1, 2):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p * (1 - _RATE * _DECAY)
        p = p - _RATE * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        p = p.bfloat16().double()
    return p
