"""The CPU backend beside bitsandbytes and torch: codec, linear, AdamW.

Correctness is checked before anything is timed.

python benchmarks/bench_cpu.py [--json FILE] [--seconds S] [--threads N]
"""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import nn

import qlora_native as q
from harness import (
    Row,
    parse_arguments,
    print_table,
    restart_with_warm_allocator,
    time_contenders,
    write_json,
)

N = K = 4096
OPTIMIZER_ELEMENTS = 16_777_216


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest value, so that a wrong answer is not timed."""
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert error <= tolerance, f"results differ by {error:.2e}, want {tolerance:.0e}"


def bench_codec(seconds: float) -> list[Row]:
    """Quantise and dequantise with nested scales, allocating the result as users do."""
    w = torch.randn(N, K)
    ours = q.nf4_quantize(w)
    codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    state.dtype = torch.bfloat16

    def dequantize_theirs() -> torch.Tensor:
        return bnb.functional.dequantize_4bit(codes, state)

    # Not bit for bit: a few of its nested scale codes are one off (it searches 65,536 bins).
    assert_close(ours.dequantize(torch.bfloat16), dequantize_theirs(), 2**-6)
    rows = time_contenders(
        "quantise 4096², fp32",
        {
            "qlora_native": lambda: q.nf4_quantize(w),
            "bitsandbytes": lambda: bnb.functional.quantize_4bit(
                w, quant_type="nf4", compress_statistics=True
            ),
        },
        seconds,
    )
    rows += time_contenders(
        "dequantise 4096² to bf16",
        {
            "qlora_native": lambda: ours.dequantize(torch.bfloat16),
            "bitsandbytes": dequantize_theirs,
        },
        seconds,
    )
    return rows


def bench_linear(seconds: float) -> list[Row]:
    """Forward and input gradient in training mode, bf16, as in fine-tuning."""
    dense = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    ours = q.NF4Linear.from_linear(dense)
    theirs = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.detach().clone(), requires_grad=False, quant_type="nf4"
    )
    theirs = theirs.to("cpu").train()

    def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            x.grad = None
            y = layer(x)
            y.backward(dy)
            return y.detach()

        return run

    rows = []
    for m in (1, 16, 256, 1024):
        x = torch.randn(m, K, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(m, N, dtype=torch.bfloat16)
        contenders = {
            "qlora_native": step(ours, x, dy),
            "bitsandbytes": step(theirs, x, dy),
            "torch bf16, not quantised": step(dense.requires_grad_(False), x, dy),
        }
        y_ours, y_theirs, _ = (run() for run in contenders.values())
        assert_close(y_ours, y_theirs, 2**-6)
        rows += time_contenders(f"linear 4096², forward + dX, m = {m}, bf16", contenders, seconds)
    return rows


def bench_adamw(seconds: float) -> list[Row]:
    """A step on 16.8 M fp32 parameters."""

    def stepper(
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> tuple[nn.Parameter, Callable[[], object]]:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(OPTIMIZER_ELEMENTS))
        parameter.grad = torch.randn(OPTIMIZER_ELEMENTS)
        return parameter, make([parameter]).step

    rows = []
    for bits, contenders in {
        32: {
            "qlora_native": lambda p: q.PagedAdamW(p),
            "torch fused": lambda p: torch.optim.AdamW(p, fused=True),
            "bitsandbytes": lambda p: bnb.optim.AdamW32bit(p, weight_decay=1e-2),
        },
        8: {
            "qlora_native": lambda p: q.PagedAdamW8bit(p),
            "torch fused, 32-bit": lambda p: torch.optim.AdamW(p, fused=True),
            "bitsandbytes": lambda p: bnb.optim.AdamW8bit(p, weight_decay=1e-2),
        },
    }.items():
        made = {name: stepper(make) for name, make in contenders.items()}
        for _, step in made.values():
            step()
        ours, *others = (parameter.detach() for parameter, _ in made.values())
        for other in others:
            assert_close(ours, other, 1e-3)
        rows += time_contenders(
            f"AdamW {bits}-bit, 16.8 M fp32",
            {name: step for name, (_, step) in made.items()},
            seconds,
        )
    return rows


def main() -> None:
    restart_with_warm_allocator()
    arguments = parse_arguments("The CPU backend beside bitsandbytes and torch.")
    torch.manual_seed(0)
    rows = []
    for bench in (bench_codec, bench_linear, bench_adamw):
        print(f"{bench.__name__} ...", flush=True)
        rows += bench(arguments.seconds)
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
