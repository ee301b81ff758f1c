"""What each row is to reach, as data, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness import Row

BNB, BF16, FP32 = "bitsandbytes", "torch bf16", "torch fp32"
BNB_TRAINING = "bitsandbytes, training path"
TORCH_FUSED, TORCH_FUSED_32 = "torch fused", "torch fused, 32-bit"
ONE_TENSOR, LORA_SET, TINY_SET = "16.8 M fp32", "448 LoRA tensors", "448 tensors of 64 elements"
LIMIT, MICROSECONDS = "limit", "µs"


@dataclass(frozen=True)
class Goal:
    """`reach` × as fast as `against`; of LIMIT a share to reach, of MICROSECONDS a time to keep to.

    Attributes:
        key: of the rows that it is about.
        ms: their numbers of tokens; empty: any.
        against: a contender; several: whichever of them is fastest.
        isas: the instruction sets that it holds on; empty: any that no other goal names.
        sizes: of the weight, like "4096×4096", or of what a step is on; empty: any.
    """

    key: str
    ms: tuple[int, ...]
    against: tuple[str, ...]
    reach: float
    isas: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()


_AVX2 = ("avx2",)
GOALS = (
    Goal("quantise", (), (BNB,), 50),
    Goal("quantise", (), (LIMIT,), 0.60),
    Goal("dequantise to bf16", (), (LIMIT,), 0.85),
    Goal("dequantise to bf16", (), (BNB,), 1.1),
    Goal("dequantise to fp32", (), (LIMIT,), 0.85),
    Goal("dequantise to fp32", (), (BNB,), 1.0),
    Goal("forward", (1,), (LIMIT,), 0.85),
    Goal("forward", (1,), (LIMIT,), 0.70, _AVX2),
    Goal("forward", (1,), (BNB,), 2.0),
    Goal("forward", (4, 8), (BNB,), 1.8),
    Goal("forward", (16,), (BNB,), 1.5),
    Goal("forward", (64, 256, 1024), (BNB, BNB_TRAINING), 1.3),
    Goal("forward", (64, 256, 1024), (BF16,), 0.97),
    Goal("forward", (64, 256, 1024), (BF16, FP32), 0.97, _AVX2),
    Goal("forward + dX", (256,), (BNB,), 1.4),
    Goal("forward + dX", (1024,), (BNB,), 1.1),
    Goal("forward + dX", (256, 1024), (BF16,), 0.97),
    Goal("forward + dX", (256, 1024), (BF16, FP32), 0.97, _AVX2),
    Goal("forward, fp32 activations", (64, 256, 1024), (FP32,), 0.97),
    Goal("LoRA forward + backward", (512,), ("PEFT on bitsandbytes",), 1.3),
    Goal("LoRA forward + backward", (512,), ("bare bf16 products",), 1 / 1.1),
    Goal("LoRA through PEFT, forward + backward", (512,), ("PEFT on bitsandbytes",), 1.3),
    *(
        Goal(f"32 adapters, {tokens} tokens each, {name}", (), ("one adapter",), 1 / 1.5)
        for tokens in (1, 4, 16, 64)
        for name in ("forward", "forward + backward")
    ),
    *(
        Goal(f"DoRA forward + backward, {name} factors", (512,), ("LoRA",), 1 / 1.25)
        for name in ("fp32", "bf16")
    ),
    Goal("AdamW 32-bit", (), (TORCH_FUSED,), 1.0, sizes=(ONE_TENSOR, LORA_SET)),
    Goal("AdamW 8-bit", (), (TORCH_FUSED_32,), 1.3, sizes=(ONE_TENSOR,)),
    Goal("AdamW 8-bit", (), (TORCH_FUSED_32,), 1.5, sizes=(LORA_SET,)),
    *(
        Goal(f"{algorithm} {bits}-bit", (), (BNB,), reach, sizes=(ONE_TENSOR, LORA_SET))
        for algorithm in ("AdamW", "Lion")
        for bits, reach in ((32, 12), (8, 40))
    ),
    *(
        Goal(f"call overhead, {name} step", (), (MICROSECONDS,), 1500, sizes=(TINY_SET,))
        for name in ("AdamW 32-bit", "AdamW 8-bit", "Lion 32-bit", "Lion 8-bit")
    ),
    Goal("call overhead, forward", (), (MICROSECONDS,), 15),
    Goal("call overhead, forward + backward", (), (MICROSECONDS,), 75),
    Goal("from_pretrained, dense checkpoint", (), (BNB,), 5),
    Goal("training step", (), ("bitsandbytes + PEFT",), 1.35),
    Goal("training step", (), ("bf16 + PEFT",), 1.0),
)

# Of the CUDA backend on an H200: docs/benchmarks.md says what the floors are.
OWN_ONE_TOKEN, OWN_BASE, DEQUANTISE_MM = "own m = 1", "own base alone", "dequantise + torch.mm"
PEFT, PREFETCH_LOOP = "PEFT on bitsandbytes", "plain prefetch loop"
_SQUARE, _WIDE = ("4096×4096",), ("4096×14336",)
CUDA_GOALS = (
    Goal("quantise", (), (LIMIT,), 1 / 1.4),
    Goal("quantise", (), (BNB,), 5),
    *(Goal(f"dequantise to {dtype}", (), (LIMIT,), 1 / 1.18) for dtype in ("bf16", "fp16", "fp32")),
    Goal("dequantise to bf16", (), (BNB,), 2),
    Goal("forward", (1,), (MICROSECONDS,), 4.5, sizes=_SQUARE),
    Goal("forward", (1,), (MICROSECONDS,), 9.5, sizes=_WIDE),
    Goal("forward", (1,), (BNB,), 1.5),
    Goal("forward", (16,), (OWN_ONE_TOKEN,), 1 / 1.25),
    Goal("forward", (64,), (MICROSECONDS,), 8, sizes=_SQUARE),
    Goal("forward", (128,), (MICROSECONDS,), 12, sizes=_SQUARE),
    Goal("forward", (256,), (MICROSECONDS,), 20, sizes=_SQUARE),
    Goal("forward", (512,), (MICROSECONDS,), 38, sizes=_SQUARE),
    # The choice of a kernel is wrong where dequantising by hand is faster.
    Goal("forward", (), (DEQUANTISE_MM,), 0.97),
    Goal("dX", (), (DEQUANTISE_MM,), 0.97),
    *(Goal(key, (2048,), (BF16,), 1 / 1.15) for key in ("forward", "dX")),
    *(Goal(key, (8192,), (BF16,), 1 / 1.04) for key in ("forward", "dX")),
    # A step's LoRA is to take 6 % of it, which is 8 % of what its base products take.
    Goal("LoRA forward + backward", (2048,), (OWN_BASE,), 1 / 1.08),
    Goal("LoRA forward + backward", (), (PEFT,), 1.3),
    *(
        Goal(f"{algorithm} {bits}-bit", (), (LIMIT,), 1 / floors)
        for algorithm in ("AdamW", "Lion")
        for bits, floors in ((32, 1.15), (8, 1.4))
    ),
    Goal("AdamW 32-bit, with the host", (), (BNB,), 20, sizes=(LORA_SET,)),
    Goal("AdamW 8-bit, with the host", (), (BNB,), 20, sizes=(LORA_SET,)),
    Goal("paging", (), (LIMIT,), 0.80),
    *(
        Goal(f"AdamW 32-bit paged, {strategy}, a quarter resident", (), (PREFETCH_LOOP,), 0.80)
        for strategy in ("managed", "pinned")
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What a goal asked for, what was measured, and whether that is enough."""

    wanted: str
    reached: str
    met: bool


def judge(row: Row, isa: str, goals: tuple[Goal, ...] = GOALS) -> list[Verdict]:
    """The verdicts on a row, of the goals whose contenders it has."""
    goals = [g for g in goals if g.key == row.key and (not g.ms or row.m in g.ms)]
    goals = [g for g in goals if not g.sizes or row.size in g.sizes]
    special = [goal for goal in goals if isa in goal.isas]
    replaced = {against for goal in special for against in goal.against}
    goals = special + [g for g in goals if not g.isas and not replaced & set(g.against)]
    verdicts = [_judge_one(row, goal) for goal in goals]
    return [verdict for verdict in verdicts if verdict is not None]


def _judge_one(row: Row, goal: Goal) -> Verdict | None:
    ours, *peers = row.times
    if goal.against == (LIMIT,):
        if row.share_of_limit is None:
            return None
        share = row.share_of_limit
        return Verdict(f"≥ {goal.reach:.0%} of {row.limit}", f"{share:.0%}", share >= goal.reach)
    if goal.against == (MICROSECONDS,):
        took = 1e3 * row.times[ours].median_ms
        return Verdict(f"≤ {goal.reach:g} µs", f"{took:.1f} µs", took <= goal.reach)
    present = [name for name in goal.against if name in peers]
    if not present:
        return None
    fastest = min(present, key=lambda name: row.times[name].median_ms)
    ratio = row.ratio(fastest)
    return Verdict(f"≥ {goal.reach:.3g}× {fastest}", f"{ratio:.2f}×", ratio >= goal.reach)
