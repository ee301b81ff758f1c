"""State given to an optimiser that lies in its own pages: nothing is read after it was written."""

import copy

import pytest
import torch
from optimizers import clones, make_parameters, over_all, same_run, stepped, take_steps

SHAPES = [(5000,), (5000,), (300,)]


def permuted(state_dict: dict) -> dict:
    """The same with the states of the first two parameters exchanged."""
    state = state_dict["state"]
    return {**state_dict, "state": {**state, 0: state[1], 1: state[0]}}


@over_all
def test_a_state_dict_of_its_own_may_be_loaded_in_another_order(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    ours = stepped(optimizer_class, parameters, steps=3)
    theirs = stepped(optimizer_class, clones(make_parameters(shapes=SHAPES)), steps=3)
    ours.load_state_dict(permuted(ours.state_dict()))
    theirs.load_state_dict(permuted(copy.deepcopy(theirs.state_dict())))
    for one in (ours, theirs):
        take_steps(one, range(3, 5))
    assert same_run(ours, theirs)


@over_all
def test_states_may_be_exchanged_between_steps(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    ours = stepped(optimizer_class, parameters, steps=3)
    theirs = stepped(optimizer_class, make_parameters(shapes=SHAPES), steps=3)
    a, b = parameters[:2]
    ours.state[a], ours.state[b] = ours.state[b], ours.state[a]
    theirs.load_state_dict(permuted(copy.deepcopy(theirs.state_dict())))
    for one in (ours, theirs):
        take_steps(one, range(3, 5))
    assert same_run(ours, theirs)


@pytest.mark.parametrize("damage", ["meta", "sparse", "needs_grad"])
@over_all
def test_a_moment_that_cannot_be_read_is_refused_before_the_first_is_loaded(
    optimizer_class, damage
):
    ours = stepped(optimizer_class, make_parameters(shapes=SHAPES), steps=2)
    source = copy.deepcopy(stepped(optimizer_class, make_parameters(shapes=SHAPES)).state_dict())
    moment = source["state"][2]["exp_avg"]
    source["param_groups"][0]["lr"] = 0.5
    if damage == "needs_grad":  # that one is only a tensor
        source["state"][2]["exp_avg"] = moment.clone().requires_grad_()
        ours.load_state_dict(source)
        assert torch.equal(ours.state_dict()["state"][2]["exp_avg"], moment)
        return
    source["state"][2]["exp_avg"] = moment.to("meta") if damage == "meta" else moment.to_sparse()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"state of parameter 2: exp_avg is .*, want a dense"):
        ours.load_state_dict(source)
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(value, after["state"][i][name]) for name, value in state.items())
