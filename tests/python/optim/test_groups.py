"""Parameter groups: settings of their own, schedulers, and what is refused."""

import math
import re

import pytest
import torch
from optimizers import (
    ADAMW,
    ALL,
    clones,
    is_in_pages,
    make_parameters,
    nothing_changes,
    over_adamw,
    over_all,
    parameters_of,
    same_run,
    set_gradients,
    stepped,
    take_steps,
)
from torch import nn
from torch._subclasses import FakeTensorMode

from support import same_bits


@over_all
def test_groups_are_stepped_with_settings_of_their_own(optimizer_class):
    parameters = make_parameters(shapes=[(5000,), (300,), (300,), (5000,)])
    alone = clones(parameters)
    settings = [
        {"lr": 0.1, "weight_decay": 0.5},
        {"betas": (0.5, 0.6)},
        {"maximize": True, "lr": torch.tensor(1e-3)},
        {},
    ]
    defaults = {"lr": 1e-2, "weight_decay": 0.1}
    together = optimizer_class(
        [{"params": [p], **own} for p, own in zip(parameters, settings, strict=True)], **defaults
    )
    separate = [
        optimizer_class([p], **{**defaults, **own}) for p, own in zip(alone, settings, strict=True)
    ]
    for step in range(4):
        set_gradients(step, parameters, alone)
        for optimizer in (together, *separate):
            optimizer.step()
    assert all(map(same_bits, parameters, alone))


@over_all
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_group_may_be_added_before_and_after_steps(optimizer_class, steps_before):
    parameters = make_parameters(shapes=[(5000,), (300,), (5000,), (20,)])
    alone = clones(parameters)
    together = optimizer_class(parameters[:2], lr=1e-2)
    separate = [optimizer_class(alone[:2], lr=1e-2), optimizer_class(alone[2:], lr=0.1)]
    for step in range(5):
        if step == steps_before:
            together.add_param_group({"params": parameters[2:], "lr": 0.1})
        set_gradients(step, parameters, alone)
        together.step()
        separate[0].step()
        if step >= steps_before:
            separate[1].step()
        assert is_in_pages(together)
    assert all(map(same_bits, parameters, alone))
    assert together.state[parameters[0]]["step"] == 5
    assert together.state[parameters[3]]["step"] == 5 - steps_before


@over_all
def test_a_parameter_is_in_one_group(optimizer_class):
    (p,) = make_parameters(shapes=[(300,)])
    optimizer = optimizer_class([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty parameter list"):
        optimizer_class([])


# ---- schedulers


@over_all
def test_a_scheduler_and_a_tensor_rate_are_followed(optimizer_class):
    plain = make_parameters(shapes=[(5000,), (300,)])
    scheduled, tensors = clones(plain), clones(plain)
    by_hand = optimizer_class(plain, lr=1e-2)
    by_scheduler = optimizer_class(scheduled, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(by_scheduler, lambda step: 0.5**step)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    by_tensor = optimizer_class(tensors, lr=rate)
    for step in range(5):
        set_gradients(step, plain, scheduled, tensors)
        by_hand.param_groups[0]["lr"] = 1e-2 * 0.5**step
        rate.fill_(1e-2 * 0.5**step)
        for optimizer in (by_hand, by_scheduler, by_tensor):
            optimizer.step()
        scheduler.step()
    assert same_run(by_hand, by_scheduler)
    assert same_run(by_hand, by_tensor)


@over_all
@pytest.mark.parametrize("rate", [1e-2, torch.tensor([1e-2])], ids=["float", "tensor"])
def test_one_cycle_sets_the_rate_and_the_betas(optimizer_class, rate):
    scheduled, plain = (make_parameters(shapes=[(5000,), (300,)]) for _ in range(2))
    a = optimizer_class(scheduled, lr=rate)
    b = optimizer_class(plain, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(a, max_lr=0.1, total_steps=8)
    seen = set()
    for step in range(6):
        set_gradients(step, scheduled, plain)
        group = a.param_groups[0]
        seen.add((float(group["lr"]), group["betas"][0]))
        b.param_groups[0].update(lr=float(group["lr"]), betas=group["betas"])
        a.step()
        b.step()
        scheduler.step()
    assert len(seen) == 6
    assert isinstance(a.param_groups[0]["lr"], type(rate))
    assert same_run(a, b)


@over_all
def test_a_scheduler_resumes_with_its_optimiser(optimizer_class):
    def make(parameters):
        optimizer = optimizer_class(parameters, lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    a, scheduler_a = make(make_parameters(shapes=[(5000,), (300,)]))
    for step in range(3):
        take_steps(a, [step])
        scheduler_a.step()
    b, scheduler_b = make(clones(parameters_of(a)))
    b.load_state_dict(a.state_dict())
    scheduler_b.load_state_dict(scheduler_a.state_dict())
    for step in range(3, 6):
        for optimizer, scheduler in ((a, scheduler_a), (b, scheduler_b)):
            take_steps(optimizer, [step])
            scheduler.step()
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] < 1e-2
    assert same_run(a, b)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr is -0.001, want a finite number of at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0|lr is tensor"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"eps": math.nan}, "eps is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] is 1.0, want 0 <= beta < 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": (0.9, math.nan)}, r"betas\[1\] is nan"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\), want two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas is \(0.9, 0.99, 0.999\), want"),
    ],
    ids=str,
)
@over_all
def test_invalid_numbers_are_refused(optimizer_class, options, message):
    if "eps" in options and optimizer_class not in ADAMW:
        with pytest.raises(TypeError, match="eps"):
            optimizer_class(make_parameters(shapes=[(3,)]), **options)
        return
    message = f"{optimizer_class.__name__}: {message}"
    with pytest.raises(ValueError, match=message):
        optimizer_class(make_parameters(shapes=[(3,)]), **options)
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(3,)]))
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make_parameters(shapes=[(4,)]), **options})
    settings = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[0].update(settings)
    take_steps(optimizer, [3])


@over_all
@pytest.mark.parametrize("setting", ["weight_decay", "betas[1]", "eps"])
def test_a_number_on_a_gpu_is_refused_but_for_the_rate(optimizer_class, setting):
    if setting == "eps" and optimizer_class not in ADAMW:
        pytest.skip("Lion has no eps")
    p = nn.Parameter(torch.ones(3))
    with FakeTensorMode():
        number = torch.tensor(0.1, device="cuda:1")
    optimizer_class([p], lr=number)
    options = {"betas": (0.9, number)} if setting == "betas[1]" else {setting: number}
    message = re.escape(f"{setting} is a tensor on cuda:1, want a number: only lr is read on a")
    with pytest.raises(ValueError, match=message):
        optimizer_class([p], **options)


@over_adamw
def test_amsgrad_is_refused_by_name(optimizer_class):
    message = f"{optimizer_class.__name__}: amsgrad is not done here; torch.optim.AdamW has it"
    with pytest.raises(NotImplementedError, match=message):
        optimizer_class(make_parameters(shapes=[(3,)]), amsgrad=True)
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(3,)]))
    with nothing_changes(optimizer), pytest.raises(NotImplementedError, match=message):
        optimizer.add_param_group({"params": make_parameters(shapes=[(4,)]), "amsgrad": True})
    optimizer.param_groups[0]["amsgrad"] = True
    with nothing_changes(optimizer), pytest.raises(NotImplementedError, match=message):
        optimizer.step()


def test_arguments_have_one_order_in_all():
    """As torch.optim.AdamW's and bitsandbytes': the first are given by place, too."""
    p = make_parameters(shapes=[(3,)])
    for optimizer_class in ALL:
        rest = (1e-5, 0.3) if optimizer_class in ADAMW else (0.3,)
        group = optimizer_class(p, 0.1, (0.8, 0.7), *rest).param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.8, 0.7), 0.3)
        assert group.get("eps", 1e-5) == 1e-5
