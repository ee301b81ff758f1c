"""The seed of stochastic rounding: where it comes from, and that a resumed run has it."""

import pytest
import torch
from optimizers import (
    clones,
    make_parameters,
    nothing_changes,
    over_all,
    parameters_of,
    same_run,
    saved_and_loaded,
    set_gradients,
    settings_of,
    snapshot,
    stepped,
    take_steps,
)
from rounding import BF16, SHAPES, make_rounding
from torch import nn

from support import same_bits


@over_all
def test_the_seed_of_torch_decides_the_bits(optimizer_class):
    def run(seed: int) -> torch.optim.Optimizer:
        optimizer = make_rounding(optimizer_class, make_parameters(BF16, SHAPES), seed)
        torch.manual_seed(99)  # what follows does not matter
        take_steps(optimizer, range(3))
        return optimizer

    assert same_run(run(1), run(1))
    assert not same_run(run(1), run(2))
    assert run(1).param_groups[0]["rounding_seed"] != run(2).param_groups[0]["rounding_seed"]


@over_all
def test_torchs_generator_is_asked_once_for_it_and_never_without_it(optimizer_class):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    optimizer = stepped(optimizer_class, make_parameters(BF16, SHAPES))
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.param_groups[0]["rounding_seed"] is None

    stochastic = optimizer_class(make_parameters(BF16, SHAPES), stochastic_rounding=True)
    after = torch.get_rng_state()
    assert not torch.equal(after, before)
    take_steps(stochastic, range(2))
    stochastic.load_state_dict(stochastic.state_dict())
    assert torch.equal(torch.get_rng_state(), after)


@over_all
def test_a_seed_may_be_given(optimizer_class):
    a, b = (
        optimizer_class(
            [
                {
                    "params": make_parameters(BF16, SHAPES),
                    "stochastic_rounding": True,
                    "rounding_seed": 2**64 - 1,
                }
            ]
        )
        for _ in range(2)
    )
    for optimizer in (a, b):
        take_steps(optimizer, range(2))
    assert a.param_groups[0]["rounding_seed"] == 2**64 - 1
    assert same_run(a, b)


@over_all
def test_parameters_of_one_value_are_rounded_each_in_its_own_way(optimizer_class):
    """Also in two groups, and from step to step."""
    parameters = [nn.Parameter(torch.ones(4096, dtype=BF16)) for _ in range(4)]
    torch.manual_seed(2)
    optimizer = optimizer_class(
        [{"params": parameters[:2]}, {"params": parameters[2:]}], lr=4e-3, stochastic_rounding=True
    )
    seen = []
    for _ in range(2):
        for p in parameters:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [tuple(p.tolist()) for p in parameters]
    assert len(set(seen)) == len(seen) == 8


@over_all
def test_a_group_may_have_it_alone(optimizer_class):
    parameters = make_parameters(BF16, SHAPES)
    plain = clones(parameters)
    torch.manual_seed(0)
    optimizer = optimizer_class([{"params": parameters[:1]}], lr=1e-2)
    optimizer.add_param_group({"params": parameters[1:], "stochastic_rounding": True})
    seeds = [group["rounding_seed"] for group in optimizer.param_groups]
    assert seeds[0] is None
    assert isinstance(seeds[1], int)
    reference = optimizer_class(plain, lr=1e-2)
    for one in (optimizer, reference):
        take_steps(one, range(2))
    assert same_bits(parameters[0], plain[0])
    assert not any(same_bits(p, q) for p, q in zip(parameters[1:3], plain[1:3], strict=True))


# ---- resuming


@over_all
def test_a_run_that_is_resumed_rounds_as_the_run_that_was_not(optimizer_class):
    optimizer = make_rounding(optimizer_class, make_parameters(BF16, SHAPES))
    take_steps(optimizer, range(3))
    resumed = optimizer_class(clones(parameters_of(optimizer)))  # has it from the state dict
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for a, b in zip(settings_of(optimizer), settings_of(resumed), strict=True):
        assert a.items() <= b.items()
    for one in (optimizer, resumed):
        take_steps(one, range(3, 6))
    assert same_run(optimizer, resumed)


@over_all
def test_a_state_dict_without_it_leaves_it_as_it_was(optimizer_class):
    """torch's, bitsandbytes' and older ones know of no such setting."""
    source = stepped(optimizer_class, make_parameters(BF16, SHAPES)).state_dict()
    for group in source["param_groups"]:
        del group["stochastic_rounding"], group["rounding_seed"]
    optimizer = make_rounding(optimizer_class, make_parameters(BF16, SHAPES))
    seed = optimizer.param_groups[0]["rounding_seed"]
    optimizer.load_state_dict(source)
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    assert optimizer.param_groups[0]["rounding_seed"] == seed
    take_steps(optimizer, [3])


@over_all
@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "seed"])
def test_a_seed_out_of_range_is_refused(optimizer_class, seed):
    group = {"params": make_parameters(BF16, [(40,)]), "rounding_seed": seed}
    with pytest.raises(ValueError, match=r"rounding_seed is .*, want an integer from 0 to"):
        optimizer_class([{**group, "stochastic_rounding": True}])
    optimizer_class([group])  # not asked for


@over_all
def test_it_may_be_switched_on_with_a_seed(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(BF16, SHAPES))
    group = optimizer.param_groups[0]
    group["stochastic_rounding"] = True
    with nothing_changes(optimizer), pytest.raises(ValueError, match="rounding_seed is None, want"):
        optimizer.step()
    group["rounding_seed"] = 5
    before = snapshot(optimizer)
    take_steps(optimizer, [3])
    assert not all(map(same_bits, snapshot(optimizer), before))


@over_all
def test_a_default_device_is_of_no_concern(optimizer_class):
    """Neither for the seed, nor for step counts that are numbers."""
    parameters = make_parameters(BF16, SHAPES)
    expected = make_rounding(optimizer_class, clones(parameters))
    take_steps(expected, range(3))
    with torch.device("meta"):
        optimizer = make_rounding(optimizer_class, parameters)
        for step in range(2):
            for p, q in zip(parameters, make_parameters_with_gradients(step), strict=True):
                p.grad = q.grad
            optimizer.step()
        state_dict = optimizer.state_dict()
        for state in state_dict["state"].values():
            state["step"] = 2
        optimizer.load_state_dict(state_dict)
    take_steps(optimizer, [2])
    assert same_run(optimizer, expected)


def make_parameters_with_gradients(step: int) -> list[nn.Parameter]:
    with torch.device("cpu"):
        parameters = make_parameters(BF16, SHAPES)
        set_gradients(step, parameters)
    return parameters
