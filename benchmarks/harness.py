"""Timing side by side: contenders run in turns in one process, and ratios are what is read."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

import qlora_native


def restart_with_warm_allocator() -> None:
    """Run this program again with an allocator that keeps what it has freed.

    By default malloc gives a large tensor back to the system, and the next pays for fresh pages:
    more than decoding into it does.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        settings = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


@dataclass
class Row:
    """One contender at one piece of work: milliseconds, and how many times faster `ours` was."""

    work: str
    contender: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ours_is_faster: float | None = field(default=None)


def time_contenders(
    work: str, contenders: dict[str, Callable[[], object]], seconds: float = 2.0
) -> list[Row]:
    """Time callables in turns for about `seconds` each, after two warm-up calls.

    The first contender is ours; the others' rows carry their time divided by ours.
    """
    for call in contenders.values():
        call(), call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < deadline or len(next(iter(samples.values()))) < 5:
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, times in samples.items():
        quantiles = statistics.quantiles(times, n=10)
        rows.append(Row(work, name, statistics.median(times), quantiles[1], quantiles[7]))
    for row in rows[1:]:
        row.ours_is_faster = row.median_ms / rows[0].median_ms
    return rows


def print_table(rows: list[Row]) -> None:
    """A Markdown table."""
    print("| Work | Contender | median ms | p20 | p80 | ours is faster by |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = "" if row.ours_is_faster is None else f"{row.ours_is_faster:.2f}×"
        print(
            f"| {row.work} | {row.contender} | {row.median_ms:.3f} | {row.p20_ms:.3f} "
            f"| {row.p80_ms:.3f} | {ratio} |"
        )


def parse_arguments(
    description: str, seconds: float = 2.0, threads: int | None = None
) -> argparse.Namespace:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="for each contender of a row"
    )
    parser.add_argument("--threads", type=int, default=threads or torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def write_json(path: Path, rows: list[Row]) -> None:
    """The rows with machine, commit and date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report = {
        "date": date.today().isoformat(),
        "commit": commit,
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": qlora_native.build_info(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
