"""PEFT on a model with NF4 layers: `install` makes `get_peft_model` and its company right there."""

from qlora_native.hf.peft import (
    counts,
    dispatch,
    hotswap,
    injection,
    kbit_training,
    merging,
    mixed_batches,
    tuners,
    unrouted_layers,
)
from qlora_native.hf.peft.lora_layer import NF4LoraLinear

__all__ = ["NF4LoraLinear", "install"]


def install() -> None:
    """Wrap what PEFT asks when it builds, loads, merges and counts; again, nothing happens.

    Raises ImportError where the installed PEFT has not what is wrapped.
    """
    # The order matters: `tuners` shows NF4 layers to what `injection` has wrapped before.
    for part in (
        dispatch,
        hotswap,
        injection,
        merging,
        mixed_batches,
        counts,
        kbit_training,
        tuners,
        unrouted_layers,
    ):
        part.install()
