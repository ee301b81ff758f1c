"""The settings of a parameter group: their defaults and what they may be."""

import math
from typing import Any

import torch
from torch import Tensor


def complete_group(name: str, group: dict[str, Any]) -> dict[str, Any]:
    """The settings with a seed, drawn from torch's generator, where rounding is stochastic."""
    if group.get("stochastic_rounding") and group.get("rounding_seed") is None:
        return {**group, "rounding_seed": int(torch.randint(2**63 - 1, (), device="cpu"))}
    return group


def check_group(name: str, settings: tuple[str, ...], group: dict[str, Any]) -> None:
    """Raise ValueError unless a group can be stepped, NotImplementedError for amsgrad."""
    if group.get("amsgrad"):
        raise NotImplementedError(
            f"{name}: amsgrad is not done here; torch.optim.AdamW has it, without pages"
        )
    check_numbers(name, settings, group)
    if group["stochastic_rounding"]:
        _check_rounding(name, group)


def check_numbers(name: str, settings: tuple[str, ...], group: dict[str, Any]) -> None:
    """Raise ValueError unless every number of a group is in its range."""
    for key in ("lr", "eps", "weight_decay"):
        if key not in settings:
            continue
        value = group[key]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name}: {key} has shape {list(value.shape)}, want one number")
        if isinstance(value, Tensor) and value.is_cuda:
            if key == "lr":
                continue  # to look at it would wait for the device
            raise ValueError(
                f"{name}: {key} is a tensor on {value.device}, want a number: only lr is "
                "read on a device"
            )
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name}: {key} is {value}, want a finite number of at least 0")
    if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
        raise ValueError(f"{name}: betas is {group['betas']}, want two numbers")
    for i, beta in enumerate(group["betas"]):
        if isinstance(beta, Tensor) and beta.is_cuda:
            raise ValueError(
                f"{name}: betas[{i}] is a tensor on {beta.device}, want a number: only lr is "
                "read on a device"
            )
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: betas[{i}] is {beta}, want 0 <= beta < 1")


def _check_rounding(name: str, group: dict[str, Any]) -> None:
    seed = group["rounding_seed"]
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{name}: rounding_seed is {seed}, want an integer from 0 to 2^64 - 1")
    for param in group["params"]:
        if param.dtype is torch.float16:
            raise ValueError(
                f"{name}: a parameter is torch.float16, and stochastic_rounding is for "
                "torch.bfloat16 (torch.float32 is not rounded)"
            )
