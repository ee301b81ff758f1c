"""The options of the sub-commands, apart from their work: `--help` must not import transformers."""

import argparse
from pathlib import Path


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `qlora-native demo`."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("qlora_demo"),
        metavar="DIR",
        help="where the adapter, the report and metrics.json go (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train the base model even if it is in the cache"
    )


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `qlora-native train`."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="a transformers causal LM")
    add("--data", required=True, type=Path, metavar="FILE.jsonl", help="one JSON object a line")
    add("--output", required=True, type=Path, metavar="DIR", help="for adapter and metrics")
    add("--overwrite", action="store_true", help="replace an adapter that is in --output")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU where one can be used (default: %(default)s)",
    )

    columns = parser.add_argument_group("columns of the data")
    add = columns.add_argument
    add("--text-column", default="text", metavar="NAME", help="loss on all of it (default: text)")
    add("--prompt-column", metavar="NAME", help="with --completion-column: no loss on this")
    add("--completion-column", metavar="NAME", help="with --prompt-column: the loss is on this")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--r", type=positive_int, default=16, help="rank (default: %(default)s)")
    add("--lora-alpha", type=positive_float, default=32.0, help="default: %(default)s")
    add("--lora-dropout", type=float, default=0.0, help="0 <= p < 1 (default: %(default)s)")
    add("--lr", type=positive_float, default=2e-4, help="peak learning rate (default: %(default)s)")
    add("--epochs", type=positive_int, default=1, help="default: %(default)s")
    add("--max-steps", type=positive_int, help="stop there, before the epochs are over")
    add("--batch-size", type=positive_int, default=4, help="examples (default: %(default)s)")
    add("--max-length", type=positive_int, default=512, help="tokens (default: %(default)s)")
    add(
        "--optimizer",
        choices=("paged_adamw", "paged_adamw8bit", "paged_lion", "paged_lion8bit"),
        default="paged_adamw",
        help="default: %(default)s",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `qlora-native merge`."""
    add = parser.add_argument
    add(
        "--adapter",
        required=True,
        type=Path,
        action="append",
        metavar="DIR",
        help="an adapter in PEFT's format; given more than once, their updates are added up",
    )
    add("--model", required=True, type=Path, metavar="DIR", help="the original, dense checkpoint")
    add("--output", required=True, type=Path, metavar="DIR", help="a new or an empty folder")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of all weights (default: each keeps its own)",
    )
    add("--report", type=Path, metavar="FILE.json", help="where to write the report as JSON")

    training = parser.add_argument_group(
        "how the base was held in training",
        "for the report, which says how far the original weights are from those trained beside",
    )
    add = training.add_argument
    add(
        "--trained-beside",
        choices=("nf4", "original"),
        default="nf4",
        help="original: the dense weights themselves (default: %(default)s)",
    )
    add("--block-size", type=positive_int, default=64, help="of NF4 (default: %(default)s)")
    add("--no-double-quant", action="store_true", help="the scales were not quantised")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `qlora-native convert`."""
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a folder that save_pretrained wrote")
    add("destination", type=Path, metavar="DST", help="a new folder")
    add("--to", choices=("nf4", "bitsandbytes"), help="default: the form that SRC has not")
    add(
        "--quant-storage",
        choices=("uint8", "bfloat16", "float16", "float32"),
        default="uint8",
        help="of bitsandbytes' form: the dtype that codes are stored as (default: %(default)s)",
    )


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, want at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}, want a number above 0")
    return value
