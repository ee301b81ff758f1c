"""`print_trainable_parameters` with true totals: an NF4 weight counts its n · k weights."""

from typing import Any

from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel

from qlora_native.hf.peft.patching import Function, wrap
from qlora_native.nn import count_parameters


def install() -> None:
    """Wrap `get_nb_trainable_parameters` of PEFT's models."""
    for model_class in (PeftModel, PeftMixedModel):
        wrap(model_class, "get_nb_trainable_parameters", ("self",), _true_counts)


def _true_counts(original: Function) -> Function:
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, total = original(self)
        stored = sum(parameter.numel() for parameter in self.parameters())
        return trainable, total + count_parameters(self)[1] - stored

    return get_nb_trainable_parameters
