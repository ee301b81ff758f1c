"""`qlora-native demo`: the whole of QLoRA, small, real and measured.

Read `run_demo`: it is the story in five steps.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from qlora_native import PagedAdamW, add_lora, count_parameters, merge_lora, quantize_model
from qlora_native.cli import demo_output as show
from qlora_native.cli.batches import pad_batch, shuffled_batches
from qlora_native.cli.corpus import Document, make_pretraining_text, read_standard_library
from qlora_native.cli.errors import CommandError, make_output_folder
from qlora_native.cli.measurements import measure_layers
from qlora_native.cli.report import write_report
from qlora_native.cli.results import (
    Delivery,
    DemoResults,
    Finetuning,
    Pretraining,
    Quantization,
    Sample,
)
from qlora_native.cli.tasks import Function, Task, make_task
from qlora_native.cli.tiny_llama import (
    BaseModelSettings,
    complete,
    default_cache_folder,
    held_out_examples,
    load_or_train_base_model,
)
from qlora_native.cli.training import held_out_loss, total_bytes, train_model
from qlora_native.hf import load_lora, save_lora
from qlora_native.hf.adapter_files import CONFIG_FILE, WEIGHTS_FILE

EVALUATION_BATCH_SIZE = 32
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; the defaults take some four minutes on two cores."""

    base: BaseModelSettings = field(default_factory=BaseModelSettings)
    r: int = 16
    lora_alpha: float = 32.0
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 3e-3
    sample_count: int = 3
    seed: int = 0


def run(args: argparse.Namespace) -> None:
    """The command."""
    transformers_logging.disable_progress_bar()
    run_demo(DemoSettings(), args.output, default_cache_folder(), fresh=args.fresh)


def run_demo(
    settings: DemoSettings, output: Path, cache_folder: Path, *, fresh: bool = False
) -> DemoResults:
    """Run the demo, print it, and write the adapter, metrics.json and report.html to `output`."""
    started = time.perf_counter()
    make_output_folder(output)

    show.heading("1. A base model, trained on the documentation of Python's standard library")
    documents = read_documents()
    text = make_pretraining_text(documents)
    base = load_or_train_base_model(settings.base, text, cache_folder, fresh=fresh)
    pretraining = Pretraining(
        base.run, count_parameters(base.model)[1], len(text.train), base.from_cache
    )
    show.pretraining(pretraining, cache_folder)

    show.heading("2. The same model in 4 bits: NF4 with nested scales")
    english = held_out_examples(text, settings.base.window)
    model = quantize_model(copy.deepcopy(base.model))
    quantization = Quantization(
        layers=measure_layers(base.model, model),
        dense_model_bytes=total_bytes(base.model.parameters()),
        quantized_model_bytes=total_bytes(model.parameters()),
        dense_loss=held_out_loss(base.model, english, EVALUATION_BATCH_SIZE),
        quantized_loss=held_out_loss(model, english, EVALUATION_BATCH_SIZE),
    )
    show.quantization(quantization)

    show.heading("3. LoRA beside the 4-bit weights: from a signature to its documentation")
    task = make_task(documents, text)
    functions = choose_functions(task, settings.sample_count)
    before = [complete(model, function.prompt) for function in functions]
    finetuning = finetune(model, task, settings)
    show.finetuning(finetuning)

    show.heading("4. What it learned; saved, loaded into a fresh copy, and merged")
    after = [complete(model, function.prompt) for function in functions]
    samples = [Sample(*row) for row in zip(functions, before, after, strict=True)]
    save_lora(model, output, base_model_name_or_path=str(base.folder))
    fresh_model = load_lora(quantize_model(copy.deepcopy(base.model)), output).eval()
    delivery = deliver(samples, model, fresh_model, task, output)
    show.delivery(delivery)

    results = DemoResults(
        pretraining, quantization, finetuning, delivery, time.perf_counter() - started
    )
    show.heading("5. The report")
    (output / METRICS_FILE).write_text(json.dumps(results.to_json(), indent=2) + "\n")
    write_report(output / REPORT_FILE, results)
    show.files(output, results.seconds)
    return results


def read_documents() -> list[Document]:
    """The library's documentation, or a word to the user about a Python without it."""
    try:
        return read_standard_library()
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error


def choose_functions(task: Task, count: int) -> list[Function]:
    """`count` held-out functions, evenly spread over them."""
    stride = max(1, len(task.held_out) // count)
    return task.held_out[stride // 2 :: stride][:count]


def finetune(model: nn.Module, task: Task, settings: DemoSettings) -> Finetuning:
    """Put LoRA on all linear layers of the 4-bit `model`, and train it on the task."""
    torch.manual_seed(settings.seed)
    add_lora(model, r=settings.r, lora_alpha=settings.lora_alpha)
    trainable_parameters, total_parameters = count_parameters(model)
    train = [function.to_example() for function in task.train]
    held_out = [function.to_example() for function in task.held_out]
    optimizer = PagedAdamW(
        (p for p in model.parameters() if p.requires_grad),
        lr=settings.learning_rate,
        weight_decay=0.0,
    )
    training = train_model(
        model,
        shuffled_batches(train, settings.batch_size, settings.steps, settings.seed),
        optimizer,
        settings.steps,
        description="fine-tuning",
        evaluate=lambda: held_out_loss(model, held_out, EVALUATION_BATCH_SIZE),
    )
    return Finetuning(training, len(train), len(held_out), trainable_parameters, total_parameters)


def deliver(
    samples: list[Sample], model: nn.Module, fresh_model: nn.Module, task: Task, output: Path
) -> Delivery:
    """Compare the trained `model` with `fresh_model`, which loaded its adapter; then merge that."""
    held_out = [function.to_example() for function in task.held_out]
    trained = logits_on(model, task)
    reloaded = logits_on(fresh_model, task)
    merge_lora(fresh_model)
    merged = logits_on(fresh_model, task)
    return Delivery(
        samples=samples,
        adapter_bytes=sum((output / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)),
        largest_logit=trained.abs().max().item(),
        reload_difference=(reloaded - trained).abs().max().item(),
        merge_difference=(merged - trained).abs().max().item(),
        merged_loss=held_out_loss(fresh_model, held_out, EVALUATION_BATCH_SIZE),
    )


@torch.no_grad()
def logits_on(model: nn.Module, task: Task) -> Tensor:
    """The logits [examples, tokens, vocabulary] on the first held-out functions."""
    batch = pad_batch([f.to_example() for f in task.held_out[:EVALUATION_BATCH_SIZE]])
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits
