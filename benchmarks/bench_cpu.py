"""The CPU backend beside torch and bitsandbytes: every operation, and the machine's limits.

What is timed is checked first; a wrong result ends the run. See docs/benchmarks.md.

python benchmarks/bench_cpu.py [--quick] [--rows REGEX] [--isa SET] [--goals] [--json FILE]
python benchmarks/bench_cpu.py --markdown FILE.json [FILE.json ...]
"""

import argparse
import re
from collections.abc import Iterator

import cpu_program
import report
import rows_adapters
import rows_codec
import rows_linear
import rows_lora
import rows_optim
import rows_overhead
from harness import Work
from optim_kinds import ADAMW
from weights import Weights

_SHAPES = ("4096x4096", "4096x14336")


def all_works(shapes: list[str]) -> Iterator[Work]:
    """Every row, by shape, so that only one shape's weights exist at a time."""
    for shape in shapes:
        n, k = (int(size) for size in shape.split("x"))
        weights = Weights(n, k)
        for module in (rows_codec, rows_linear, rows_lora, rows_adapters):
            yield from module.works(weights)
    for kind in ADAMW:  # bench_optim.py has more of them
        yield rows_optim.one_tensor(kind)
    yield from rows_overhead.works()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu_program.add_options(parser)
    cpu_program.add_limit_options(parser)
    parser.add_argument("--shapes", nargs="+", metavar="NxK", default=None)
    parser.add_argument("--quick", action="store_true", help="one shape, a quarter of the time")
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
    cpu_program.restart(arguments)
    works = [w for w in all_works(arguments.shapes) if re.search(arguments.rows, w.name)]
    if arguments.list or not works:
        print("\n".join(work.name for work in works) or "no such row; --list shows them")
        return
    cpu_program.run(works, arguments, has_limits=True)


if __name__ == "__main__":
    main()
