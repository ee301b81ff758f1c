"""Examples of token ids, and the padded batches that they are trained in."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NO_LOSS = -100  # transformers' label of a position that the loss leaves out

# Batches are cut from pools of this many, sorted by length, so that little of a batch is padding.
BATCHES_PER_POOL = 16


class Example(NamedTuple):
    """One sequence; `labels` repeats `input_ids` where there is a loss and is NO_LOSS elsewhere."""

    input_ids: Sequence[int]
    labels: Sequence[int]


class Batch(NamedTuple):
    """Examples side by side: `input_ids` and `labels`, int64 [batch, longest].

    There is no attention mask: padding is on the right, where causal attention never looks back
    from, and it carries no loss.
    """

    input_ids: Tensor
    labels: Tensor
    token_count: int  # without padding


def pad_batch(examples: Sequence[Example], pad_token_id: int = 0) -> Batch:
    """Pad on the right to the longest of `examples`."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, NO_LOSS)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return Batch(input_ids, labels, sum(len(example.input_ids) for example in examples))


def shuffled_batches(
    examples: Sequence[Example], batch_size: int, steps: int, seed: int, pad_token_id: int = 0
) -> Iterator[Batch]:
    """`steps` batches; every example once before any comes again, in an order drawn by `seed`."""
    if not examples:
        raise ValueError("shuffled_batches: examples is empty, want at least one")
    generator = random.Random(seed)
    while True:
        order = generator.sample(examples, len(examples))
        for pool in _chunks(order, batch_size * BATCHES_PER_POOL):
            pool = sorted(pool, key=lambda example: len(example.input_ids))
            batches = list(_chunks(pool, batch_size))
            generator.shuffle(batches)
            for batch in batches:
                if steps == 0:
                    return
                steps -= 1
                yield pad_batch(batch, pad_token_id)


def ordered_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int = 0
) -> Iterator[Batch]:
    """Every example once, shortest first."""
    in_order = sorted(examples, key=lambda example: len(example.input_ids))
    for batch in _chunks(in_order, batch_size):
        yield pad_batch(batch, pad_token_id)


def _chunks(items: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    return (items[start : start + size] for start in range(0, len(items), size))
