import pytest
import torch

from qlora_native.cli.batches import Example, ordered_batches, pad_batch, shuffled_batches


def make_examples(count):
    return [Example([1 + i] * (1 + i % 7), [1 + i] * (1 + i % 7)) for i in range(count)]


def test_padding_carries_no_label():
    batch = pad_batch([Example([5, 6, 7], [-100, 6, 7]), Example([8], [8])], pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch.token_count == 4


def test_an_epoch_has_every_example_once_and_then_they_come_anew():
    batches = list(shuffled_batches(make_examples(10), batch_size=4, steps=6, seed=0))
    seen = [int(row[0]) for batch in batches for row in batch.input_ids]
    assert [len(batch.input_ids) for batch in batches].count(2) == 2  # 4 + 4 + 2, twice
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11))
    assert seen[:10] != seen[10:]


def test_the_seed_decides_the_order():
    def order(seed):
        batches = shuffled_batches(make_examples(40), batch_size=4, steps=10, seed=seed)
        return [batch.input_ids.tolist() for batch in batches]

    assert order(0) == order(0) != order(1)


def test_ordered_batches_hold_every_example_once():
    batches = list(ordered_batches(make_examples(10), batch_size=3))
    assert sum(len(batch.input_ids) for batch in batches) == 10
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    assert torch.cat([batch.input_ids[:, 0] for batch in batches]).unique().numel() == 10


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="examples is empty"):
        next(shuffled_batches([], batch_size=2, steps=1, seed=0))
