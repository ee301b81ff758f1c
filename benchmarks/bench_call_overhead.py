"""What a call costs before any work: 64 × 64 layers on few tokens, beside torch and its peers.

A layer of this size is all overhead: Python, checks, autograd. Microseconds a call, the median and
the least over many batches of calls; in turns in one process, so that the ratios are what is read.

python benchmarks/bench_call_overhead.py [--json FILE] [--seconds S] [--threads N]
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import peft
import torch
from torch import nn

import qlora_native as q
from harness import Row, parse_arguments, write_json

SIZE = 64
RANK = 8
OURS = {  # what each is beside
    "nn.Linear": "NF4Linear",
    "bnb Linear4bit": "NF4Linear",
    "PEFT on bnb": "LoRALinear",
}
BATCH = 50  # calls between two readings of the clock, which costs a tenth of a microsecond


class Holder(nn.Module):
    """PEFT adapts a named layer of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def make_bitsandbytes(dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The same weight in bitsandbytes' layer."""
    layer = bnb.nn.Linear4bit(
        SIZE, SIZE, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        dense.weight.detach().clone(), requires_grad=False, quant_type="nf4"
    )
    return layer.to("cpu")


def make_layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Every contender, of one dense weight; ours first."""
    dense = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype).requires_grad_(False)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["layer"])
    adapted = peft.inject_adapter_in_model(config, Holder(make_bitsandbytes(dense, dtype)))
    return {
        "NF4Linear": q.NF4Linear.from_linear(dense),
        "LoRALinear": q.LoRALinear(q.NF4Linear.from_linear(dense), r=RANK),
        "nn.Linear": dense,
        "bnb Linear4bit": make_bitsandbytes(dense, dtype),
        "PEFT on bnb": adapted.layer,
    }


def make_calls(
    layer: nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """The three kinds of call; backward includes the gradient in x, as inside a model."""
    x_leaf = x.clone().requires_grad_()

    def infer() -> torch.Tensor:
        with torch.inference_mode():
            return layer(x)

    def step() -> None:
        x_leaf.grad = None
        layer(x_leaf).backward(dy)

    return {"inference": infer, "forward": lambda: layer(x_leaf), "forward + backward": step}


@dataclass
class CallRow(Row):
    """A Row whose samples are means of batches: then the least is worth telling."""

    least_ms: float = 0.0


def time_in_turns(
    work: str, calls: dict[str, Callable[[], object]], seconds: float
) -> list[CallRow]:
    """As harness.time_contenders, but a sample is the mean of a batch of calls."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < deadline:
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(BATCH):
                call()
            samples[name].append(1e3 * (time.perf_counter() - start) / BATCH)
    rows = {}
    for name, times in samples.items():
        quantiles = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        rows[name] = CallRow(work, name, median, quantiles[1], quantiles[7], least_ms=min(times))
    for name, ours in OURS.items():
        rows[name].ours_is_faster = rows[name].median_ms / rows[ours].median_ms
    return list(rows.values())


def print_microseconds(rows: list[CallRow]) -> None:
    """A Markdown table."""
    print("| Work | Layer | median µs | least | p20 | p80 | ours is faster by |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        times = (1e3 * ms for ms in (row.median_ms, row.least_ms, row.p20_ms, row.p80_ms))
        ratio = "" if row.ours_is_faster is None else f"{row.ours_is_faster:.2f}×"
        cells = " | ".join(f"{time:.1f}" for time in times)
        print(f"| {row.work} | {row.contender} | {cells} | {ratio} |")


def main() -> None:
    arguments = parse_arguments("The cost of a call of a small layer.", seconds=0.5, threads=1)
    torch.manual_seed(0)
    rows: list[CallRow] = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        layers = make_layers(dtype)
        for m in (1, 4):
            x, dy = torch.randn(m, SIZE, dtype=dtype), torch.randn(m, SIZE, dtype=dtype)
            calls = {layer_name: make_calls(layer, x, dy) for layer_name, layer in layers.items()}
            for kind in ("inference", "forward", "forward + backward"):
                rows += time_in_turns(
                    f"{kind}, m = {m}, {name}",
                    {layer_name: call[kind] for layer_name, call in calls.items()},
                    arguments.seconds,
                )
    print_microseconds(rows)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
