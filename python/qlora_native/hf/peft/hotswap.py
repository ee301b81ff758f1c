"""`hotswap_adapter`: an adapter for another base is refused before anything is swapped."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from peft.utils import hotswap
from torch import Tensor, nn

from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.patching import Function, wrap_everywhere


def install() -> None:
    """Wrap what swaps the tensors."""
    parameters = ("model", "state_dict", "adapter_name", "config")
    wrap_everywhere(hotswap, "hotswap_adapter_from_state_dict", parameters, _checks_shapes)


def _checks_shapes(original: Function) -> Function:
    """PEFT takes every smaller tensor for one of a smaller rank, and fills it up with zeros."""

    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        problems = [
            f"{key} is {list(tensor.shape)}, want {wanted}"
            for key, tensor in state_dict.items()
            if not _fits(tensor, wanted := _wanted_shape(model, key))
        ]
        if problems:
            raise ValueError(
                f"hotswap_adapter: {len(problems)} tensors do not fit the model: "
                + "; ".join(problems[:6])
                + "; …" * (len(problems) > 6)
            )
        original(model, state_dict, *args, **kwargs)

    return hotswap_adapter_from_state_dict


def _wanted_shape(model: nn.Module, key: str) -> list[int | str] | None:
    """Of a factor of an NF4LoraLinear, "r" for the rank; None of what PEFT judges alone."""
    path, _, end = key.partition(".lora_")
    try:
        layer = attrgetter(path)(model)
    except AttributeError:
        return None
    if not isinstance(layer, NF4LoraLinear) or not end.endswith(".weight"):
        return None
    shapes: dict[str, list[int | str]] = {
        "A": ["r", layer.in_features],
        "B": [layer.out_features, "r"],
    }
    return shapes.get(end.partition(".")[0])


def _fits(tensor: Tensor, wanted: list[int | str] | None) -> bool:
    return wanted is None or (
        tensor.dim() == len(wanted)
        and all(size in (found, "r") for found, size in zip(tensor.shape, wanted, strict=True))
    )
