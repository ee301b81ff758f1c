"""`prepare_model_for_kbit_training` on a model with NF4 layers: as on one of bitsandbytes'."""

import warnings
from typing import Any

from peft.utils import other
from torch import nn

from qlora_native.hf.peft.injection import has_nf4
from qlora_native.hf.peft.patching import Function, wrap_everywhere


def install() -> None:
    """Wrap the function, also where it has been imported by name already."""
    parameters = ("model", "use_gradient_checkpointing")
    wrap_everywhere(other, "prepare_model_for_kbit_training", parameters, _knows_nf4)


def _knows_nf4(original: Function) -> Function:
    def prepare_model_for_kbit_training(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not has_nf4(model):
            return original(model, *args, **kwargs)
        warnings.warn(
            "prepare_model_for_kbit_training makes fp32 of all 16-bit parameters, embeddings and "
            "output head among them; qlora_native.hf.prepare_model does so with norms alone",
            stacklevel=2,
        )
        # PEFT asks for this to know a 4-bit model, and leaves out gradient checkpointing on others.
        is_known = getattr(model, "is_loaded_in_4bit", None)
        model.is_loaded_in_4bit = True
        try:
            return original(model, *args, **kwargs)
        finally:
            if is_known is None:
                del model.is_loaded_in_4bit
            else:
                model.is_loaded_in_4bit = is_known

    return prepare_model_for_kbit_training
