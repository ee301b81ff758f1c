"""The state that AdamW keeps of a parameter: how it starts, and which loaded state fits."""

from typing import Any

import torch
from torch import Tensor

from qlora_native.sharding import describe, is_sharded

_BLOCK = 256  # elements of 8-bit state that share a scale
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_32BIT = MOMENTS
STATE_8BIT = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")  # the core's order


def new_state(param: Tensor, is_8bit: bool, step_device: torch.device) -> dict[str, Tensor]:
    """The state of a parameter that has taken no step."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=step_device)}
    for name in MOMENTS:
        # As 8-bit codes any bytes do: a scale of zero makes every code stand for zero.
        state[name] = torch.zeros_like(
            param,
            dtype=torch.uint8 if is_8bit else torch.float32,
            memory_format=torch.contiguous_format,
        )
        if is_8bit:
            state[f"{name}_absmax"] = torch.zeros(
                _block_count(param), dtype=torch.float32, device=param.device
            )
    return state


def has_8bit_state(state: dict[str, Any]) -> bool:
    """Whether a parameter's state is in 8 bits."""
    return "exp_avg_absmax" in state


def check_state(where: str, param: Tensor, state: dict[str, Any], is_8bit: bool) -> None:
    """Raise ValueError unless `state`, which is to be loaded, is one of `param`."""
    wanted = {"step", *(STATE_8BIT if is_8bit else STATE_32BIT)}
    if set(state) != wanted:
        raise ValueError(f"{where} has {sorted(state)}, want {sorted(wanted)}")
    for moment in MOMENTS:
        value = state[moment]
        if value.shape != param.shape:
            raise ValueError(
                f"{where}: {moment} has shape {list(value.shape)}, want {list(param.shape)}"
            )
        if is_sharded(value) != is_sharded(param) or (
            is_sharded(param) and value.placements != param.placements
        ):
            raise ValueError(
                f"{where}: {moment} {describe(value)}, the parameter {describe(param)}; "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict converts state"
            )
        if (value.dtype == torch.uint8) != is_8bit:
            wanted_dtype = "uint8" if is_8bit else "a float dtype"
            raise ValueError(f"{where}: {moment} is {value.dtype}, want {wanted_dtype}")
        if is_8bit:
            absmax, blocks = state[f"{moment}_absmax"], _block_count(param)
            if absmax.shape != (blocks,) or absmax.dtype != torch.float32:
                raise ValueError(
                    f"{where}: {moment}_absmax is {absmax.dtype} {list(absmax.shape)}, "
                    f"want torch.float32 [{blocks}]"
                )


def own_copy(
    state: dict[str, Any], device: torch.device, step_device: torch.device
) -> dict[str, Tensor]:
    """Loaded state as this library keeps it: contiguous, moments in fp32 or uint8."""
    copied = {}
    for name, value in state.items():
        if name == "step":
            step = torch.as_tensor(value, dtype=torch.float32, device=step_device)
            copied[name] = step.clone().reshape(())
        else:
            dtype = torch.uint8 if value.dtype == torch.uint8 else torch.float32
            copied[name] = value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return copied


def _block_count(param: Tensor) -> int:
    return -(-param.numel() // _BLOCK)
