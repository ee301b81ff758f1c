"""Runs of bitsandbytes that this library goes on from: load_state_dict takes its state as it is."""

import copy
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes_runs import (
    flat,
    groups_of,
    import_or_skip,
    set_model_gradients,
    step_with,
    train_with,
)
from optimizers import (
    ADAMW,
    BLOCK,
    decode,
    is_in_pages,
    moments_of,
    nothing_changes,
    parameters_of,
    same_run,
    saved_and_loaded,
)
from torch import Tensor, nn

from qlora_native import PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit
from qlora_native.optim.bitsandbytes_state import from_bitsandbytes
from support import FP32_ROUNDOFF

LR = 1e-2


@pytest.fixture(scope="module")
def bnb():
    return import_or_skip()


@pytest.fixture
def train(bnb):
    return lambda *arguments, **options: train_with(bnb, *arguments, **options)


def go_on(run: SimpleNamespace, optimizer_class, **options) -> SimpleNamespace:
    """A copy of the model, with an optimiser that has loaded the run's state from a file."""
    model = copy.deepcopy(run.model)
    model.zero_grad()
    optimizer = optimizer_class(groups_of(model), **options)
    optimizer.load_state_dict(saved_and_loaded(run.optimizer.state_dict()))
    return SimpleNamespace(model=model, optimizer=optimizer)


def both_step(ours: SimpleNamespace, theirs: SimpleNamespace, seed: int) -> list[Tensor]:
    """Returns the parameters before."""
    before = [p.detach().clone() for p in theirs.model.parameters()]
    step_with(theirs, seed)
    ours.model.zero_grad()
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    ours.optimizer.step()
    return before


def check_parameters(ours: nn.Module, theirs: nn.Module, before: list[Tensor]) -> None:
    """Within a few roundings of the terms of the step, and one to the parameter's dtype."""
    moved = 0
    for p, q, start in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        step = (q - start).float().abs()
        moved += int(step.any())
        allowed = 8 * FP32_ROUNDOFF * (start.float().abs() + step) + 64 * FP32_ROUNDOFF * LR
        if p.dtype != torch.float32:
            allowed += torch.finfo(p.dtype).eps * q.float().abs()
        assert ((p - q).float().abs() <= allowed).float().mean() > 0.999  # Lion: another sign
    assert moved == len(before) - 1


@pytest.mark.parametrize(
    ("name", "optimizer_class"),
    [
        ("Adam", PagedAdamW),
        ("AdamW", PagedAdamW),
        ("PagedAdamW32bit", PagedAdamW),
        ("Lion", PagedLion),
        ("PagedLion32bit", PagedLion),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_next_step_in_32_bits_is_that_of_bitsandbytes(train, name, optimizer_class, dtype):
    theirs = train(name, dtype=dtype)
    ours = go_on(theirs, optimizer_class)
    assert is_in_pages(ours.optimizer)
    check_parameters(ours.model, theirs.model, both_step(ours, theirs, 3))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        if q.grad is None:
            continue
        state, expected = ours.optimizer.state[p], theirs.optimizer.state[q]
        assert state["step"] == expected["step"] == 4
        g = q.grad.float().abs()
        for n, moment in enumerate(moments_of(optimizer_class), 1):
            term = g if n == 1 else g * g
            allowed = 4 * FP32_ROUNDOFF * (expected[f"state{n}"].abs() + term)
            assert ((state[moment] - expected[f"state{n}"]).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("name", "optimizer_class"),
    [
        ("Adam8bit", PagedAdamW8bit),
        ("AdamW8bit", PagedAdamW8bit),
        ("PagedAdamW8bit", PagedAdamW8bit),
        ("Lion8bit", PagedLion8bit),
        ("PagedLion8bit", PagedLion8bit),
    ],
)
def test_the_next_step_in_8_bits_is_that_of_bitsandbytes(train, name, optimizer_class):
    theirs = train(name)
    ours = go_on(theirs, optimizer_class)
    check_parameters(ours.model, theirs.model, both_step(ours, theirs, 3))
    expected_states = from_bitsandbytes(theirs.optimizer.state_dict())["state"]
    count = 0
    for i, p in enumerate(parameters_of(ours.optimizer)):
        if p.grad is None or p.numel() < 4096:
            continue
        count += 1
        state, expected = ours.optimizer.state[p], expected_states[i]
        assert state["step"] == expected["step"] == 4
        for moment in moments_of(optimizer_class):
            absmax = expected[f"{moment}_absmax"]
            assert absmax.shape == (-(-p.numel() // BLOCK),)
            torch.testing.assert_close(state[f"{moment}_absmax"], absmax, rtol=1e-6, atol=0)
            # It looks codes up in a table of bins: near zero entries are closer than those.
            apart = (state[moment].int() - expected[moment].int()).abs()
            difference = (decode(state, moment) - decode(expected, moment)).abs()
            assert ((apart <= 1) | (difference <= 1e-4 * absmax.max())).all()
            assert (apart > 0).float().mean() < 0.01
    assert count == 4


@pytest.mark.parametrize(
    ("name", "optimizer_class"),
    [
        ("AdamW", PagedAdamW),
        ("AdamW8bit", PagedAdamW8bit),
        ("Lion", PagedLion),
        ("Lion8bit", PagedLion8bit),
    ],
)
def test_training_goes_on_as_with_bitsandbytes(train, name, optimizer_class):
    """The losses of ten steps more; and older versions' dicts load alike."""
    theirs = train(name, lr=1e-3)
    ours = go_on(theirs, optimizer_class)
    older = optimizer_class(groups_of(copy.deepcopy(ours.model)))
    older.load_state_dict(flat(theirs.optimizer.state_dict()))
    assert same_run(older, ours.optimizer)
    for group in ours.optimizer.param_groups:
        assert group["lr"] in (1e-3, 3e-3)
        assert group["maximize"] is group["stochastic_rounding"] is False
    losses: list[list[float]] = []
    for run in (ours, theirs):
        losses.append([])
        for seed in range(3, 13):
            set_model_gradients(run.model, seed)
            losses[-1].append(loss_of(run.model))
            if run is theirs:
                step_with(run, seed)
            else:
                run.optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def loss_of(model: nn.Module) -> float:
    tokens = torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(tokens[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(y, tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("name", "optimizer_class", "message"),
    [
        ("AdamW8bit", PagedAdamW, "PagedAdamW: .*'exp_avg_absmax'"),
        ("AdamW", PagedAdamW8bit, "PagedAdamW8bit: state of parameter 1 has .*min_8bit_size is"),
        ("Lion8bit", PagedLion, "PagedLion: .*'exp_avg_absmax'"),
        ("Lion", PagedLion8bit, "PagedLion8bit: state of parameter 1 has .*min_8bit_size is"),
        ("Lion", PagedAdamW, "PagedAdamW: .* another kind of optimiser: a group has no eps"),
        ("Lion8bit", PagedAdamW8bit, "PagedAdamW8bit: .* a group has no eps"),
        ("AdamW", PagedLion, "PagedLion: .* another kind of optimiser: a group has eps"),
        ("AdamW8bit", PagedLion8bit, "PagedLion8bit: .* a group has eps"),
    ],
)
def test_state_of_another_rule_or_width_is_refused(train, name, optimizer_class, message):
    run = train(name)
    optimizer = optimizer_class(groups_of(copy.deepcopy(run.model)))
    set_model_gradients(run.model, 1)
    for p, q in zip(parameters_of(optimizer), parameters_of(run.optimizer), strict=True):
        p.grad = q.grad
    optimizer.step()
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(run.optimizer.state_dict())
    optimizer.step()


def test_what_has_no_equivalent_is_refused_and_changes_nothing(bnb):
    (p,), (q,) = ([nn.Parameter(torch.ones(5000))] for _ in range(2))
    theirs = bnb.optim.LAMB([q])
    p.grad = q.grad = torch.ones(5000)
    theirs.step()
    for optimizer_class in (*ADAMW, PagedLion, PagedLion8bit):
        optimizer = optimizer_class([p])
        optimizer.step()
        with nothing_changes(optimizer), pytest.raises(ValueError, match=r"unorm_vec|another kind"):
            optimizer.load_state_dict(theirs.state_dict())
