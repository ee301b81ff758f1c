"""An optimiser's step on a GPU, bf16 parameters and gradients: a LoRA set, and one large tensor."""

from collections.abc import Iterator
from functools import partial

import torch

from cuda_clock import HOST, KERNELS
from cuda_device import copies_past_l2
from cuda_harness import CudaCase
from cuda_peers import add_peer
from goals import BNB, LORA_SET, TINY_SET
from harness import OURS, Work
from optim_kinds import ADAMW, Kind, torch_adamw
from optim_steps import PEERS_MAY_MISS, Problem, one_copy
from rows_optim import YARDSTICK, stochastic_and_plain, tiny_set

_TORCH = "torch fused, bf16 state"


def works(device: torch.device, shrink: int = 1, kinds: tuple[Kind, ...] = ADAMW) -> Iterator[Work]:
    """`shrink`: sets this many times smaller, for a CPU."""
    pairs, single = 224 // shrink, 2**24 // shrink
    sets = {
        LORA_SET: [(16, 4096 // shrink), (4096 // shrink, 16)] * pairs,
        "one tensor, 16.8 M": [(single,)],
    }
    for size, shapes in sets.items():
        for kind in kinds:
            for suffix, clock in (("", KERNELS), (", with the host", HOST)):
                yield Work(
                    f"{kind.name}{suffix}", size, partial(_with_peers, kind, shapes, clock, device)
                )


def more_works(device: torch.device, shrink: int, kinds: tuple[Kind, ...]) -> Iterator[Work]:
    """What bench_optim.py measures beyond that: tiny tensors, and how parameters are rounded."""
    for kind in kinds:
        yield Work(
            f"call overhead, {kind.name} step",
            TINY_SET,
            partial(_with_peers, kind, tiny_set(shrink), HOST, device, is_tiny=True),
        )
    for kind in kinds:
        yield Work(
            f"{kind.name}, stochastic rounding",
            "one tensor, 16.8 M",
            partial(_stochastic, kind, 2**24 // shrink, device),
        )


def _with_peers(
    kind: Kind, shapes: list[tuple], clock: str, device: torch.device, is_tiny: bool = False
) -> CudaCase:
    copies = one_copy if is_tiny else partial(copies_past_l2, device=device)
    problem = Problem(kind, shapes, torch.bfloat16, device, copies=copies)
    settings = {"min_8bit_size": 0} if is_tiny and kind.bits == 8 else {}
    ours = problem.round_of_ours(OURS, **settings)
    case = CudaCase({OURS: ours}, clock=clock, bytes_moved=problem.moved_bytes)
    add_peer(
        case.contenders,
        case.notes,
        BNB,
        lambda: problem.round_of(BNB, lambda p: kind.bitsandbytes(p, **settings)),
    )
    name = _TORCH if kind.algorithm == "AdamW" else YARDSTICK
    check = problem.check_that_most_fit(PEERS_MAY_MISS, ADAMW[0])
    add_peer(
        case.contenders,
        case.notes,
        name,
        lambda: problem.round_of(name, lambda p: torch_adamw(p, fused=True), check),
    )
    return case


def _stochastic(kind: Kind, elements: int, device: torch.device) -> CudaCase:
    copies = partial(copies_past_l2, device=device)
    problem, rounds = stochastic_and_plain(kind, elements, device, copies)
    return CudaCase(rounds, clock=KERNELS, bytes_moved=problem.moved_bytes)
