"""`qlora-native convert`: a 4-bit checkpoint in the other form."""

import argparse

import torch

from qlora_native.cli.errors import CommandError
from qlora_native.cli.training import progress_bar, shown_on
from qlora_native.hf.bitsandbytes import convert_checkpoint


def run(args: argparse.Namespace) -> None:
    """The whole of the command."""
    try:
        with progress_bar(0, "converting", unit="layer") as bar:
            form = convert_checkpoint(
                args.source,
                args.destination,
                args.to,
                quant_storage=getattr(torch, args.quant_storage),
                progress=shown_on(bar),
            )
    except (OSError, ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error
    print(f"{args.destination} has the checkpoint in the form {form!r}")
