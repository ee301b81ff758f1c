"""A model's logits on a batch, before a merge and after it."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native.nn.lora_forward import lora_forward
from qlora_native.nn.lora_linear import LoRALinear
from qlora_native.nn.merge_report import OutputChange
from qlora_native.ops.lora_groups import LoRAGroup

Batch: TypeAlias = Mapping[str, Any] | Tensor

_ROWS = 64  # of logits that are converted to fp64 at a time
_IGNORED = -100  # the label of a position that has no loss, as everywhere


def logits_on(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of `model` in evaluation mode: `model(**batch)`, or `model(batch)` of a tensor.

    They are the output itself, its attribute or entry `logits`, or the first of a tuple.

    Raises:
        ValueError: the output has none.
    """
    with evaluating(model), torch.no_grad():
        output = model(batch) if isinstance(batch, Tensor) else model(**batch)
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits")
    if isinstance(logits, tuple | list):
        logits = logits[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ValueError(
            f"merge: the model's output on the batch is {type(output).__name__}, want a tensor of "
            "logits, or an output that has logits"
        )
    return logits


def compare_outputs(model: nn.Module, batch: Batch, before: Tensor, after: Tensor) -> OutputChange:
    """What separates the logits of two models of the same kind on the batch."""
    largest, squares, total = 0.0, 0.0, 0.0
    rows = (logits.flatten(0, -2).split(_ROWS) for logits in (before, after))
    for one, other in zip(*rows, strict=True):
        difference = (other.double() - one.double()).abs()
        # As comparisons with NaN are false, max() would pass one over.
        largest = max(largest, difference.max().nan_to_num(nan=math.inf).item())
        squares += difference.square().sum().item()
        total += one.double().square().sum().item()
    return OutputChange(
        max_difference=largest,
        rms_difference=math.sqrt(squares / before.numel()),
        rms_logits=math.sqrt(total / before.numel()),
        perplexity_before=perplexity(model, batch, before),
        perplexity_after=perplexity(model, batch, after),
    )


def perplexity(model: nn.Module, batch: Batch, logits: Tensor) -> float | None:
    """exp of the mean negative log likelihood of the batch's labels, or else of its next tokens.

    Labels are `batch["labels"]`, -100 where there is no loss; without them `batch["input_ids"]`
    where `attention_mask` is not 0, or the batch itself where it is a tensor of integers. The
    logits of a position are for the label of the next one, but in an encoder-decoder model for
    that of the same. None where there are no labels `[..., tokens]` that fit the logits
    `[..., tokens, vocabulary]`.
    """
    labels = _labels(batch)
    if labels is None or labels.shape != logits.shape[:-1]:
        return None
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    labels = labels.to(logits.device)
    total, count = 0.0, int((labels != _IGNORED).sum())
    if not count:
        return None
    rows = logits.reshape(-1, *logits.shape[-2:]), labels.reshape(-1, labels.shape[-1])
    for row, row_labels in zip(*rows, strict=True):
        total += F.cross_entropy(
            row.float(), row_labels, ignore_index=_IGNORED, reduction="sum"
        ).item()
    mean = total / count
    return math.exp(mean) if mean < 700.0 else math.inf  # of which exp overflows


def _labels(batch: Batch) -> Tensor | None:
    if isinstance(batch, Tensor):
        return None if batch.is_floating_point() else batch
    labels = batch.get("labels")
    if labels is None:
        labels, mask = batch.get("input_ids"), batch.get("attention_mask")
        if labels is not None and mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, _IGNORED)
    return labels if isinstance(labels, Tensor) else None


@contextlib.contextmanager
def applying(chosen: Mapping[LoRALinear, Sequence[str]]) -> Iterator[None]:
    """Inside, every layer applies all of its chosen adapters to all rows, whatever is in force."""
    in_force = {layer: layer.routing.names for layer in chosen}
    try:
        for layer, names in chosen.items():
            layer.routing.change(names[0] if len(names) == 1 else None)
            if len(names) > 1:  # which no routing says
                layer.__dict__["forward"] = partial(_forward_of_all, layer, names)
        yield
    finally:
        for layer, before in in_force.items():
            layer.__dict__.pop("forward", None)
            layer.routing.change(before)


def _forward_of_all(layer: LoRALinear, names: Sequence[str], x: Tensor) -> Tensor:
    """base(x) and what each adapter alone changes of that."""
    adapters = [layer.adapters[name] for name in names]
    if not any(adapter.use_dora for adapter in adapters):
        rows = math.prod(x.shape[:-1])
        groups = [LoRAGroup(0, rows, adapter.factors(0.0, None)) for adapter in adapters]
        return lora_forward(layer.base, x, groups)
    base = y = layer.base(x)
    for name in names:
        layer.routing.change(name)
        y = y + (LoRALinear.forward(layer, x) - base)
    return y


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module of `model` is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
