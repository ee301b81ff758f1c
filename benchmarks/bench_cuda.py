"""The CUDA backend beside bitsandbytes, PEFT and torch, and beside what the GPU can do at best.

What is timed is checked first; a row that is wrong or fails is named and makes the exit status 1.
See docs/benchmarks.md.

python benchmarks/bench_cuda.py [--quick] [--rows REGEX] [--goals] [--json FILE]
python benchmarks/bench_cuda.py --markdown FILE.json
python benchmarks/bench_cuda.py --device cpu --quick   # every row runs; nothing is measured
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import cuda_device
import cuda_peers
import cuda_report
import qlora_native
import report
import rows_cuda_adamw
import rows_cuda_codec
import rows_cuda_linear
import rows_cuda_lora
import rows_cuda_paging
from cuda_harness import run_work, try_work
from cuda_weights import CudaWeights
from harness import Row, Work

_SHAPES = ("4096x4096", "4096x14336")
_CPU_SHAPES = ("128x256",)  # to see that a row runs
_CPU_TOKENS, _CPU_SHRINK = (1, 16), 64


def all_works(shapes: list[str], device: torch.device, quick: bool) -> Iterator[Work]:
    """Every row, by shape, so that only one shape's weights exist at a time.

    What has no shape comes after the first one: a run whose time is short has some of everything.
    """
    tokens = rows_cuda_linear.QUICK_TOKENS if quick else rows_cuda_linear.TOKENS
    lora_tokens, shrink = rows_cuda_lora.TOKENS, 1
    if device.type == "cpu":
        tokens, lora_tokens, shrink = _CPU_TOKENS, _CPU_TOKENS[-1:], _CPU_SHRINK
    for i, shape in enumerate(shapes):
        n, k = (int(size) for size in shape.split("x"))
        weights = CudaWeights(n, k, device)
        yield from rows_cuda_codec.works(weights)
        yield from rows_cuda_linear.works(weights, tokens)
        yield from rows_cuda_lora.works(weights, lora_tokens)
        if i == 0:
            yield from rows_cuda_adamw.works(device, shrink)
            yield from rows_cuda_paging.works(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", metavar="REGEX", default="", help="only works whose name has it")
    parser.add_argument("--list", action="store_true", help="print the works and end")
    parser.add_argument("--shapes", nargs="+", metavar="NxK", default=None)
    parser.add_argument("--quick", action="store_true", help="one shape, fewer tokens and turns")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contender of a row")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no row is begun"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--goals", action="store_true", help="exit with 1 if one is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as they come")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="FILE", help="print as a table")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds /= 4
    known = _SHAPES if arguments.device == "cuda" else _CPU_SHAPES
    arguments.shapes = arguments.shapes or list(known[: 1 if arguments.quick else None])
    for shape in arguments.shapes:
        if not re.fullmatch(r"\d+x\d+", shape):
            parser.error(f"--shapes: {shape!r}, want out_features x in_features, like 4096x4096")
    return arguments


def why_not(device: str) -> str:
    """Why there is nothing to measure, or nothing."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not qlora_native.build_info()["cuda"]:
        return "this build of qlora_native has no CUDA backend"
    return ""


def main() -> int:
    """0: done; 1: a row failed, or with --goals one was missed; 2: there is nothing to measure."""
    arguments = parse_arguments()
    if arguments.markdown:
        print(cuda_report.markdown(*report.read_rows(arguments.markdown)))
        return 0
    device = torch.device(arguments.device)
    if arguments.list:
        works = all_works(arguments.shapes, device, arguments.quick)
        print("\n".join(work.name for work in works))
        return 0
    reason = why_not(arguments.device)
    if reason:
        print(f"bench_cuda.py: {reason}; --device cpu runs the rows without one", file=sys.stderr)
        return 2
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
    for work in all_works(arguments.shapes, device, arguments.quick):
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


if __name__ == "__main__":
    sys.exit(main())
