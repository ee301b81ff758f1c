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
from collections.abc import Iterator

import torch

import cuda_program
import cuda_report
import report
import rows_cuda_codec
import rows_cuda_linear
import rows_cuda_lora
import rows_cuda_optim
import rows_cuda_paging
from cuda_weights import CudaWeights
from harness import Work

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
            yield from rows_cuda_optim.works(device, shrink)
            yield from rows_cuda_paging.works(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda_program.add_options(parser)
    parser.add_argument("--shapes", nargs="+", metavar="NxK", default=None)
    parser.add_argument("--quick", action="store_true", help="one shape, fewer tokens and turns")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds /= 4
    known = _SHAPES if arguments.device == "cuda" else _CPU_SHAPES
    arguments.shapes = arguments.shapes or list(known[: 1 if arguments.quick else None])
    for shape in arguments.shapes:
        if not re.fullmatch(r"\d+x\d+", shape):
            parser.error(f"--shapes: {shape!r}, want out_features x in_features, like 4096x4096")
    return arguments


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
    reason = cuda_program.why_not(device)
    if reason:
        print(f"bench_cuda.py: {reason}; --device cpu runs the rows without one", file=sys.stderr)
        return 2
    works = all_works(arguments.shapes, device, arguments.quick)
    return cuda_program.run(works, device, arguments)


if __name__ == "__main__":
    sys.exit(main())
