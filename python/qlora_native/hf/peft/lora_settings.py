"""Which settings of a LoraConfig an NF4 layer can have right; the others are refused by name."""

import dataclasses
from typing import Any

from peft import LoraConfig

from qlora_native.nn import NF4Linear
from qlora_native.nn.lora_adapter import check_lora_arguments

# Of the ways to start A and B, those that need no dense base weight and leave the base as it is.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


def check_settings(
    operation: str, base: NF4Linear, r: int, lora_alpha: float, config: LoraConfig
) -> None:
    """Raise unless an NF4LoraLinear on `base` can do what `config` asks for.

    Raises:
        ValueError: r, lora_alpha or lora_dropout is out of its range.
        NotImplementedError: the config has a setting that is not right on an NF4 base.
    """
    check_lora_arguments(operation, base, r, lora_alpha, config.lora_dropout)
    if config.init_lora_weights not in _INITS:
        wanted = ", ".join(map(repr, _INITS))
        raise NotImplementedError(
            f"{operation}: init_lora_weights is {config.init_lora_weights!r}, which takes the "
            f"adapter out of a dense base weight; on an NF4 base it can be one of {wanted}. Or "
            "initialise on the dense model, save the adapter and the changed base, and quantise "
            "that base"
        )
    for name in sorted(_variants_of(config) - {"use_dora"}):
        raise NotImplementedError(
            f"{operation}: {name} is {getattr(config, name)!r}, a variant of LoRA that is not "
            "there for an NF4 base; plain LoRA, use_rslora and use_dora are"
        )
    if config.use_dora and config.runtime_config.ephemeral_gpu_offload:
        raise NotImplementedError(
            f"{operation}: use_dora with ephemeral_gpu_offload is not there for an NF4 base, whose "
            "norms are computed where it lies; leave ephemeral_gpu_offload out"
        )


def _variants_of(config: LoraConfig) -> set[str]:
    """The settings of `config` that PEFT calls variants, and that are set."""
    found: set[str] = {"use_qalora"} if getattr(config, "use_qalora", False) else set()
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if field.metadata.get("is_lora_variant") and value:
            found.add(field.name)
    return found
