import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_native.cli.batches import Example, pad_batch, shuffled_batches
from qlora_native.cli.errors import CommandError
from qlora_native.cli.peak_memory import PeakMemory
from qlora_native.cli.training import held_out_loss, language_model_loss, lr_share, train_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


EXAMPLES = [
    Example([i, i + 1, i + 2, 0][: 2 + i % 3], [-100, i + 1, i + 2, 0][: 2 + i % 3])
    for i in range(1, 13)
]


def test_training_learns_and_measures(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = train_model(
        model,
        shuffled_batches(EXAMPLES, 4, 40, seed=0),
        optimizer,
        40,
        description="test",
        evaluate=lambda: held_out_loss(model, EXAMPLES, 4),
        evaluations=4,
    )
    assert len(run.losses) == 40
    assert [step for step, _ in run.held_out] == [0, 10, 20, 30, 40]
    assert run.held_out[-1][1] < 0.2 * run.held_out[0][1]
    parameters = sum(p.numel() for p in model.parameters())
    assert run.weight_bytes == run.gradient_bytes == 4 * parameters
    # Two moments, and a step count of 4 bytes for each parameter tensor.
    assert run.optimizer_state_bytes == 8 * parameters + 4 * len(list(model.parameters()))
    assert run.token_count == 40 / 3 * sum(len(e.input_ids) for e in EXAMPLES)
    assert run.peak_memory_bytes > 4 * 4 * parameters
    assert run.peak_gpu_memory_bytes == 0
    assert run.tokens_per_second > 0
    assert not model.training


def test_held_out_loss_is_the_mean_over_labelled_tokens(model):
    """Against the definition, one example at a time: no padding, no batching."""
    model.eval()
    losses = []
    with torch.no_grad():
        for example in EXAMPLES:
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
            for position in range(1, len(example.labels)):
                target = example.labels[position]
                losses.append(-logits[position - 1].log_softmax(-1)[target].item())
    expected = sum(losses) / len(losses)
    assert held_out_loss(model, EXAMPLES, 5) == pytest.approx(expected, rel=1e-5)


def test_a_batch_goes_to_the_models_device():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, input_ids, labels, use_cache):
            assert input_ids.is_meta
            assert labels.is_meta
            return SimpleNamespace(loss=self.weight.sum())

    batch = pad_batch(EXAMPLES)
    assert not batch.input_ids.is_meta
    assert language_model_loss(Model(), batch).is_meta


def test_held_out_loss_without_a_label_is_an_error(model):
    with pytest.raises(ValueError, match="no token with a label"):
        held_out_loss(model, [Example([1, 2], [1, -100])], 1)


def test_a_loss_that_is_not_finite_stops_the_training(model):
    nn.init.constant_(model.lm_head.weight, math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CommandError, match="the loss is nan at step 1"):
        train_model(model, [pad_batch(EXAMPLES)], optimizer, 1, description="test")


def test_the_learning_rate_rises_then_falls():
    shares = [lr_share(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[5] == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0.05 < shares[-1] < 0.07
    assert lr_share(0, 1) == 1.0


def test_peak_memory_sees_what_was_freed_again():
    before = PeakMemory()
    start = before.read_bytes()
    held = torch.ones(100_000_000, dtype=torch.uint8)
    del held
    assert before.read_bytes() >= start + 90_000_000


def test_peak_memory_counts_from_its_making():
    held = torch.ones(100_000_000, dtype=torch.uint8)
    high = PeakMemory().read_bytes()
    del held
    peak = PeakMemory()
    if peak.since_start:
        pytest.skip("this system does not let a process reset its peak")
    assert peak.read_bytes() <= high - 90_000_000
