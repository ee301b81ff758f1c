"""The CPU backend beside torch and bitsandbytes: every operation, and the machine's limits.

What is timed is checked first; a wrong result ends the run. See docs/benchmarks.md.

python benchmarks/bench_cpu.py [--quick] [--rows REGEX] [--isa SET] [--goals] [--json FILE]
python benchmarks/bench_cpu.py --markdown FILE.json [FILE.json ...]
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import report
import rows_adamw
import rows_adapters
import rows_codec
import rows_linear
import rows_lora
import rows_overhead
from harness import WARM_ALLOCATOR, Row, Work, restart_with, run_work
from isa import ISA_SETTINGS, isa_environment
from machine import OthersCpu, require_quiet
from probes import measure_limits
from weights import Weights

_SHAPES = ("4096x4096", "4096x14336")


def all_works(shapes: list[str]) -> Iterator[Work]:
    """Every row, by shape, so that only one shape's weights exist at a time."""
    for shape in shapes:
        n, k = (int(size) for size in shape.split("x"))
        weights = Weights(n, k)
        for module in (rows_codec, rows_linear, rows_lora, rows_adapters):
            yield from module.works(weights)
    yield from rows_adamw.works()
    yield from rows_overhead.works()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", metavar="REGEX", default="", help="only works whose name has it")
    parser.add_argument("--list", action="store_true", help="print the works and end")
    parser.add_argument("--shapes", nargs="+", metavar="NxK", default=None)
    parser.add_argument("--quick", action="store_true", help="one shape, a quarter of the time")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a row")
    parser.add_argument("--settle", type=float, default=0.02, help="pause before each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=ISA_SETTINGS, help="of ours and of torch's")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="let malloc give large pieces back, as it does unless told; by default it keeps them",
    )
    parser.add_argument("--goals", action="store_true", help="print which goals were met")
    parser.add_argument("--no-limits", action="store_true", help="do not measure the machine")
    parser.add_argument("--force", action="store_true", help="run on a machine that is in use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="FILE", help="print as a table")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds /= 4
    arguments.shapes = arguments.shapes or list(_SHAPES[: 1 if arguments.quick else None])
    for shape in arguments.shapes:
        if not re.fullmatch(r"\d+x\d+", shape):
            parser.error(f"--shapes: {shape!r}, want out_features x in_features, like 4096x4096")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.markdown:
        print(report.markdown(*report.read_rows(arguments.markdown), goals=arguments.goals))
        return
    allocator = {} if arguments.default_allocator else WARM_ALLOCATOR
    restart_with(allocator | isa_environment(arguments.isa))
    works = [w for w in all_works(arguments.shapes) if re.search(arguments.rows, w.name)]
    if arguments.list or not works:
        print("\n".join(work.name for work in works) or "no such row; --list shows them")
        return
    require_quiet(arguments.force)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    limits = None if arguments.no_limits else measure_limits(arguments.threads)
    header = report.describe_run(
        limits, allocator="default" if arguments.default_allocator else "warm"
    )
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


if __name__ == "__main__":
    main()
