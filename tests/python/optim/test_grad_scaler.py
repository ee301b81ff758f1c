"""The protocol of torch.amp.GradScaler: gradients are unscaled, and steps skipped, by the step."""

import math

import pytest
import torch
from optimizers import (
    clones,
    make_parameters,
    over_adamw,
    over_all,
    same_run,
    set_gradients,
)
from torch import nn

from qlora_native import PagedAdamW
from support import same_bits

SHAPES = [(5000,), (300,), (), (0,)]


def scaler_of(scale: float, **options) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(device="cpu", init_scale=scale, **options)
    scaler.scale(torch.zeros(()))  # makes its tensors
    return scaler


def scale_gradients(parameters: list[nn.Parameter], scale: float) -> None:
    for p in parameters:
        p.grad *= scale


@over_all
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_scaled_gradients_give_the_step_of_the_plain_ones(optimizer_class, scale):
    plain = make_parameters(shapes=SHAPES)
    scaled = clones(plain)
    a, b = optimizer_class(plain, lr=1e-2), optimizer_class(scaled, lr=1e-2)
    scaler = scaler_of(scale)
    for step in range(4):
        set_gradients(step, plain, scaled)
        scale_gradients(scaled, scale)
        before = [p.grad.clone() for p in scaled]
        a.step()
        scaler.step(b)
        scaler.update()
        for p, grad in zip(scaled, before, strict=True):
            assert same_bits(p.grad, grad)  # unscaled inside the step alone
    assert same_run(a, b)


@over_all
def test_unscaling_inside_the_step_is_unscaling_before_it(optimizer_class):
    # By a scale that is no power of two, so that it rounds.
    inside = make_parameters(shapes=SHAPES)
    before = clones(inside)
    a, b = optimizer_class(inside, lr=1e-2), optimizer_class(before, lr=1e-2)
    scaler_a, scaler_b = scaler_of(1000.0), scaler_of(1000.0)
    for step in range(3):
        set_gradients(step, inside, before)
        for p in (*inside, *before):
            p.grad *= 1000.0
        scaler_a.step(a)
        scaler_b.unscale_(b)
        scaler_b.step(b)
        scaler_a.update()
        scaler_b.update()
    assert same_run(a, b)


@over_all
def test_a_step_that_finds_inf_changes_nothing_and_does_not_count(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    expected = clones(parameters)
    a, b = optimizer_class(parameters, lr=1e-2), optimizer_class(expected, lr=1e-2)
    scaler = scaler_of(8.0, growth_interval=1000)
    for step in range(6):
        set_gradients(step, parameters, expected)
        scale_gradients(parameters, scaler.get_scale())
        is_bad = step in (0, 3, 4)
        if is_bad:
            parameters[0].grad[700] = math.inf if step else math.nan
        else:
            b.step()
        scaler.step(a)
        scaler.update()
        if is_bad:
            for p, q in zip(parameters, expected, strict=True):
                assert same_bits(p, q)
    assert scaler.get_scale() == 1.0
    assert [a.state[p]["step"].item() for p in parameters] == [3.0] * len(SHAPES)
    assert same_run(a, b)


def test_gradients_that_are_clipped_between_unscaling_and_the_step():
    clipped, reference = make_parameters(shapes=SHAPES), make_parameters(shapes=SHAPES)
    a, b = PagedAdamW(clipped, lr=1e-2), PagedAdamW(reference, lr=1e-2)
    scaler = scaler_of(64.0)
    set_gradients(0, clipped, reference)
    scale_gradients(clipped, 64.0)
    scaler.unscale_(a)
    for parameters in (clipped, reference):
        nn.utils.clip_grad_norm_(parameters, 0.5)
    scaler.step(a)
    b.step()
    assert same_run(a, b)


def test_fp16_gradients_are_unscaled_without_rounding_them():
    # 2^-20 is subnormal in fp16: unscaled in place, most of its bits would be lost.
    p = nn.Parameter(torch.ones(3000, dtype=torch.float16))
    exact = nn.Parameter(torch.ones(3000, dtype=torch.float16))
    gradient = torch.randn(3000).half()
    p.grad, exact.grad = gradient, None
    scaler = scaler_of(2.0**20)
    optimizer = PagedAdamW([p], lr=0.1)
    scaler.step(optimizer)
    expected = 0.1 * gradient.float() * 2.0**-20
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, rtol=1e-6, atol=0)


@over_all
def test_a_scale_that_the_user_sets_divides_the_gradients(optimizer_class):
    # As of torch's fused optimisers: a norm over its limit can be folded into the step.
    parameters, expected = make_parameters(shapes=SHAPES), make_parameters(shapes=SHAPES)
    a, b = optimizer_class(parameters), optimizer_class(expected)
    set_gradients(0, parameters, expected)
    for p in expected:
        p.grad /= 4.0
    a.grad_scale = torch.tensor(4.0)
    a.step()
    b.step()
    for p, q in zip(parameters, expected, strict=True):
        assert same_bits(p, q)


@over_adamw
def test_the_scaler_follows_torch_fused(optimizer_class):
    ours = make_parameters(shapes=[(40, 50), (7,)])
    theirs = clones(ours)
    a, b = optimizer_class(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    scaler_a, scaler_b = scaler_of(16.0), scaler_of(16.0)
    for step in range(5):
        set_gradients(step, ours, theirs)
        for p in (*ours, *theirs):
            p.grad *= scaler_a.get_scale()
        if step == 2:
            ours[0].grad[0, 0] = theirs[0].grad[0, 0] = math.inf
        for scaler, optimizer in ((scaler_a, a), (scaler_b, b)):
            scaler.step(optimizer)
            scaler.update()
        assert scaler_a.get_scale() == scaler_b.get_scale()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
            assert a.state[p]["step"] == b.state[q]["step"]
            p.data.copy_(q)


@over_all
def test_steps_are_counted_on_the_device_of_each_parameter(optimizer_class):
    """Where a skipped step of a GPU need not tell the host that it was."""
    parameters = make_parameters(shapes=SHAPES)
    optimizer = optimizer_class(parameters)
    for step in range(4):
        set_gradients(step, parameters)
        if step == 1:
            parameters[1].grad = None
        optimizer.step()
    steps = [optimizer.state[p]["step"] for p in parameters]
    assert [step.item() for step in steps] == [4.0, 3.0, 4.0, 4.0]
    for step in steps:
        assert (step.device, step.dtype, step.shape) == (parameters[0].device, torch.float32, ())


@over_all
def test_a_number_of_another_kind_is_refused_by_name(optimizer_class):
    p = nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    optimizer = optimizer_class([p])
    optimizer.found_inf = torch.zeros(2)
    with pytest.raises(ValueError, match=r"found_inf of shape \[2\] has 2 elements, want 1"):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state
