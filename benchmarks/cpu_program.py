"""What the programs that measure on the CPU share: options, and the way from rows to a report."""

import argparse
import sys
from pathlib import Path

import torch

import report
from harness import WARM_ALLOCATOR, Row, Work, restart_with, run_work
from isa import ISA_SETTINGS, isa_environment
from machine import OthersCpu, require_quiet
from probes import measure_limits


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", metavar="REGEX", default="", help="only works whose name has it")
    parser.add_argument("--list", action="store_true", help="print the works and end")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a row")
    parser.add_argument("--settle", type=float, default=0.02, help="pause before each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=ISA_SETTINGS, help="of ours and of torch's")
    parser.add_argument("--goals", action="store_true", help="print which goals were met")
    parser.add_argument("--force", action="store_true", help="run on a machine that is in use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Of programs whose rows are held against the machine's limits."""
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="let malloc give large pieces back, as it does unless told; by default it keeps them",
    )
    parser.add_argument("--no-limits", action="store_true", help="do not measure the machine")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="FILE", help="print as a table")


def restart(arguments: argparse.Namespace) -> None:
    """With the environment that the options of add_limit_options ask for."""
    allocator = {} if arguments.default_allocator else WARM_ALLOCATOR
    restart_with(allocator | isa_environment(arguments.isa))


def run(works: list[Work], arguments: argparse.Namespace, has_limits: bool) -> None:
    """Measure, print and write the rows; exit with 1 if goals are asked for and one is missed.

    `has_limits`: the program has the options of add_limit_options.
    """
    require_quiet(arguments.force)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    limits, more = None, {}
    if has_limits:
        limits = None if arguments.no_limits else measure_limits(arguments.threads)
        more["allocator"] = "default" if arguments.default_allocator else "warm"
    header = report.describe_run(limits, **more)
    if has_limits:
        print(f"{header['isa']}; {limits.describe() if limits else 'limits not measured'}")
    others = OthersCpu()
    rows: list[Row] = []
    count = len(works)
    while works:
        work = works.pop(0)  # the list must not keep the weights of a shape that is done
        print(f"[{count - len(works)}/{count}] {work.name} ...", file=sys.stderr, flush=True)
        rows.append(run_work(work, limits, str(header["isa"]), arguments.seconds, arguments.settle))
        print(" | ".join(report.cells(rows[-1], arguments.goals)), flush=True)
    report.finish(header, rows, others, arguments.goals, arguments.json)
