"""The training loop that pretraining, the demo and `train` share."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qlora_native.cli.batches import NO_LOSS, Batch, Example, ordered_batches
from qlora_native.cli.errors import CommandError
from qlora_native.cli.peak_memory import PeakMemory

MAX_GRAD_NORM = 1.0
WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.05


@dataclass
class TrainingRun:
    """What a training run measured."""

    losses: list[float] = field(default_factory=list)  # of each step's batch, nats a token
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, nats a token)
    token_count: int = 0  # without padding
    seconds: float = 0.0  # of the steps alone, evaluation left out
    peak_memory_bytes: int = 0  # resident, of the whole process
    peak_memory_since_start: bool = False  # the peak could not be reset: it may be older
    peak_gpu_memory_bytes: int = 0  # of torch's tensors there; 0 on a CPU
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_state_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of the steps alone."""
        return self.token_count / self.seconds if self.seconds else 0.0


def train_model(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    description: str,
    evaluate: Callable[[], float] | None = None,
    evaluations: int = 4,
) -> TrainingRun:
    """Train on `steps` batches; leaves the model in evaluation mode.

    The learning rate rises over the first 5 % of the steps and then falls in a line to 5 % of its
    peak; gradients are clipped to a norm of 1.

    Args:
        model: a causal language model of transformers.
        batches: at least `steps` of them.
        optimizer: over the parameters to train.
        steps: how many.
        description: stands before the progress bar.
        evaluate: gives the held-out loss; asked before the first step and `evaluations` times on.
        evaluations: see `evaluate`.

    Raises:
        CommandError: the loss is not finite.
    """
    run = TrainingRun()
    device = device_of(model)
    peak_memory = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    evaluate_at = {math.ceil(steps * i / evaluations) for i in range(evaluations + 1)}

    def record_held_out() -> None:
        if evaluate is not None and len(run.losses) in evaluate_at:
            run.held_out.append((len(run.losses), evaluate()))
            model.train()

    model.train()
    record_held_out()
    with progress_bar(steps, description) as progress:
        for batch in itertools.islice(batches, steps):
            started = time.perf_counter()
            loss = language_model_loss(model, batch)
            run.losses.append(loss.item())
            if not math.isfinite(run.losses[-1]):
                raise CommandError(
                    f"the loss is {run.losses[-1]} at step {len(run.losses)}; "
                    "a lower learning rate may help"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            run.gradient_bytes = total_bytes(p.grad for p in trainable if p.grad is not None)
            optimizer.zero_grad()
            run.seconds += time.perf_counter() - started
            run.token_count += batch.token_count
            progress.set_postfix_str(
                f"loss {run.losses[-1]:.3f}, {run.tokens_per_second:,.0f} tokens/s", refresh=False
            )
            progress.update()
            record_held_out()
    model.eval()
    run.peak_memory_bytes = peak_memory.read_bytes()
    run.peak_memory_since_start = peak_memory.since_start
    if device.type == "cuda":
        run.peak_gpu_memory_bytes = torch.cuda.max_memory_allocated(device)
    run.weight_bytes = total_bytes(model.parameters())
    run.optimizer_state_bytes = total_bytes(
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return run


def language_model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of the tokens that have a label, in nats, on the model's device."""
    input_ids, labels = (tokens.to(device_of(model)) for tokens in (batch.input_ids, batch.labels))
    loss: Tensor = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    return loss


def device_of(model: nn.Module) -> torch.device:
    """Where the model is, all of it."""
    return next(model.parameters()).device


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Sequence[Example], batch_size: int) -> float:
    """The mean cross entropy over all labelled tokens of `examples`, in nats a token."""
    model.eval()
    total, count = 0.0, 0
    for batch in ordered_batches(examples, batch_size):
        predicted = int((batch.labels[:, 1:] != NO_LOSS).sum())  # the first token has no context
        total += language_model_loss(model, batch).item() * predicted
        count += predicted
    if count == 0:
        raise ValueError("held_out_loss: examples have no token with a label, want at least one")
    return total / count


def lr_share(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step`, 0-based."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    fallen = (step - warmup) / max(1, steps - warmup)
    return 1.0 - (1.0 - FINAL_LR_SHARE) * fallen


def progress_bar(total: int, description: str, unit: str = "step") -> "tqdm[None]":
    """A bar on stderr; in a log file, a line every 15 seconds."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, desc=description, unit=unit, mininterval=interval, ncols=110)


def shown_on(bar: "tqdm[None]") -> Callable[[int, int, str], None]:
    """A `progress` of this library's functions: called with (done, in all, name) it moves `bar`."""

    def show(_: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_postfix_str(name, refresh=False)
        bar.update()

    return show


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory that the elements of `tensors` take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
