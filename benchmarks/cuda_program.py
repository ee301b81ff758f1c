"""What the programs that measure on a GPU share: options, and the way from rows to a report."""

import argparse
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import cuda_device
import cuda_peers
import cuda_report
import qlora_native
import report
from cuda_harness import run_work, try_work
from harness import Row, Work


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", metavar="REGEX", default="", help="only works whose name has it")
    parser.add_argument("--list", action="store_true", help="print the works and end")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contender of a row")
    add_budget_option(parser)
    parser.add_argument("--goals", action="store_true", help="exit with 1 if one is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as they come")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="FILE", help="print as a table")


def add_budget_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no row is begun"
    )


def why_not(device: torch.device) -> str:
    """Why there is nothing to measure, or nothing."""
    if device.type == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not qlora_native.build_info()["cuda"]:
        return "this build of qlora_native has no CUDA backend"
    return ""


def run(works: Iterable[Work], device: torch.device, arguments: argparse.Namespace) -> int:
    """Measure, print and write the rows; the exit status.

    0: done; 1: a row failed, or with --goals one was missed; 2: there is no such row.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    limits = cuda_device.measure_limits(device, 4 * arguments.seconds)
    failures: dict[str, str] = {}
    not_begun: list[str] = []
    header = report.describe_run(
        limits,
        gpu=cuda_device.describe(device),
        missing_peers=cuda_peers.MISSING,
        failures=failures,
        not_begun=not_begun,
    )
    print(limits.describe(), flush=True)
    rows: list[Row] = []
    for work in works:
        if not re.search(arguments.rows, work.name):
            continue
        if time.perf_counter() - start > arguments.budget:
            not_begun.append(work.name)
            continue
        row, failure = try_work(lambda work=work: run_work(work, limits, device, arguments.seconds))
        if row is None:
            failures[work.name] = failure
            print(f"{work.name} | FAILED: {failure}", flush=True)
            if _is_lost(device):
                failures["all that follows"] = "the GPU answers no more after this failure"
                break
            continue
        rows.append(row)
        print(" | ".join(cuda_report.cells(row)), flush=True)
        if arguments.json:  # now, so that a run that is cut short leaves what it has
            report.write_json(arguments.json, header, rows)
    if not rows and not failures and not not_begun:
        print(f"no row matches {arguments.rows!r}; --list shows them", file=sys.stderr)
        return 2
    print(f"\n{cuda_report.markdown(header, rows)}")
    if arguments.json:
        report.write_json(arguments.json, header, rows)
    is_missed = any(not verdict.met for row in rows for verdict in row.verdicts)
    return 1 if failures or (arguments.goals and is_missed) else 0


def _is_lost(device: torch.device) -> bool:
    """Whether a failure, such as an access outside of memory, has ended all use of the GPU."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
