"""`qlora-native train`: fine-tune a transformers model on a JSONL file."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native
from qlora_native import (
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    add_lora,
    count_parameters,
    quantize_model,
)
from qlora_native.cli.batches import shuffled_batches
from qlora_native.cli.dataset import Columns, read_examples
from qlora_native.cli.devices import choose_device
from qlora_native.cli.errors import CommandError, make_output_folder
from qlora_native.cli.training import TrainingRun, progress_bar, shown_on, train_model
from qlora_native.hf import adapter_files, save_lora

OPTIMIZERS = {
    "paged_adamw": PagedAdamW,
    "paged_adamw8bit": PagedAdamW8bit,
    "paged_lion": PagedLion,
    "paged_lion8bit": PagedLion8bit,
}

# Not config.json: transformers would take the adapter's folder for a model's.
CONFIG_FILE = "training_config.json"
METRICS_FILE = "metrics.json"


def run(args: argparse.Namespace) -> None:
    """The whole of the command: load, quantise, train, save."""
    columns = _columns_of(args)
    device = choose_device(args.device)
    _check_output(args.output, args.overwrite)
    torch.manual_seed(args.seed)

    tokenizer = _load(AutoTokenizer, args.model)
    examples = read_examples(args.data, columns, tokenizer, args.max_length)
    model = _load(AutoModelForCausalLM, args.model, dtype="auto")
    _quantize_and_add_lora(model, args)
    model.to(device)  # quantised by now: the dense weights never have to fit a GPU
    trainable, total = count_parameters(model)
    print(f"{len(examples):,} examples; training {trainable:,} of {total:,} parameters on {device}")

    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    if args.max_steps is not None:
        steps = min(steps, args.max_steps)
    optimizer = OPTIMIZERS[args.optimizer](
        (p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0
    )
    training = train_model(
        model,
        shuffled_batches(examples, args.batch_size, steps, args.seed),
        optimizer,
        steps,
        description="training",
    )

    make_output_folder(args.output)
    save_lora(model, args.output, base_model_name_or_path=args.model)
    metrics = {
        "trainable_parameters": trainable,
        "parameters": total,
        "steps": steps,
        "device": str(device),
    }
    _write_json(args.output / METRICS_FILE, metrics | _metrics_of(training))
    _write_json(args.output / CONFIG_FILE, _config_of(args))
    print(
        f"loss {training.losses[0]:.3f} -> {training.losses[-1]:.3f} in {steps:,} steps, "
        f"{training.tokens_per_second:,.0f} tokens/s; adapter saved in {args.output}"
    )


def _columns_of(args: argparse.Namespace) -> Columns:
    if (args.prompt_column is None) != (args.completion_column is None):
        raise CommandError("--prompt-column and --completion-column go together")
    if args.prompt_column is None:
        return Columns(text=args.text_column)
    return Columns(prompt=args.prompt_column, completion=args.completion_column)


def _check_output(folder: Path, overwrite: bool) -> None:
    if (folder / adapter_files.CONFIG_FILE).exists() and not overwrite:
        raise CommandError(f"--output {folder}: has an adapter already; --overwrite replaces it")
    make_output_folder(folder)  # better to fail before the training than after it


def _load(auto_class: Any, name: str, **settings: Any) -> Any:
    """`auto_class.from_pretrained`, whose complaints fill many lines, in one."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise CommandError(f"--model {name}: no such directory")
    try:
        return auto_class.from_pretrained(name, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CommandError(f"--model {name}: {reason}") from error


def _quantize_and_add_lora(model: torch.nn.Module, args: argparse.Namespace) -> None:
    try:
        with progress_bar(0, "quantising", unit="layer") as bar:
            quantize_model(model, progress=shown_on(bar))
        add_lora(model, r=args.r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _metrics_of(training: TrainingRun) -> dict[str, Any]:
    metrics = dataclasses.asdict(training)
    return metrics | {"tokens_per_second": training.tokens_per_second}


def _config_of(args: argparse.Namespace) -> dict[str, Any]:
    config = {name: value for name, value in vars(args).items() if name != "run"}
    return config | {
        "qlora_native": qlora_native.__version__,
        "torch": torch.__version__,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
