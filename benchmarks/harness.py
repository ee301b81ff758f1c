"""Timing side by side: contenders run in turns in one process, and ratios are what is read."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeVar

import torch

from goals import Verdict, judge
from machine import available_bytes, l3_bytes
from probes import Limits

OURS = "qlora_native"
T = TypeVar("T")


@dataclass
class Case:
    """One piece of work, set up and checked: what to time, and what it must at least do.

    Attributes:
        contenders: name to callable; the first is ours.
        bytes_moved: read and written by a call that touches everything once; against `bandwidth`.
        bandwidth: "read" or "copy"; "file": of no limit that is measured.
        operations: floating-point operations of a call, done on `dtype` ("bf16", "fp32").
        threads: of torch and ours; None: as they are.
        notes: on contenders that are missing.
    """

    contenders: dict[str, Callable[[], object]]
    bytes_moved: int = 0
    bandwidth: str = "read"
    operations: float = 0
    dtype: str = "bf16"
    threads: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """A row before it is run: `key` and `m` are what the goals know it by."""

    key: str
    size: str
    prepare: Callable[[], Case]
    m: int | None = None

    @property
    def name(self) -> str:
        """What the table shows and --rows searches."""
        tokens = "" if self.m is None else f", m = {self.m}"
        return f"{self.key}{tokens}, {self.size}"


@dataclass(frozen=True)
class Times:
    """Of one call, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int


@dataclass
class Row:
    """The result of a Work: times by contender, ours first, and ours as a share of the limit.

    Attributes:
        bytes_moved, operations: of one call, as of its Case.
        notes: on how it was measured, and on contenders that are missing.
    """

    work: str
    key: str
    m: int | None
    size: str
    times: dict[str, Times]
    limit: str | None = None
    share_of_limit: float | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    bytes_moved: int = 0
    operations: float = 0
    notes: list[str] = field(default_factory=list)

    def ratio(self, contender: str) -> float:
        """How many times our time the contender takes."""
        return self.times[contender].median_ms / self.times[OURS].median_ms


def restart_with(settings: dict[str, str]) -> None:
    """Run this program again with these environment variables, unless it has them."""
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


# By default malloc gives a large tensor back to the system, and the next pays for fresh pages: more
# than decoding into it does.
WARM_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def copies_past_l3(make: Callable[[], T], bytes_each: int) -> list[T]:
    """As many as do not fit into the last-level cache together, so that memory delivers each.

    An eighth more than fits; fewer where a tenth of the free memory does not hold so many.
    """
    wanted = min(1.125 * l3_bytes(), available_bytes() / 10)
    return [make() for _ in range(max(1, -int(-wanted // bytes_each)))]


def in_turn(items: Sequence[T], call: Callable[[T], Any]) -> Callable[[], Any]:
    """A callable that passes the items round."""
    ring = cycle(items)
    return lambda: call(next(ring))


def time_contenders(
    contenders: dict[str, Callable[[], object]], seconds: float, settle: float
) -> dict[str, Times]:
    """Time callables in turns for about `seconds` each, at least 5 turns.

    A turn is as many calls as take 20 milliseconds. Before it comes a pause of `settle` seconds,
    in which the threads of the contender before fall asleep (OpenMP's spin for some milliseconds),
    and, where a call is short, one that is not timed and wakes this contender's own.
    """
    turn_seconds, short_seconds = 20e-3, 20e-3
    calls = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        duration = max(time.perf_counter() - start, 1e-7)
        calls[name] = (max(1, round(turn_seconds / duration)), duration < short_seconds)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    spent, turns = 0.0, 0
    while spent < seconds * len(contenders) or turns < 5:
        for name, call in contenders.items():
            count, is_short = calls[name]
            time.sleep(settle)
            if is_short:
                call()
            for _ in range(count):
                start = time.perf_counter()
                call()
                duration = time.perf_counter() - start
                samples[name].append(1e3 * duration)
                spent += duration
        turns += 1
    return {name: summarise(times) for name, times in samples.items()}


def summarise(milliseconds: list[float]) -> Times:
    """Median, 20th and 80th percentile, of at least two."""
    quantiles = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Times(statistics.median(milliseconds), quantiles[0], quantiles[3], len(milliseconds))


def run_work(work: Work, limits: Limits | None, isa: str, seconds: float, settle: float) -> Row:
    """Set a row up, which checks what is to be timed, and time it."""
    case = work.prepare()
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    times = time_contenders(case.contenders, seconds, settle)
    torch.set_num_threads(threads)
    row = Row(work.name, work.key, work.m, work.size, times)
    row.bytes_moved, row.operations, row.notes = case.bytes_moved, case.operations, case.notes
    has_limit = case.bandwidth != "file" and (case.bytes_moved or case.operations)
    if limits is not None and has_limit:
        bandwidth = limits.read if case.bandwidth == "read" else limits.copy
        instruction, peak = limits.peak(isa, case.dtype)
        # What takes longer at best is the limit: moving the bytes or doing the arithmetic.
        at_best = {
            f"{case.bandwidth} bandwidth": case.bytes_moved / bandwidth,
            instruction: case.operations / peak if peak else 0.0,
        }
        row.limit = max(at_best, key=lambda name: at_best[name])
        row.share_of_limit = 1e3 * at_best[row.limit] / times[OURS].median_ms
    row.verdicts = judge(row, isa)
    return row
