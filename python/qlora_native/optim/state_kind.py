"""The kinds of state that a parameter can have: what they hold, and which loaded state fits."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qlora_native.sharding import describe, is_sharded

BLOCK = 256  # elements of 8-bit state that share a scale

Rule = Literal["adamw", "lion"]  # as the core calls it


class StateKind(NamedTuple):
    """Which rule steps a parameter, and how wide its moments are kept."""

    rule: Rule
    is_8bit: bool

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments, by the names that torch's optimisers give them."""
        return ("exp_avg", "exp_avg_sq") if self.rule == "adamw" else ("exp_avg",)

    @property
    def planes(self) -> tuple[str, ...]:
        """What is in pages, in the core's order: the names of its planes."""
        if not self.is_8bit:
            return self.moments
        return tuple(name for moment in self.moments for name in (moment, f"{moment}_absmax"))

    @property
    def names(self) -> tuple[str, ...]:
        """All that a parameter's state holds."""
        return ("step", *self.planes)

    def dtype_of(self, plane: str) -> torch.dtype:
        """Of a plane: codes of 8-bit state are uint8, all else is float32."""
        return torch.uint8 if self.is_8bit and plane in self.moments else torch.float32

    def shape_of(self, plane: str, param: Tensor) -> torch.Size:
        """Of a plane: scales are one for each block of 256 elements of the flattened parameter."""
        return param.shape if plane in self.moments else torch.Size((block_count(param.numel()),))


def block_count(element_count: int) -> int:
    """How many blocks of 8-bit state the elements take; the last may be short."""
    return -(-element_count // BLOCK)


def check_state(where: str, param: Tensor, state: dict[str, Any], kind: StateKind) -> None:
    """Raise ValueError unless `state` is one of `param` and of this kind; more may be in it."""
    missing = [name for name in kind.names if name not in state]
    if missing:
        raise ValueError(f"{where} has {sorted(state)}, want {sorted(kind.names)}")
    if not _is_count(state["step"]):
        raise ValueError(f"{where}: step is {state['step']}, want a whole number of at least 0")
    for name in kind.planes:
        value = state[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name} is a {type(value).__name__}, want a tensor")
        if value.layout is not torch.strided or value.is_meta:
            raise ValueError(
                f"{where}: {name} is {value.layout} on {value.device}, want a dense tensor"
            )
        shape = kind.shape_of(name, param)
        if value.shape != shape:
            raise ValueError(f"{where}: {name} has shape {list(value.shape)}, want {list(shape)}")
        wanted = kind.dtype_of(name)
        is_right = (
            value.dtype == wanted
            if kind.is_8bit
            else value.is_floating_point()  # of 16 bits as well: torch keeps a 16-bit model's so
        )
        if not is_right:
            raise ValueError(
                f"{where}: {name} is {value.dtype}, want "
                + (str(wanted) if kind.is_8bit else "a float dtype")
            )
        _check_placement(f"{where}: {name}", value, param)


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.device.type != "cpu":
            # To look at one on a device would wait for it.
            return step.numel() == 1 and not step.is_meta
        step = step.item()
    return isinstance(step, (int, float)) and step >= 0 and float(step).is_integer()


def _check_placement(what: str, value: Tensor, param: Tensor) -> None:
    if is_sharded(value) != is_sharded(param) or (
        is_sharded(param) and value.placements != param.placements
    ):
        raise ValueError(
            f"{what} {describe(value)}, the parameter {describe(param)}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict converts state"
        )
