"""What Hugging Face's libraries do with this one, beside what they do with bitsandbytes.

What is timed is checked first; a wrong result ends the run. See docs/benchmarks.md.

python benchmarks/bench_hf.py [--rows REGEX] [--isa SET] [--goals] [--json FILE]
"""

import argparse
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is fetched

import torch
import transformers

import report
import rows_from_pretrained
from harness import Row, restart_with, run_work
from isa import ISA_SETTINGS, isa_environment
from machine import OthersCpu, require_quiet


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", metavar="REGEX", default="", help="only works whose name has it")
    parser.add_argument("--list", action="store_true", help="print the works and end")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender of a row")
    parser.add_argument("--settle", type=float, default=0.02, help="pause before each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=ISA_SETTINGS, help="of ours and of torch's")
    parser.add_argument("--goals", action="store_true", help="print which goals were met")
    parser.add_argument("--force", action="store_true", help="run on a machine that is in use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    restart_with(isa_environment(arguments.isa))
    works = [w for w in rows_from_pretrained.works() if re.search(arguments.rows, w.name)]
    if arguments.list or not works:
        print("\n".join(work.name for work in works) or "no such row; --list shows them")
        return
    require_quiet(arguments.force)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    header = report.describe_run()
    others = OthersCpu()
    rows: list[Row] = []
    for i, work in enumerate(works, start=1):
        print(f"[{i}/{len(works)}] {work.name} ...", file=sys.stderr, flush=True)
        rows.append(run_work(work, None, str(header["isa"]), arguments.seconds, arguments.settle))
        print(" | ".join(report.cells(rows[-1], arguments.goals)), flush=True)
    report.finish(header, rows, others, arguments.goals, arguments.json)


if __name__ == "__main__":
    main()
