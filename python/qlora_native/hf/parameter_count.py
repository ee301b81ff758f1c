"""`model.num_parameters()` of transformers, with the weights that codes stand for."""

import functools
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_native.nn import NF4Experts, NF4Linear


def install() -> None:
    """Have PreTrainedModel.num_parameters count n · k for an NF4 weight, and not its bytes.

    Again, nothing happens.

    Raises:
        ImportError: this version of transformers has another method there.
    """
    original = PreTrainedModel.num_parameters
    if getattr(original, "_counts_weights_of_codes", False):
        return
    parameters = list(inspect.signature(original).parameters)
    if parameters != ["self", "only_trainable", "exclude_embeddings"]:
        raise ImportError(
            f"qlora_native.hf: PreTrainedModel.num_parameters has the parameters {parameters}; "
            "this version of transformers is not known"
        )

    @functools.wraps(original)
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        count: int = original(self, only_trainable, exclude_embeddings)
        if only_trainable:
            return count  # 4-bit weights are not
        for module in self.modules():
            if isinstance(module, NF4Linear | NF4Experts):
                stored = sum(p.numel() for p in module.parameters() if p.dtype == torch.uint8)
                count += module.weight_count - stored
        return count

    num_parameters._counts_weights_of_codes = True  # type: ignore[attr-defined]
    PreTrainedModel.num_parameters = num_parameters
