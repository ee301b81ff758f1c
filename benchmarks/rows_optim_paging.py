"""An optimiser's step on the CPU whose state is in a file, beside state in ordinary memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from harness import OURS, Case, Work, in_turn
from optim_kinds import ADAMW, KINDS, Kind
from optim_steps import Problem
from rows_optim import sized

ORDINARY, PLAIN_LOOP = "ordinary memory", "plain loop over the file"
_TENSORS, _ELEMENTS = 8, 2**22  # of each tensor: 256 MiB of state in AdamW's 32 bits
_PAGE_BYTES, _SMALLEST_PAGE = 2**22, 2**20
_RESIDENT = 1 / 4


def works(folder: Path, shrink: int = 1) -> Iterator[Work]:
    """`folder`: where the files are."""
    for kind in KINDS:
        for is_partly in (False, True) if kind == ADAMW[0] else (True,):
            megabytes = _TENSORS * _ELEMENTS * kind.state_bytes / 2**20
            yield Work(
                f"{kind.name} paged to a file{', a quarter resident' * is_partly}",
                sized(f"{megabytes:.0f} MiB of state", shrink),
                partial(_paged, kind, is_partly, folder, shrink),
            )


def _paged(kind: Kind, is_partly: bool, folder: Path, shrink: int) -> Case:
    problem = Problem(kind, [(_ELEMENTS // shrink,)] * _TENSORS)
    page_bytes = max(_SMALLEST_PAGE, _PAGE_BYTES // shrink)
    settings: dict[str, object] = {"page_file": folder, "page_bytes": page_bytes}
    if is_partly:
        settings["resident_bytes"] = max(2 * page_bytes, int(_RESIDENT * problem.state_bytes))
    rounds = {
        OURS: problem.round_of_ours(OURS, **settings),
        ORDINARY: problem.round_of_ours(ORDINARY),
    }
    contenders = {name: in_turn(one.items, one.call) for name, one in rounds.items()}
    contenders[PLAIN_LOOP] = _PlainLoop(folder, problem.state_bytes, page_bytes)
    # The state comes in and goes out again.
    return Case(contenders, bytes_moved=2 * problem.state_bytes, bandwidth="file")


class _PlainLoop:
    """The same number of bytes in a mapped file, each read and written, a page at a time."""

    def __init__(self, folder: Path, bytes_: int, page_bytes: int) -> None:
        path = folder / "plain_loop"
        mapped = torch.from_file(str(path), shared=True, size=bytes_, dtype=torch.uint8)
        path.unlink()  # it goes with its last mapping
        self._pages = mapped.split(page_bytes)
        self()
        if not bool((mapped == 1).all()):
            raise SystemExit(f"WRONG: {PLAIN_LOOP}: a page was not written")

    def __call__(self) -> None:
        for page in self._pages:
            page.add_(1)
