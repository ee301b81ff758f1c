"""`qlora-native merge`: an adapter into the original checkpoint."""

import argparse
import json

import torch

from qlora_native.cli.errors import CommandError
from qlora_native.cli.training import progress_bar, shown_on
from qlora_native.hf import NF4Config, merge_into_checkpoint


def run(args: argparse.Namespace) -> None:
    """The whole of the command: merge, print what it cost."""
    if args.report is not None and not args.report.absolute().parent.is_dir():
        raise CommandError(f"--report {args.report}: no such directory")
    try:
        with progress_bar(0, "merging", unit="tensor") as bar:
            report = merge_into_checkpoint(
                args.adapter,
                args.model,
                args.output,
                dtype=None if args.dtype is None else getattr(torch, args.dtype),
                trained_beside=_base_of(args),
                progress=shown_on(bar),
            )
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(report)
    if args.report is not None:
        args.report.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    print(f"merged checkpoint in {args.output}")


def _base_of(args: argparse.Namespace) -> NF4Config | None:
    if args.trained_beside == "original":
        return None
    return NF4Config(block_size=args.block_size, double_quant=not args.no_double_quant)
