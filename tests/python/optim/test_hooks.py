"""Hooks that put a state dict into another form, and take it out again."""

import torch
from optimizers import make_parameters, over_all, same_run, stepped, take_steps

SHAPES = [(5000,), (30,)]


@over_all
def test_a_state_dict_may_be_wrapped_and_unwrapped(optimizer_class):
    ours = stepped(optimizer_class, make_parameters(shapes=SHAPES), steps=2)
    seen = []

    def wrap(_, state_dict):
        seen.extend(state["step"].device.type for state in state_dict["state"].values())
        return {"optimizer": state_dict}

    hook = ours.register_state_dict_post_hook(wrap)
    wrapped = ours.state_dict()
    hook.remove()
    assert list(wrapped) == ["optimizer"]
    assert seen == ["cpu"] * 2
    other = stepped(optimizer_class, make_parameters(shapes=SHAPES), steps=2)
    with torch.no_grad():
        for state in other.state.values():
            state["exp_avg"].zero_()
    other.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["optimizer"])
    other.load_state_dict(wrapped)
    for one in (ours, other):
        take_steps(one, [2])
    assert same_run(ours, other)


@over_all
def test_a_groups_own_rounding_outlives_the_state_dict_of_another_library(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    group = {"params": parameters, "stochastic_rounding": True, "rounding_seed": 7}
    optimizer = optimizer_class([group])
    assert not optimizer.defaults["stochastic_rounding"]
    foreign = optimizer.state_dict()
    for key in ("stochastic_rounding", "rounding_seed"):
        del foreign["param_groups"][0][key]
    optimizer.load_state_dict(foreign)
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    assert optimizer.param_groups[0]["rounding_seed"] == 7
