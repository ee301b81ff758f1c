"""PEFT on a model with NF4 layers: `install` makes `get_peft_model` and its company right there."""

from qlora_native.hf.peft import counts, dispatch, tuners
from qlora_native.hf.peft.lora_layer import NF4LoraLinear

__all__ = ["NF4LoraLinear", "install"]


def install() -> None:
    """Wrap what PEFT asks when it builds, merges and counts layers; again, nothing happens.

    Raises ImportError where the installed PEFT has not what is wrapped.
    """
    tuners.install()  # first: LoraModel's methods go through BaseTuner's
    dispatch.install()
    counts.install()
