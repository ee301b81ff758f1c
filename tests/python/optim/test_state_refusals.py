"""State dicts that an optimiser refuses, by name; nothing is lost or changed then."""

import math

import pytest
import torch
from optimizers import (
    ADAMW,
    ALL,
    IN_8_BITS,
    clones,
    make_parameters,
    nothing_changes,
    over_8_bits,
    over_32_bits,
    over_adamw,
    over_all,
    stepped,
    take_steps,
)

from qlora_native import PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit


def refused(optimizer: torch.optim.Optimizer, state_dict: dict, message: str) -> None:
    """Also by one that has no state yet; and it goes on."""
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    fresh = type(optimizer)([{**g, "params": clones(g["params"])} for g in optimizer.param_groups])
    with nothing_changes(fresh), pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state_dict)
    assert not fresh.state
    take_steps(optimizer, [9])


SHAPES = [(30,), (5000,)]
HAS = r"state of parameter 1 has \['exp_avg"
REFUSALS = {
    (PagedAdamW, PagedAdamW8bit): rf"PagedAdamW: {HAS}', 'exp_avg_absmax', .*\], want",
    (PagedAdamW, PagedLion): "PagedAdamW: the state dict is of another kind .* has no eps",
    (PagedAdamW, PagedLion8bit): "PagedAdamW: the state dict is of another kind .* has no eps",
    (PagedAdamW8bit, PagedAdamW): rf"PagedAdamW8bit: {HAS}', 'exp_avg_sq', 'step'\], want",
    (PagedAdamW8bit, PagedLion): "PagedAdamW8bit: .* of another kind .* has no eps",
    (PagedAdamW8bit, PagedLion8bit): "PagedAdamW8bit: .* of another kind .* has no eps",
    (PagedLion, PagedAdamW): "PagedLion: .* of another kind .* has eps, which Lion has not",
    (PagedLion, PagedAdamW8bit): "PagedLion: .* of another kind .* has eps",
    (PagedLion, PagedLion8bit): rf"PagedLion: {HAS}', 'exp_avg_absmax', 'step'\], want",
    (PagedLion8bit, PagedAdamW): "PagedLion8bit: .* of another kind .* has eps",
    (PagedLion8bit, PagedAdamW8bit): "PagedLion8bit: .* of another kind .* has eps",
    (PagedLion8bit, PagedLion): rf"PagedLion8bit: {HAS}', 'step'\], want",
}


@pytest.mark.parametrize(
    ("optimizer_class", "source_class"),
    REFUSALS,
    ids=lambda c: c.__name__,
)
def test_the_state_of_another_of_the_four_is_refused(optimizer_class, source_class):
    parameters = make_parameters(shapes=SHAPES)
    optimizer = stepped(optimizer_class, clones(parameters))
    source = stepped(source_class, parameters)
    refused(optimizer, source.state_dict(), REFUSALS[optimizer_class, source_class])


def test_all_pairs_are_there():
    assert set(REFUSALS) == {(a, b) for a in ALL for b in ALL if a is not b}


@over_all
@pytest.mark.parametrize(
    ("source_class", "message"),
    [
        (torch.optim.SGD, "another kind of optimiser: a group has no betas"),
        (torch.optim.Adagrad, "another kind of optimiser: a group has no betas"),
        (torch.optim.Adam, "of Adam, whose weight decay is not decoupled"),
        (torch.optim.Adamax, "a group has no amsgrad|not decoupled"),
        (torch.optim.NAdam, "a group has no amsgrad|not decoupled"),
    ],
    ids=lambda c: getattr(c, "__name__", ""),
)
def test_the_state_of_another_algorithm_is_refused(optimizer_class, source_class, message):
    parameters = make_parameters(shapes=[(30,)])
    source = stepped(source_class, clones(parameters))
    if optimizer_class not in ADAMW:
        message = "another kind of optimiser: a group has (no betas|eps)"
    elif source_class is torch.optim.Adam and "decoupled_weight_decay" not in source.defaults:
        pytest.skip(f"the state of Adam of torch {torch.__version__} is that of AdamW")
    refused(stepped(optimizer_class, parameters), source.state_dict(), message)


@pytest.mark.parametrize("optimizer_class", [PagedAdamW8bit, PagedLion, PagedLion8bit])
def test_the_state_of_torch_is_of_32_bit_adamw_alone(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    source = stepped(torch.optim.AdamW, clones(parameters))
    message = f"{optimizer_class.__name__}: ({HAS}|.* a group has eps)"
    refused(stepped(optimizer_class, parameters), source.state_dict(), message)


@over_adamw
def test_the_state_of_amsgrad_is_refused(optimizer_class):
    parameters = make_parameters(shapes=[(30,)])
    source = stepped(torch.optim.AdamW, clones(parameters), amsgrad=True)
    refused(stepped(optimizer_class, parameters), source.state_dict(), "of AdamW with amsgrad")


# ---- shapes


@over_all
@pytest.mark.parametrize("shapes", [[(30,), (50, 100)], [(5000,), (30,)], [(30,), (5001,)]])
def test_state_of_other_shapes_is_refused(optimizer_class, shapes):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(30,), (100, 50)]), lr=0.3)
    source = stepped(optimizer_class, make_parameters(shapes=shapes), lr=0.5)
    message = rf"{optimizer_class.__name__}: state of parameter [01].* (has shape .*, want|has \[)"
    refused(optimizer, source.state_dict(), message)


@over_all
def test_another_number_of_parameters_or_groups_is_refused(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(30,), (40,)]))
    fewer = stepped(optimizer_class, make_parameters(shapes=[(30,)]))
    refused(optimizer, fewer.state_dict(), r"groups of \[1\] parameters, want \[2\]")
    a, b = make_parameters(shapes=[(30,), (40,)])
    split = stepped(optimizer_class, [a])
    split.add_param_group({"params": [b]})
    refused(optimizer, split.state_dict(), r"groups of \[1, 1\] parameters, want \[2\]")


@over_8_bits
def test_a_refused_size_names_the_setting_that_decides_it(optimizer_class):
    parameters = make_parameters(shapes=[(5000,)])
    source = stepped(optimizer_class, clones(parameters))
    other = stepped(optimizer_class, parameters, min_8bit_size=8192)
    with nothing_changes(other), pytest.raises(ValueError, match="min_8bit_size is 8192 here"):
        other.load_state_dict(source.state_dict())


# ---- damage


def test_numbers_out_of_range_are_refused():
    for optimizer_class in ALL:
        parameters = make_parameters(shapes=[(30,)])
        state_dict = stepped(optimizer_class, clones(parameters)).state_dict()
        state_dict["param_groups"][0]["lr"] = -1.0
        refused(stepped(optimizer_class, parameters), state_dict, "lr is -1.0")


def damaged(optimizer_class: type, **changes) -> tuple[torch.optim.Optimizer, dict]:
    """An optimiser, and a state dict of its like that is changed; None removes."""
    parameters = make_parameters(shapes=[(5000,)])
    state_dict = stepped(optimizer_class, clones(parameters)).state_dict()
    state = {**state_dict["state"][0], **changes}
    state_dict["state"][0] = {name: v for name, v in state.items() if v is not None}
    return stepped(optimizer_class, parameters, steps=2), state_dict


@over_8_bits
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", torch.zeros(5000), "exp_avg is torch.float32, want torch.uint8"),
        ("exp_avg", torch.zeros(5001).byte(), r"exp_avg has shape \[5001\], want \[5000\]"),
        ("exp_avg_absmax", torch.zeros(19), r"exp_avg_absmax has shape \[19\], want \[20\]"),
        ("exp_avg_absmax", torch.zeros(20).half(), "exp_avg_absmax is torch.float16"),
        ("exp_avg_absmax", None, r"has \[.*\], want \['exp_avg', .*'exp_avg_absmax'|want"),
    ],
)
def test_damaged_8_bit_state_is_refused(optimizer_class, name, value, message):
    names = [name, name.replace("exp_avg", "exp_avg_sq")] if optimizer_class in ADAMW else [name]
    for each in names:
        optimizer, state_dict = damaged(optimizer_class, **{each: value})
        refused(optimizer, state_dict, message.replace(name, each))


@over_32_bits
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(5000, dtype=torch.uint8), "exp_avg is torch.uint8, want a float dtype"),
        (torch.zeros(1), r"exp_avg has shape \[1\], want \[5000\]"),
        ([0.0] * 5000, "exp_avg is a list, want a tensor"),
        (None, r"has \[.*'step'\], want \['exp_avg'"),
    ],
    ids=["dtype", "shape", "list", "missing"],
)
def test_damaged_32_bit_state_is_refused(optimizer_class, value, message):
    refused(*damaged(optimizer_class, exp_avg=value), message)


@over_all
def test_state_with_more_in_it_is_refused(optimizer_class):
    optimizer, state_dict = damaged(optimizer_class, momentum_buffer=torch.zeros(5000))
    refused(optimizer, state_dict, "parameter 0 has .*'momentum_buffer'.*, want")


@over_all
@pytest.mark.parametrize(
    "step",
    [torch.zeros(2), torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(2.5), "three", -1],
    ids=str,
)
def test_a_step_that_counts_nothing_is_refused(optimizer_class, step):
    optimizer, state_dict = damaged(optimizer_class, step=step)
    message = f"{optimizer_class.__name__}: state of parameter 0: step is .*, want a whole number"
    refused(optimizer, state_dict, message)


@over_all
def test_a_refusal_finds_the_last_parameter_before_the_first_is_loaded(optimizer_class):
    parameters = make_parameters(shapes=[(5000,), (30,), (5000,), (30,)])
    state_dict = stepped(optimizer_class, clones(parameters)).state_dict()
    state_dict["state"][3]["exp_avg"] = torch.zeros(31)
    optimizer = stepped(optimizer_class, parameters, steps=1)
    refused(optimizer, state_dict, r"parameter 3: exp_avg has shape \[31\], want \[30\]")
    assert optimizer_class in ADAMW or optimizer_class in (PagedLion, *IN_8_BITS)
