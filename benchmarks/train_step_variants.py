"""The three ways to fine-tune the same small Llama, and the process that trains one of them.

bench_train_step.py starts this file once a variant, and tells it by lines on stdin what to do:
`steps N` trains N steps, `profile N` does so under torch's profiler, an end of file ends it. Each
answer is a line of JSON on stdout.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA, RATE = 16, 32, 1e-3
_PROJECTIONS = [
    f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
]  # every linear layer but the head
_BATCHES = 4  # that are passed round, so that there is something to learn


@dataclass(frozen=True)
class Settings:
    """Of the model and its batches."""

    layers: int = 8
    hidden: int = 1024
    intermediate: int = 2816
    heads: int = 16
    vocabulary: int = 32_000
    batch: int = 2
    tokens: int = 256


Built = tuple[nn.Module, torch.optim.Optimizer]


def build_ours(settings: Settings) -> Built:
    """NF4 base, fp32 LoRA factors, PagedAdamW."""
    import qlora_native as q

    model = q.add_lora(q.quantize_model(_base(settings)), RANK, ALPHA)
    _draw_factors(model)
    return model, q.PagedAdamW(_trained(model), lr=RATE)


def build_bf16_peft(settings: Settings) -> Built:
    """bf16 base, PEFT, torch's AdamW (fused: its fastest)."""
    return _with_peft(_base(settings))


def build_bitsandbytes_peft(settings: Settings) -> Built:
    """bitsandbytes' NF4 base with nested scales, PEFT, torch's AdamW (fused)."""
    import bitsandbytes as bnb

    model = _base(settings)
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        quantised = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
        quantised.weight = bnb.nn.Params4bit(
            layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        model.set_submodule(name, quantised.to("cpu"))
    model.is_loaded_in_4bit = True  # as from_pretrained marks a model; PEFT looks for it
    return _with_peft(model)


VARIANTS: dict[str, Callable[[Settings], Built]] = {
    "qlora_native": build_ours,
    "bf16 + PEFT": build_bf16_peft,
    "bitsandbytes + PEFT": build_bitsandbytes_peft,
}


def _base(settings: Settings) -> LlamaForCausalLM:
    """The same random weights for all, built in bf16: no fp32 copy is ever in memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.tokens,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).requires_grad_(False).train()
    torch.set_default_dtype(torch.float32)
    return model


def _with_peft(model: nn.Module) -> Built:
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=_PROJECTIONS
    )
    model = peft.get_peft_model(model, config)
    _draw_factors(model)
    return model, torch.optim.AdamW(_trained(model), lr=RATE, fused=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _draw_factors(model: nn.Module) -> None:
    """The same A for all (B is zero); fp32 in all."""
    generator = torch.Generator().manual_seed(1)
    factors = [p for name, p in model.named_parameters() if "lora_a" in name.lower()]
    assert factors
    assert all(p.dtype == torch.float32 for p in _trained(model))
    for a in factors:
        bound = 1 / math.sqrt(a.shape[1])
        a.data.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


def _batches(settings: Settings) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (settings.batch, settings.tokens)
    return [torch.randint(settings.vocabulary, shape, generator=generator) for _ in range(_BATCHES)]


class Trainer:
    """Trains a variant, some steps at a time."""

    def __init__(self, variant: str, settings: Settings) -> None:
        start = time.perf_counter()
        self.model, self.optimizer = VARIANTS[variant](settings)
        self.build_seconds = time.perf_counter() - start
        self.built_bytes = peak_bytes()
        self.batches = _batches(settings)
        self.losses: list[float] = []

    def steps(self, count: int) -> list[float]:
        """Train; the seconds of each step: forward, backward and optimiser."""
        seconds = []
        for _ in range(count):
            ids = self.batches[len(self.losses) % len(self.batches)]
            start = time.perf_counter()
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        return seconds

    def profile(self, count: int) -> str:
        """Where the time of `count` steps goes, by torch's profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.steps(count)
        return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)


def peak_bytes() -> int:
    """The most memory that this process ever had resident; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(trainer: Trainer, orders: Iterable[str], answer: Callable[[dict], None]) -> None:
    for order in orders:
        verb, count = order.split()
        if verb == "profile":
            answer({"table": trainer.profile(int(count))})
            continue
        seconds = trainer.steps(int(count))
        answer({"seconds": seconds, "losses": trainer.losses, "peak_bytes": peak_bytes()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def answer(fields: dict) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    trainer = Trainer(arguments.variant, Settings(**arguments.settings))
    trainable = sum(p.numel() for p in _trained(trainer.model))
    answer(
        {
            "build_seconds": trainer.build_seconds,
            "built_bytes": trainer.built_bytes,
            "trainable": trainable,
            "settings": asdict(Settings(**arguments.settings)),
        }
    )
    _serve(trainer, sys.stdin, answer)


if __name__ == "__main__":
    main()
