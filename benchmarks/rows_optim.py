"""An optimiser's step on the CPU: one large tensor, a LoRA set, tiny tensors, bf16 parameters."""

import warnings
from collections.abc import Iterator

import torch

from cuda_clock import Round
from cuda_peers import add_peer, bitsandbytes
from goals import BNB, LORA_SET, ONE_TENSOR, TINY_SET, TORCH_FUSED, TORCH_FUSED_32
from harness import OURS, Case, Work, copies_past_l3, in_turn
from optim_kinds import ADAMW, KINDS, Kind, torch_adamw
from optim_steps import PEERS_MAY_MISS, Copies, Make, Problem, one_copy

YARDSTICK = "torch fused AdamW (yardstick)"  # torch has no Lion
_ELEMENTS = 2**24
_SMALL_RATE = 1e-5  # a step of it is far less than a last place of bf16 parameters


def works(shrink: int = 1) -> Iterator[Work]:
    """Every row; `shrink`: sizes this many times smaller, to see that the rows run."""
    for kind in KINDS:
        yield one_tensor(kind, shrink)
    for kind in KINDS:
        shapes = lora_set(shrink)
        yield Work(kind.name, sized(LORA_SET, shrink), lambda k=kind, s=shapes: _with_peers(k, s))
    for kind in KINDS:
        shapes = tiny_set(shrink)
        yield Work(
            f"call overhead, {kind.name} step",
            sized(TINY_SET, shrink),
            lambda k=kind, s=shapes: _tiny(k, s),
        )
    for kind in KINDS:
        yield Work(
            f"{kind.name}, stochastic rounding",
            sized("16.8 M bf16", shrink),
            lambda k=kind: _stochastic(k, _ELEMENTS // shrink),
        )


def one_tensor(kind: Kind, shrink: int = 1) -> Work:
    shapes = [(_ELEMENTS // shrink,)]
    return Work(kind.name, sized(ONE_TENSOR, shrink), lambda: _with_peers(kind, shapes))


def lora_set(shrink: int) -> list[tuple[int, ...]]:
    """Both factors of 224 layers of 4096 × 4096, r = 16."""
    return [(4096, 16), (16, 4096)] * max(1, 224 // shrink)


def tiny_set(shrink: int) -> list[tuple[int, ...]]:
    return [(64,)] * max(1, 448 // shrink)


def sized(size: str, shrink: int) -> str:
    """A size that was made smaller says so: no goal is about it."""
    return size if shrink == 1 else f"{size} / {shrink}"


def _with_peers(kind: Kind, shapes: list[tuple[int, ...]]) -> Case:
    problem = Problem(kind, shapes)
    rounds = {OURS: problem.round_of_ours(OURS)}
    notes: list[str] = []
    _add_torch(problem, rounds, notes)
    _add_bitsandbytes(problem, rounds, notes)
    if len(shapes) > 1:
        _add_bitsandbytes(problem, rounds, notes, paged=True)
    return _case(problem, rounds, notes)


def _tiny(kind: Kind, shapes: list[tuple[int, ...]]) -> Case:
    problem = Problem(kind, shapes, copies=one_copy)
    settings = {"min_8bit_size": 0} if kind.bits == 8 else {}
    rounds = {OURS: problem.round_of_ours(OURS, **settings)}
    notes: list[str] = []
    _add_torch(problem, rounds, notes)
    _add_bitsandbytes(problem, rounds, notes, **settings)
    case = _case(problem, rounds, notes)
    case.bytes_moved = 0  # of no account
    return case


def stochastic_and_plain(
    kind: Kind, elements: int, device: torch.device, copies: Copies
) -> tuple[Problem, dict[str, Round]]:
    """One tensor in bf16: ours with stochastic rounding, and without."""
    problem = Problem(kind, [(elements,)], torch.bfloat16, device, _SMALL_RATE, copies)
    rounds = {
        OURS: problem.round_of_ours(
            OURS, problem.check_stochastic_rounding, stochastic_rounding=True
        ),
        # What is half-way between two numbers may be rounded otherwise than the reference is.
        "plain rounding": problem.round_of_ours(
            "plain rounding", problem.check_that_most_fit((0.25, 0.02))
        ),
    }
    return problem, rounds


def _stochastic(kind: Kind, elements: int) -> Case:
    problem, rounds = stochastic_and_plain(kind, elements, torch.device("cpu"), copies_past_l3)
    return _case(problem, rounds, [])


def _add_torch(problem: Problem, rounds: dict[str, Round], notes: list[str]) -> None:
    kind = problem.kind
    name = TORCH_FUSED if kind.bits == 32 else TORCH_FUSED_32
    makes: dict[str, Make] = {
        name if kind.algorithm == "AdamW" else YARDSTICK: lambda p: torch_adamw(p, fused=True)
    }
    if kind == ADAMW[0]:
        makes["torch foreach"] = lambda p: torch_adamw(p, foreach=True)
    check = problem.check_that_most_fit(PEERS_MAY_MISS, ADAMW[0])
    for name, make in makes.items():
        add_peer(rounds, notes, name, lambda n=name, m=make: problem.round_of(n, m, check))


def _add_bitsandbytes(
    problem: Problem,
    rounds: dict[str, Round],
    notes: list[str],
    paged: bool = False,
    **settings: object,
) -> None:
    name = f"{BNB} paged" if paged else BNB
    if bitsandbytes is None:
        notes.append(f"without {name}: it cannot be imported")
        return

    def make_round() -> Round:
        with warnings.catch_warnings():
            # On the CPU its paged classes warn that they page nothing: then they are no contender.
            warnings.filterwarnings("error", message="Paged optimizers are not supported")
            return problem.round_of(
                name, lambda p: problem.kind.bitsandbytes(p, paged=paged, **settings)
            )

    add_peer(rounds, notes, name, make_round)


def _case(problem: Problem, rounds: dict[str, Round], notes: list[str]) -> Case:
    return Case(
        {name: in_turn(one.items, one.call) for name, one in rounds.items()},
        bytes_moved=problem.moved_bytes,
        bandwidth="copy",
        notes=notes,
    )
