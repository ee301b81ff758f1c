"""An optimiser's step on a GPU whose state is paged, beside the same bytes paged for no work."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cuda_clock import HOST
from cuda_device import copies_past_l2
from cuda_harness import CudaCase
from cuda_peers import add_peer
from goals import BNB, PREFETCH_LOOP
from harness import OURS, Work
from optim_kinds import ADAMW, Kind
from optim_steps import Problem
from rows_cuda_paging import plain_loop

ORDINARY = "ordinary memory"
_ELEMENTS = {"cuda": 2**27, "cpu": 2**19}  # 1 GiB of state in 32 bits
_TENSORS = 8
_PAGE_BYTES = {"cuda": 2**25, "cpu": 2**20}
_RESIDENT = 1 / 4
_STRATEGIES = {"cuda": ("managed", "pinned"), "cpu": ("file",)}


def works(device: torch.device, folder: Path) -> Iterator[Work]:
    """For each way in which the device can page: a part of the state resident, and all of it.

    `folder`: where a CPU, which pages to files, has them.
    """
    for kind in ADAMW:
        for strategy in _STRATEGIES[device.type]:
            for is_partly in (True, False):
                yield Work(
                    f"{kind.name} paged, {strategy}{', a quarter resident' * is_partly}",
                    f"{_ELEMENTS[device.type] * kind.state_bytes / 2**20:.0f} MiB of state",
                    partial(_paged, kind, strategy, is_partly, device, folder),
                )


def _paged(
    kind: Kind, strategy: str, is_partly: bool, device: torch.device, folder: Path
) -> CudaCase:
    shapes = [(_ELEMENTS[device.type] // _TENSORS,)] * _TENSORS
    copies = partial(copies_past_l2, device=device)
    problem = Problem(kind, shapes, torch.bfloat16, device, copies=copies)
    page_bytes = _PAGE_BYTES[device.type]
    settings: dict[str, Any] = {"page_file": folder} if strategy == "file" else {"paging": strategy}
    settings["page_bytes"] = page_bytes
    if is_partly:
        settings["resident_bytes"] = max(2 * page_bytes, int(_RESIDENT * problem.state_bytes))
    rounds = {
        OURS: problem.round_of_ours(OURS, **settings),
        ORDINARY: problem.round_of_ours(ORDINARY),
    }
    case = CudaCase(rounds, clock=HOST, bytes_moved=problem.moved_bytes)
    if is_partly:
        # The state comes in and goes out again, but for what stays.
        case.bytes_moved = int(2 * (1 - _RESIDENT) * problem.state_bytes)
        case.bandwidth = "link"
        rounds[PREFETCH_LOOP] = plain_loop(
            device,
            -(-problem.state_bytes // page_bytes) * page_bytes,
            page_bytes,
            strategy if device.type == "cuda" else "ordinary",
            settings["resident_bytes"],
        )
    add_peer(
        rounds,
        case.notes,
        f"{BNB} paged",
        lambda: problem.round_of(BNB, lambda p: kind.bitsandbytes(p, paged=True)),
    )
    return case
