"""The optimisers beside torch's and bitsandbytes': steps of all kinds, rounding, paging.

What is timed is checked first, against fp64. See docs/benchmarks.md.

python benchmarks/bench_optim.py [--quick] [--rows REGEX] [--isa SET] [--goals] [--json FILE]
python benchmarks/bench_optim.py --device cuda [--quick] [--rows REGEX] [--goals] [--json FILE]
python benchmarks/bench_optim.py --markdown FILE.json [FILE.json ...]
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import cpu_program
import cuda_program
import cuda_report
import report
import rows_cuda_optim
import rows_cuda_optim_paging
import rows_cuda_paging
import rows_optim
import rows_optim_paging
from harness import Work
from optim_kinds import KINDS

_SECONDS = {"cpu": 1.0, "cuda": 0.1}


def cpu_works(folder: Path, shrink: int = 1) -> Iterator[Work]:
    """`folder`: where state is paged to; `shrink`: sizes this many times smaller."""
    yield from rows_optim.works(shrink)
    yield from rows_optim_paging.works(folder, shrink)


def cuda_works(device: torch.device, folder: Path, shrink: int = 1) -> Iterator[Work]:
    """The same on a GPU; on CPU tensors they run, and measure nothing."""
    yield from rows_cuda_optim.works(device, shrink, KINDS)
    yield from rows_cuda_optim.more_works(device, shrink, KINDS)
    yield from rows_cuda_paging.works(device)
    yield from rows_cuda_optim_paging.works(device, folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu_program.add_options(parser)
    cpu_program.add_limit_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time")
    parser.add_argument(
        "--shrink", type=int, default=1, metavar="N", help="sizes N times smaller, on the CPU"
    )
    parser.add_argument(
        "--folder", type=Path, help="where state is paged to on the CPU; by default the system's"
    )
    cuda_program.add_budget_option(parser)
    parser.set_defaults(seconds=None)
    arguments = parser.parse_args()
    if arguments.seconds is None:
        arguments.seconds = _SECONDS[arguments.device]
    if arguments.quick:
        arguments.seconds /= 4
    if arguments.shrink < 1 or (arguments.shrink > 1 and arguments.device == "cuda"):
        parser.error(f"--shrink: {arguments.shrink}, want a number of at least 1, on the CPU")
    return arguments


def main() -> int:
    """0: done; 1: with --goals one was missed; and bench_cuda.py's on a GPU."""
    arguments = parse_arguments()
    if arguments.markdown:
        header, rows = report.read_rows(arguments.markdown)
        if "gpu" in header:
            print(cuda_report.markdown(header, rows))
        else:
            print(report.markdown(header, rows, arguments.goals))
        return 0
    device = torch.device(arguments.device)
    reason = "" if arguments.list else cuda_program.why_not(device)
    if reason:
        print(f"bench_optim.py: {reason}", file=sys.stderr)
        return 2
    if device.type == "cpu":
        cpu_program.restart(arguments)
    with tempfile.TemporaryDirectory(prefix="bench_optim_", dir=arguments.folder) as name:
        folder, is_cuda = Path(name), device.type == "cuda"
        works = cuda_works(device, folder) if is_cuda else cpu_works(folder, arguments.shrink)
        works = [work for work in works if re.search(arguments.rows, work.name)]
        if arguments.list or not works:
            print("\n".join(work.name for work in works) or "no such row; --list shows them")
            return 0
        if is_cuda:
            return cuda_program.run(works, device, arguments)
        cpu_program.run(works, arguments, has_limits=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
