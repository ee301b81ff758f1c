"""State dicts of optimisers: what they hold, and whether one fits an optimiser."""

from typing import Any

import torch
from torch import Tensor

from qlora_native.optim.groups import check_numbers


def with_own_steps(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose step counts are tensors of their own, on the CPU.

    torch's AdamW wants them there, and files want tensors that share no memory.
    """
    states = state_dict["state"]
    counted = [i for i, state in states.items() if isinstance(state.get("step"), Tensor)]
    devices = {states[i]["step"].device for i in counted}
    steps = {}
    for device in devices:  # one copy for all of a device's
        there = [i for i in counted if states[i]["step"].device == device]
        together = torch.stack([states[i]["step"].detach().reshape(()) for i in there]).cpu()
        steps.update({i: step.clone() for i, step in zip(there, together, strict=True)})
    own = {i: {**state, "step": steps[i]} if i in steps else state for i, state in states.items()}
    return {**state_dict, "state": own}


def pair_with_parameters(
    param_groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> list[tuple[int, Tensor, dict[str, Any]]]:
    """The parameters that `state_dict` has a state for: their numbers, and each with its state."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    states = state_dict["state"]
    pairs = enumerate(zip(ids, params, strict=True))
    return [(number, param, states[i]) for number, (i, param) in pairs if states.get(i)]


def keep_rounding(
    param_groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> list[dict[str, Any]]:
    """The groups of a state dict; where they say nothing of rounding, as `param_groups` do."""
    return [
        {key: own[key] for key in ("stochastic_rounding", "rounding_seed")} | group
        for own, group in zip(param_groups, state_dict["param_groups"], strict=True)
    ]


def check_state_dict(
    name: str,
    settings: tuple[str, ...],
    param_groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
) -> None:
    """Raise ValueError unless the groups are of such an optimiser, and as large as its own."""
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    own_sizes = [len(group["params"]) for group in param_groups]
    if sizes != own_sizes:
        raise ValueError(
            f"{name}: the state dict has groups of {sizes} parameters, want {own_sizes}"
        )
    for group in state_dict["param_groups"]:
        missing = [key for key in settings if key not in group]
        if missing:
            raise ValueError(
                f"{name}: the state dict is of another kind of optimiser: a group has no "
                + ", ".join(missing)
            )
        if "eps" in group and "eps" not in settings:
            raise ValueError(
                f"{name}: the state dict is of another kind of optimiser: a group has eps, "
                "which Lion has not"
            )
        if group.get("amsgrad"):
            raise ValueError(
                f"{name}: the state dict is of AdamW with amsgrad, which is not done here"
            )
        if group.get("decoupled_weight_decay") is False:
            raise ValueError(
                f"{name}: the state dict is of Adam, whose weight decay is not decoupled"
            )
        check_numbers(name, settings, group)
