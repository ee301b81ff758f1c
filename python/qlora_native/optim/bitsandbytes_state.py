"""State dicts of bitsandbytes' optimisers, in the form of this library's.

As `bitsandbytes/optim/optimizer.py` of 0.50.2 stores them. `state1` and `state2` are the moments,
in fp32 or as 8-bit codes of the dynamic maps `qmap1` and `qmap2`, with the scales of blocks in
`absmax1` and `absmax2`. A dict of their own hides them from FSDP; older versions keep them beside
the int `step`. Neither the optimiser's name nor its `min_8bit_size` is stored. Its Adam and AdamW
are one rule, with decoupled weight decay.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_native.optim.state_kind import BLOCK, StateKind, block_count

_WRAPPED = "__bnb_optimizer_quant_state__"
_SETTINGS = {"lr", "betas", "eps", "weight_decay"}
_OF_ADEMAMIX = {"alpha", "t_alpha", "t_beta3"}  # in the groups of every rule with two moments
_OF_TORCH = {"params", "param_names", "initial_lr"}
_NO_EQUIVALENT = {
    "unorm_vec": "LAMB or LARS, or another optimiser with max_unorm",
    "gnorm_vec": "an optimiser with percentile_clipping",
    "max1": "an optimiser with 8-bit state that is not block-wise",
}


def is_bitsandbytes_state(state_dict: Mapping[str, Any]) -> bool:
    """Whether an optimiser's state dict is of one of bitsandbytes', also of one that is refused.

    Before the first step only the names of the settings tell.
    """
    states = [state for state in state_dict["state"].values() if state]
    if states:
        return any("state1" in state or _WRAPPED in state for state in states)
    groups = [set(group) for group in state_dict["param_groups"]]
    return bool(groups) and all(
        "t_alpha" in group or _SETTINGS <= group <= _SETTINGS | _OF_TORCH for group in groups
    )


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a bitsandbytes optimiser as one of PagedAdamW, PagedAdamW8bit or a Lion.

    It may be of Adam or AdamW (which have a `state2`) or Lion, in 32 or 8 bits, paged or not. The
    moments are the tensors given and decode to the same numbers. bitsandbytes does not store the
    settings of single parameters in its GlobalOptimManager, nor what tells an SGD with a dampening,
    which it ignores, from Lion.

    Raises:
        ValueError: the state dict is of another library, of an optimiser that has no equivalent
            here, of 8-bit state in other blocks or by other maps (some processors round
            bitsandbytes' in another way), or of a parameter that was not contiguous.
    """
    if not is_bitsandbytes_state(state_dict):
        raise ValueError("the state dict is not of an optimiser of bitsandbytes")
    groups = state_dict["param_groups"]
    states = {i: _unwrapped(state) for i, state in state_dict["state"].items() if state}
    have_two = {"state2" in state for state in states.values()}
    if len(have_two) > 1:
        raise ValueError("the bitsandbytes state dict has a state2 of some parameters, not of all")
    is_adamw = have_two.pop() if have_two else any("t_alpha" in group for group in groups)
    return {
        # First, since they tell which optimiser it is.
        "param_groups": [_our_group(i, group, is_adamw) for i, group in enumerate(groups)],
        "state": {
            i: _our_state(f"bitsandbytes' state of parameter {i}", state, is_adamw)
            for i, state in states.items()
        },
    }


@cache
def dynamic_map(signed: bool) -> Tensor:
    """fp32 [256] with the core's bits, rounded where csrc/format/dynamic_map.h does.

    torch.linspace, which bitsandbytes takes, rounds in another way on some processors.
    """
    entries = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    start = torch.tensor(0.1, dtype=torch.float32, device="cpu")
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        step = ((1.0 - start) / count).double()
        i = torch.arange(count + 1, dtype=torch.float64, device="cpu")
        from_start, from_end = start.double() + step * i, 1.0 - step * (count - i)
        points = torch.where(i < (count + 1) // 2, from_start, from_end).float()
        scale = torch.tensor(10.0 ** (decade - 6), dtype=torch.float32, device="cpu")
        midpoints = scale * ((points[:-1] + points[1:]) / 2.0)
        entries += [midpoints, -midpoints] if signed else [midpoints]
    return torch.cat(entries).sort().values


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    beside = {name: value for name, value in state.items() if name != _WRAPPED}
    return {**beside, **state.get(_WRAPPED, {})}


def _our_group(index: int, group: Mapping[str, Any], is_adamw: bool) -> dict[str, Any]:
    where = f"group {index} of the bitsandbytes state dict"
    if not set(group) >= _SETTINGS:
        raise ValueError(f"{where} has no {', '.join(sorted(_SETTINGS - set(group)))}")
    betas, eps = tuple(group["betas"]), group["eps"]
    if len(betas) != 2 or group.get("alpha"):
        raise ValueError(f"{where} is of AdEMAMix (betas {betas}), which is not done here")
    if not is_adamw and (eps != 0 or betas[1] == 0):
        raise ValueError(
            f"{where} is of one moment with eps {eps} and betas {betas}, want Lion's: an eps of 0, "
            "which RMSprop and Adagrad do not have, and two betas, which SGD and LARS do not have"
        )
    dropped = _OF_ADEMAMIX | (set() if is_adamw else {"eps"})
    kept = {name: value for name, value in group.items() if name not in dropped}
    ours = {"params": list(group["params"]), "betas": betas, "maximize": False}
    return {**kept, **ours, **({"amsgrad": False} if is_adamw else {})}


def _our_state(where: str, state: dict[str, Any], is_adamw: bool) -> dict[str, Tensor]:
    for name, owner in _NO_EQUIVALENT.items():
        if name in state:
            raise ValueError(f"{where} has {name}: it is of {owner}, which is not done here")
    is_8bit = "qmap1" in state
    moments = StateKind("adamw" if is_adamw else "lion", is_8bit).moments
    numbers = range(1, len(moments) + 1)
    parts = ("state", "qmap", "absmax") if is_8bit else ("state",)
    wanted = {"step", *(f"{part}{n}" for part in parts for n in numbers)}
    if set(state) != wanted:
        raise ValueError(f"{where} has {sorted(state)}, want {sorted(wanted)}")
    ours = {"step": torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")}
    shape = state["state1"].shape
    for n, moment in zip(numbers, moments, strict=True):
        ours[moment] = state[f"state{n}"]
        _check(f"{where}: state{n}", ours[moment], shape, torch.uint8 if is_8bit else torch.float32)
        if not ours[moment].is_contiguous():
            # A GPU wrote it in the order of a contiguous parameter, whatever its strides say.
            raise ValueError(f"{where}: state{n} is not contiguous: its order is not known")
        if is_8bit:
            absmax = ours[f"{moment}_absmax"] = state[f"absmax{n}"]
            _check(
                f"{where}, in blocks of {BLOCK}: absmax{n}", absmax, (block_count(shape.numel()),)
            )
            _check_map(f"{where}: qmap{n}", state[f"qmap{n}"], signed=n == 1)
    return ours


def _check(
    which: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    if value.dtype != dtype or value.shape != shape:
        raise ValueError(
            f"{which} is {value.dtype} {list(value.shape)}, want {dtype} {list(shape)}"
        )


def _check_map(which: str, stored: Tensor, signed: bool) -> None:
    _check(which, stored, (256,))
    stored, ours = stored.cpu().contiguous(), dynamic_map(signed)
    differ = (stored.view(torch.int32) != ours.view(torch.int32)).nonzero().flatten().tolist()
    if differ:
        i = differ[0]
        raise ValueError(
            f"{which} is not the {'signed' if signed else 'unsigned'} dynamic map: {len(differ)} "
            f"entries differ, entry {i} is {stored[i].item()!r}, want {ours[i].item()!r}"
        )
