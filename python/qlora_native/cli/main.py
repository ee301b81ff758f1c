"""Entry point: `qlora-native demo | train | merge | convert | info`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from qlora_native import build_info
from qlora_native.cli import arguments
from qlora_native.cli.errors import CommandError

EXTRA_PACKAGES = ("transformers", "safetensors", "tokenizers", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own); returns the exit code.

    0: done. 2: the request cannot be met, and stderr says why. Anything else that goes wrong is a
    fault of this program and keeps its traceback.
    """
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
        print(f"qlora-native {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="qlora-native", description="QLoRA, natively: fine-tune on a 4-bit base."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo|train|merge|convert|info"
    )

    demo = commands.add_parser(
        "demo",
        help="the whole of QLoRA on this machine in some minutes, without a download",
        description="Train a small Llama, quantise it to 4 bits, fine-tune it by LoRA, judge it, "
        "save it, load it and merge it; every figure is measured on the way.",
    )
    arguments.add_demo_arguments(demo)
    demo.set_defaults(run=run_module)

    train = commands.add_parser(
        "train",
        help="fine-tune a transformers model on a JSONL file",
        description="Load a causal language model, quantise it to 4 bits, train LoRA on the lines "
        "of a JSONL file, and save the adapter in PEFT's format.",
    )
    arguments.add_train_arguments(train)
    train.set_defaults(run=run_module)

    merge = commands.add_parser(
        "merge",
        help="add an adapter to the original checkpoint, a tensor at a time",
        description="Write the dense checkpoint of a model with an adapter's updates added to its "
        "weights, and print what that costs. Neither is loaded as a model: it takes the memory of "
        "one tensor.",
    )
    arguments.add_merge_arguments(merge)
    merge.set_defaults(run=run_module)

    convert = commands.add_parser(
        "convert",
        help="turn a 4-bit checkpoint into one of bitsandbytes', or the other way round",
        description="Write a 4-bit checkpoint in the other form, bitsandbytes' or this library's. "
        "Codes and scales are the same in both: nothing is quantised and nothing is lost.",
    )
    arguments.add_convert_arguments(convert)
    convert.set_defaults(run=run_module)

    info = commands.add_parser("info", help="what this build has, and what it uses here")
    info.set_defaults(run=run_info)
    return parser


def run_info(_: argparse.Namespace) -> None:
    """Print what the native core was built with, and what it can run on."""
    build = build_info()
    rows = {
        "version": build["version"],
        "C++ compiler": build["cxx_compiler"],
        "CPU instruction sets": ", ".join(build["cpu_sets"]),
        "  in use": build["cpu_set"],
        "CUDA": build["cuda_compiler"] if build["cuda"] else "not built",
    }
    if build["cuda"]:
        rows["  architectures"] = build["cuda_archs"]
        rows["  devices"] = "; ".join(build["cuda_devices"]) or "none"
        if build["cuda_problems"]:
            rows["  problems"] = "; ".join(build["cuda_problems"])
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def run_module(args: argparse.Namespace) -> None:
    """`cli/<command>.py`, whose imports cost seconds and so wait until they are needed."""
    try:
        module = importlib.import_module(f"qlora_native.cli.{args.command}")
    except ImportError as error:
        raise _explain_import(error) from error
    module.run(args)


def _explain_import(error: ImportError) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_PACKAGES:
        return error
    return CommandError(f"this needs {package}: pip install 'qlora_native[train]'")


if __name__ == "__main__":
    sys.exit(main())
