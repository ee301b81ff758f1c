"""What the demo prints."""

from pathlib import Path

from qlora_native.cli.measurements import LayerMeasurement
from qlora_native.cli.report import format_bytes, one_line
from qlora_native.cli.results import Delivery, Finetuning, Pretraining, Quantization


def heading(text: str) -> None:
    """The start of a step."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def pretraining(result: Pretraining, cache_folder: Path) -> None:
    """Step 1."""
    run = result.run
    print(
        f"a byte-level Llama of {result.parameters:,} parameters, "
        f"{run.token_count:,} bytes of training on {format_bytes(result.text_bytes)} of English"
    )
    print(f"held-out loss {run.held_out[0][1]:.3f} -> {run.held_out[-1][1]:.3f} nats a byte")
    if result.from_cache:
        print(f"taken from {cache_folder}; --fresh trains it again")


def quantization(result: Quantization) -> None:
    """Step 2: a row for each kind of layer, with the error of each of its layers."""
    print("layers      shape      count      fp32       NF4   bits/weight   relative error of each")
    for kind in dict.fromkeys(layer.kind for layer in result.layers):
        print(_layer_row(kind, [layer for layer in result.layers if layer.kind == kind]))
    print(
        f"linear layers: {format_bytes(sum(layer.dense_bytes for layer in result.layers))} -> "
        f"{format_bytes(sum(layer.nf4_bytes for layer in result.layers))}, "
        f"{result.bits_per_weight:.3f} bits a weight, scales included"
    )
    print(
        f"whole model:   {format_bytes(result.dense_model_bytes)} -> "
        f"{format_bytes(result.quantized_model_bytes)} (embeddings and output head stay fp32)"
    )
    print(
        f"held-out loss: {result.dense_loss:.4f} -> {result.quantized_loss:.4f} nats a byte "
        f"({result.loss_change:+.2%})"
    )


def finetuning(result: Finetuning) -> None:
    """Step 3."""
    run = result.run
    since = "since the process began" if run.peak_memory_since_start else "while training"
    print(
        f"trained: {result.trainable_parameters:,} of {result.total_parameters:,} parameters "
        f"({result.trainable_share:.2%}), on {result.train_functions:,} functions"
    )
    print(
        f"{run.tokens_per_second:,.0f} tokens/s; peak memory of the process {since} "
        f"{format_bytes(run.peak_memory_bytes)}, of it gradients "
        f"{format_bytes(run.gradient_bytes)}, optimiser state "
        f"{format_bytes(run.optimizer_state_bytes)}"
    )
    print(
        f"held-out loss: {result.loss_before:.3f} -> {result.loss_after:.3f} nats a byte, "
        f"on {result.held_out_functions:,} functions of modules that no training saw"
    )


def delivery(result: Delivery) -> None:
    """Step 4."""
    for sample in result.samples:
        print(sample.function.prompt.rstrip())
        print(f"    before: {one_line(sample.before)}")
        print(f"    after:  {one_line(sample.after)}")
        print(f"    Python: {sample.function.summary}")
    print(f"adapter on disk: {format_bytes(result.adapter_bytes)}, in PEFT's format")
    equal = "equal logits" if result.reload_difference == 0 else "NOT equal"
    print(
        f"loaded into a fresh 4-bit copy: {equal}, largest difference {result.reload_difference:g}"
    )
    print(
        f"merged into dense weights: largest difference {result.merge_difference:.2g} "
        f"in logits up to {result.largest_logit:.1f}; held-out loss {result.merged_loss:.3f}"
    )


def files(output: Path, seconds: float) -> None:
    """Step 5: what was written, and where."""
    for path in sorted(output.resolve().iterdir()):
        print(path)
    print(f"done in {seconds:.0f} s")


def _layer_row(kind: str, layers: list[LayerMeasurement]) -> str:
    n, k = layers[0].shape
    nf4_bytes = sum(layer.nf4_bytes for layer in layers)
    bits = 8 * nf4_bytes / sum(layer.weight_count for layer in layers)
    errors = "  ".join(f"{layer.relative_error:.2%}" for layer in layers)
    return (
        f"{kind:10}  {f'{n}x{k}':9}  {len(layers):5}  "
        f"{format_bytes(sum(layer.dense_bytes for layer in layers)):>8}  "
        f"{format_bytes(nf4_bytes):>8}   {bits:11.3f}   {errors}"
    )
