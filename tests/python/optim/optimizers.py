"""The four optimisers, and what their tests do with them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_native import PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit
from qlora_native.optim.bitsandbytes_state import dynamic_map
from support import same_bits

BLOCK = 256  # elements of 8-bit state that share a scale
SHAPES = [(33, 65), (300,), (1,), (), (2, 3, 4), (0, 5), (20_000,)]

ADAMW = (PagedAdamW, PagedAdamW8bit)
LION = (PagedLion, PagedLion8bit)
IN_32_BITS = (PagedAdamW, PagedLion)
IN_8_BITS = (PagedAdamW8bit, PagedLion8bit)
ALL = (*ADAMW, *LION)

over_adamw = pytest.mark.parametrize("optimizer_class", ADAMW)
over_8_bits = pytest.mark.parametrize("optimizer_class", IN_8_BITS)
over_32_bits = pytest.mark.parametrize("optimizer_class", IN_32_BITS)
over_all = pytest.mark.parametrize("optimizer_class", ALL)


def moments_of(optimizer_class: type) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq") if optimizer_class in ADAMW else ("exp_avg",)


def in_8_bits(optimizer_class: type) -> dict[str, Any]:
    """Options with which an 8-bit optimiser keeps all state in 8 bits."""
    return {"min_8bit_size": 1} if optimizer_class in IN_8_BITS else {}


def make_parameters(
    dtype: torch.dtype = torch.float32, shapes: Iterable[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def clones(
    parameters: Iterable[nn.Parameter], dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in parameters]


def set_gradients(seed: int, *lists: list[nn.Parameter]) -> None:
    """The same random gradients, of sizes that vary from step to step, for each list."""
    generator = torch.Generator().manual_seed(seed)
    for group in zip(*lists, strict=True):
        g = torch.randn(group[0].shape, generator=generator) * 10.0 ** (-(seed % 5))
        for p in group:
            p.grad = g.to(group[0].dtype).to(p.dtype, copy=True)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of these seeds."""
    for step in steps:
        set_gradients(step, parameters_of(optimizer))
        optimizer.step()


def stepped(
    optimizer_class: type, parameters: Any, steps: int = 3, **options: Any
) -> torch.optim.Optimizer:
    """An optimiser that has taken steps 0, 1, ..."""
    optimizer = optimizer_class(parameters, **options)
    take_steps(optimizer, range(steps))
    return optimizer


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and all state."""
    parameters = parameters_of(optimizer)
    states = [v for p in parameters for v in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*parameters, *states)]


def same_snapshots(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def same_run(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether two optimisers have the same parameters and state, bit for bit."""
    return same_snapshots(snapshot(a), snapshot(b))


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@contextlib.contextmanager
def nothing_changes(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What happens inside leaves parameters, state and groups as they are, to the bit."""
    before, settings = snapshot(optimizer), settings_of(optimizer)
    ids = [id(p) for p in parameters_of(optimizer)]
    have_state = [bool(optimizer.state.get(p)) for p in parameters_of(optimizer)]
    yield
    assert [id(p) for p in parameters_of(optimizer)] == ids
    assert [bool(optimizer.state.get(p)) for p in parameters_of(optimizer)] == have_state
    assert same_snapshots(snapshot(optimizer), before)
    assert settings_of(optimizer) == settings


def is_in_pages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all that `state` shows is the memory of the optimiser's own pages."""
    slots = optimizer._pages.slots
    return all(
        value.data_ptr() == slots[id(p)].views[name].data_ptr()
        for p, state in optimizer.state.items()
        for name, value in state.items()
    )


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def decode(state: dict[str, Tensor], moment: str) -> Tensor:
    """A moment of 8-bit state as fp32."""
    codes = state[moment]
    absmax = state[f"{moment}_absmax"].repeat_interleave(BLOCK)[: codes.numel()]
    entries = dynamic_map(moment == "exp_avg")
    return (entries[codes.flatten().long()] * absmax).view(codes.shape)


# ---- state in several pages

# Three pages or more of each optimiser's state, with a parameter in all of them.
PAGED_SHAPES = [(300,), (1100, 1024), (5000,), (33, 65)]
PAGE_BYTES = 540_000
BUDGET = 1_100_000  # for two pages, and for what is small


def in_file(folder: Any, **options: Any) -> dict[str, Any]:
    """Options of an optimiser that has two pages in memory at a time, and all in a file."""
    return {"page_file": folder, "page_bytes": PAGE_BYTES, "resident_bytes": BUDGET, **options}
