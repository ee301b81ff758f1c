"""What Hugging Face's libraries do with this one, beside what they do with bitsandbytes.

What is timed is checked first; a wrong result ends the run. See docs/benchmarks.md.

python benchmarks/bench_hf.py [--rows REGEX] [--isa SET] [--goals] [--json FILE]
"""

import argparse
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is fetched

import transformers

import cpu_program
import rows_from_pretrained
from harness import restart_with
from isa import isa_environment


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu_program.add_options(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    restart_with(isa_environment(arguments.isa))
    works = [w for w in rows_from_pretrained.works() if re.search(arguments.rows, w.name)]
    if arguments.list or not works:
        print("\n".join(work.name for work in works) or "no such row; --list shows them")
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cpu_program.run(works, arguments, has_limits=False)


if __name__ == "__main__":
    main()
