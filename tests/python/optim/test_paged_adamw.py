"""PagedAdamW against torch.optim.AdamW and against fp64."""

import math

import pytest
import torch
from optimizers import clones, make_parameters, over_adamw, set_gradients
from torch import nn

from qlora_native import PagedAdamW
from support import over_dtypes

OPTIONS = {
    "defaults": {},
    "large rate": {"lr": 0.1, "weight_decay": 0.1},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"betas": (0.0, 0.99)},
    "no memory": {"betas": (0.9, 0.0), "eps": 1e-2},
    "long memory": {"betas": (0.99, 0.99999), "lr": 1e-2},
    "large eps": {"eps": 1e-2, "lr": 1e-2},
    "no eps": {"eps": 0.0},
    "maximize": {"maximize": True, "lr": 1e-2},
    "no rate": {"lr": 0.0},
}


@pytest.mark.slow
def test_a_thousand_steps_follow_torch_to_fp32_rounding():
    # Both round in fp32: each may be as far from the result in fp64 as the other. Every group has
    # settings of its own.
    ours = make_parameters(shapes=[(513,)] * len(OPTIONS))
    theirs, exact = clones(ours), clones(ours, torch.float64)

    def groups(parameters: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": [p], **options}
            for p, options in zip(parameters, OPTIONS.values(), strict=True)
        ]

    optimizers = [
        PagedAdamW(groups(ours)),
        torch.optim.AdamW(groups(theirs)),
        torch.optim.AdamW(groups(exact)),
    ]
    for step in range(1000):
        set_gradients(step, ours, theirs, exact)
        for optimizer in optimizers:
            optimizer.step()
    for name, p, q, e in zip(OPTIONS, ours, theirs, exact, strict=True):
        our_error, their_error = (p.double() - e).abs().max(), (q.double() - e).abs().max()
        rounding = 2.0**-24 * e.abs().max()
        assert our_error <= 2 * their_error + 4 * rounding, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_step_follows_torch_closely(options):
    ours = make_parameters()
    theirs = clones(ours)
    a, b = PagedAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(20):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            p.data.copy_(q)


@over_dtypes
def test_parameters_of_every_dtype_are_stepped_in_fp32_and_rounded_once(dtype):
    parameters = make_parameters(dtype)
    exact = clones(parameters, torch.float32)
    optimizer = PagedAdamW(parameters, lr=1e-2)
    reference = torch.optim.AdamW(exact, lr=1e-2)
    for step in range(10):
        set_gradients(step, parameters, exact)
        optimizer.step()
        reference.step()
        for p, e in zip(parameters, exact, strict=True):
            torch.testing.assert_close(
                p.float(), e.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6
            )
            e.data.copy_(p)  # else the roundings of the 16-bit parameter add up
        for p in parameters:
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_groups_have_settings_of_their_own():
    parameters = make_parameters(shapes=[(50,), (50,), (60,)])
    theirs = clones(parameters)

    def groups(ps: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": ps[:1], "lr": 0.1, "weight_decay": 0.5},
            {"params": ps[1:2], "betas": (0.5, 0.5), "maximize": True},
        ]

    a, b = PagedAdamW(groups(parameters), eps=1e-3), torch.optim.AdamW(groups(theirs), eps=1e-3)
    for step in range(5):
        if step == 2:
            a.add_param_group({"params": parameters[2:], "lr": 1.0})
            b.add_param_group({"params": theirs[2:], "lr": 1.0})
        set_gradients(step, parameters, theirs)
        a.step()
        b.step()
    for p, q in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@over_adamw
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_gradient_is_seen_in_the_parameter(optimizer_class, bad):
    # m / sqrt(v) is inf / inf: the parameter becomes NaN, as in torch, not a plausible number.
    p = nn.Parameter(torch.ones(5000))
    optimizer = optimizer_class([p])
    p.grad = torch.ones(5000)
    p.grad[3] = bad
    optimizer.step()
    assert p[3].isnan()
    assert p[256:].isfinite().all()
