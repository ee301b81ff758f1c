"""The demo's report: one HTML file that needs nothing else and reads in light and dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from qlora_native.cli.charts import Bar, Series, bar_chart, line_chart, smooth
from qlora_native.cli.results import DemoResults, Sample, versions
from qlora_native.cli.training import TrainingRun

SMOOTHING = 20  # steps

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --ink: #1d2126; --soft: #5c6670;
  --rule: #dfe2e5; --card: #fff; --s1: #1f6feb; --s2: #c2510c; --s3: #2a7f4f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e8ea; --soft: #9aa5b0;
  --rule: #333a41; --card: #1b1f23; --s1: #6cabff; --s2: #f0955a; --s3: #6cc693; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 760px; margin: 3rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.6rem; }
p { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .8rem; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: .7rem .9rem; color: var(--soft); font-size: .85rem; }
.tiles b { display: block; font-size: 1.3rem; color: var(--ink); }
figure { margin: 1.2rem 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 1rem; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
.legend { font-weight: 400; font-size: .85rem; color: var(--soft); }
.legend span { margin-right: 1.1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .35em; vertical-align: -.05em; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
.grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.s1 { stroke: var(--s1); } polyline.s2 { stroke: var(--s2); }
circle.s2, rect.s2, i.s2 { fill: var(--s2); background: var(--s2); }
rect.s1, i.s1 { fill: var(--s1); background: var(--s1); }
rect.s3, i.s3 { fill: var(--s3); background: var(--s3); }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: .9rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
pre i { color: var(--soft); font-style: normal; } pre b { color: var(--s1); font-weight: 600; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
td, th { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid var(--rule); }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
"""


def write_report(path: Path, results: DemoResults) -> None:
    """Write the page."""
    path.write_text(make_page(results), encoding="utf-8")


def make_page(results: DemoResults) -> str:
    """The page as HTML."""
    sections = [
        "<h1>QLoRA on this machine</h1>",
        f"<p>What <code>qlora-native demo</code> measured in {results.seconds:.0f} s. "
        "Losses are nats a byte on text that no training saw.</p>",
        _tiles(results),
        "<h2>The 4-bit base</h2>",
        _memory_of_layers(results),
        _error_of_layers(results),
        "<h2>Training</h2>",
        _loss_chart("Pretraining the base: English documentation", results.pretraining.run),
        _loss_chart("Fine-tuning by LoRA: signature to documentation", results.finetuning.run),
        _training_memory(results),
        "<h2>Before and after, on functions that no training saw</h2>",
        *map(_sample, results.delivery.samples),
        "<h2>Every layer</h2>",
        _layer_table(results),
        f"<p>{escape(', '.join(f'{name} {value}' for name, value in versions().items()))}</p>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>qlora-native demo</title><style>{STYLE}</style>\n" + "\n".join(sections) + "\n"
    )


def format_bytes(count: float) -> str:
    """Decimal units: `1.63 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _tiles(results: DemoResults) -> str:
    quantization, finetuning = results.quantization, results.finetuning
    delivery = results.delivery
    tiles = {
        "bits a weight on the linear layers": f"{quantization.bits_per_weight:.3f}",
        "change of the held-out loss by quantising": f"{quantization.loss_change:+.2%}",
        "of the parameters are trained": f"{finetuning.trainable_share:.1%}",
        "held-out loss by fine-tuning": (
            f"{finetuning.loss_before:.2f} → {finetuning.loss_after:.2f}"
        ),
        "adapter on disk": format_bytes(delivery.adapter_bytes),
        "tokens a second, fine-tuning": f"{finetuning.run.tokens_per_second:,.0f}",
        "largest change of a logit, adapter loaded back": f"{delivery.reload_difference:g}",
        "largest change of a logit, adapter merged": f"{delivery.merge_difference:.1g}",
    }
    cells = "".join(f"<div><b>{value}</b>{escape(name)}</div>" for name, value in tiles.items())
    return f'<div class="tiles">{cells}</div>'


def _memory_of_layers(results: DemoResults) -> str:
    rows = {
        "linear layers, fp32": sum(layer.dense_bytes for layer in results.quantization.layers),
        "linear layers, NF4": sum(layer.nf4_bytes for layer in results.quantization.layers),
        "whole model, fp32": results.quantization.dense_model_bytes,
        "whole model, NF4": results.quantization.quantized_model_bytes,
    }
    bars = [
        Bar(name, [(size, "s2" if name.endswith("fp32") else "s1")], format_bytes(size))
        for name, size in rows.items()
    ]
    return bar_chart("Memory of the weights", bars)


def _error_of_layers(results: DemoResults) -> str:
    bars = [
        Bar(
            layer.name.removeprefix("model.layers."),
            [(layer.relative_error, "s1")],
            f"{layer.relative_error:.2%}",
        )
        for layer in results.quantization.layers
    ]
    return bar_chart("Relative error of each layer's weight, ‖W − Ŵ‖ / ‖W‖", bars)


def _loss_chart(title: str, run: TrainingRun) -> str:
    smoothed = smooth(run.losses, SMOOTHING)
    series = [
        Series(
            f"training, mean of {SMOOTHING} steps",
            list(enumerate(smoothed, start=1)),
            "s1",
        ),
        Series("held out", run.held_out, "s2", markers=True),
    ]
    return line_chart(title, "step", "nats a byte", series)


def _training_memory(results: DemoResults) -> str:
    legend = [("weights", "s1"), ("gradients", "s2"), ("optimiser state", "s3")]
    bars = []
    for name, run in (
        ("pretraining, fp32", results.pretraining.run),
        ("fine-tuning, QLoRA", results.finetuning.run),
    ):
        sizes = (run.weight_bytes, run.gradient_bytes, run.optimizer_state_bytes)
        parts = [(size, style) for size, (_, style) in zip(sizes, legend, strict=True)]
        bars.append(Bar(name, parts, format_bytes(sum(sizes))))
    return bar_chart("What training holds, activations apart", bars, legend)


def _sample(sample: Sample) -> str:
    lines = [
        escape(sample.function.prompt.rstrip()),
        f"    <i>before   {escape(one_line(sample.before))}</i>",
        f"    <b>after    {escape(one_line(sample.after))}</b>",
        f"    <i>Python   {escape(sample.function.summary)}</i>",
    ]
    return f"<pre>{chr(10).join(lines)}</pre>"


def one_line(text: str, length: int = 90) -> str:
    """`text` with its white space collapsed, cut to `length`."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _layer_table(results: DemoResults) -> str:
    header = ("layer", "shape", "fp32", "NF4", "bits a weight", "relative error")
    rows: list[Sequence[str]] = [
        (
            layer.name,
            f"{layer.shape[0]} × {layer.shape[1]}",
            f"{layer.dense_bytes:,} B",
            f"{layer.nf4_bytes:,} B",
            f"{8 * layer.nf4_bytes / layer.weight_count:.3f}",
            f"{layer.relative_error:.3%}",
        )
        for layer in results.quantization.layers
    ]
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
