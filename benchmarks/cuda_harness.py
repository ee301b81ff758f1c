"""A row on a GPU: what to time and how, the floor that it is held against, and the verdicts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cuda_clock import Round, time_rounds
from cuda_device import CudaLimits
from goals import CUDA_GOALS, judge
from harness import Case, Row, Work


@dataclass
class CudaCase(Case):
    """As Case, its contenders being Rounds.

    Attributes:
        clock: how it is timed; cuda_clock.py has the three.
    """

    contenders: dict[str, Round]
    bandwidth: str = "copy"
    clock: str = "graph"


def run_work(work: Work, limits: CudaLimits, device: torch.device, seconds: float) -> Row:
    """Set a row up, which checks what is to be timed, and time it."""
    case = work.prepare()
    times, remarks = time_rounds(case.contenders, device, case.clock, seconds)
    row = Row(work.name, work.key, work.m, work.size, times)
    row.bytes_moved, row.operations = case.bytes_moved, case.operations
    row.notes = case.notes + remarks
    row.limit, floor_seconds = limits.at_best(case)
    row.share_of_limit = 1e3 * floor_seconds / next(iter(times.values())).median_ms
    if device.type == "cuda":
        row.verdicts = judge(row, "", CUDA_GOALS)
    return row


def try_work(run: Callable[[], Row]) -> tuple[Row | None, str]:
    """A row, or why there is none: the run goes on after a row that fails or is wrong."""
    try:
        return run(), ""
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:300]}"
