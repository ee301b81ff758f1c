"""PEFT's merges on a model with NF4 layers: in the model's dtype, whole or not at all."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from qlora_native.hf.dense import forget_quantization
from qlora_native.hf.peft.injection import has_nf4
from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.patching import Function, wrap
from qlora_native.hf.peft.rollback import unchanged_on_error
from qlora_native.nn.dense import dense_dtype, dequantize_layers
from qlora_native.nn.model import modules_with_names, replace_module


def install() -> None:
    """Wrap `merge_adapter`, `merge_and_unload` and `unload`."""
    wrap(BaseTuner, "merge_adapter", ("adapter_names", "safe_merge"), _merges_whole)
    arguments = ("progressbar", "safe_merge", "adapter_names")
    wrap(BaseTuner, "merge_and_unload", arguments, _leaves_dense)
    wrap(BaseTuner, "unload", (), _unloads_merged)


def _merges_whole(original: Function) -> Function:
    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_error(self):
            _set_merge_dtype(self.model)
            original(self, *args, **kwargs)

    return merge_adapter


def _leaves_dense(original: Function) -> Function:
    def merge_and_unload(
        self: Any,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        has_four_bit = has_nf4(self.model)
        dtype = _set_merge_dtype(self.model)
        with unchanged_on_error(self):
            _take_out(self.model, True, safe_merge, adapter_names)
            model = original(self, progressbar, safe_merge, adapter_names)
        return _made_dense(model, dtype) if has_four_bit else model

    return merge_and_unload


def _unloads_merged(original: Function) -> Function:
    """PEFT's base keeps what is merged into it; of ours, so do the dense layers in its place."""

    def unload(self: Any) -> nn.Module:
        merged = [m for m in self.model.modules() if isinstance(m, NF4LoraLinear) and m.merged]
        _take_out(self.model, False, False, None)
        model = original(self)
        return _made_dense(model, merged[0].merge_dtype) if merged else model

    return unload


def _take_out(
    model: nn.Module, merge: bool, safe_merge: bool, adapter_names: list[str] | None
) -> None:
    """Put what stays in the places of the LoRA layers; not every tuner of PEFT would ask them."""
    layers = modules_with_names(model, lambda module: isinstance(module, NF4LoraLinear))
    for layer, names in layers.items():
        unloaded: Any = layer
        replace_module(
            model,
            names,
            unloaded.unload_and_optionally_merge_module(merge, safe_merge, adapter_names),
        )


def _made_dense(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    dequantize_layers(model, dtype)
    return forget_quantization(model)


def _set_merge_dtype(model: nn.Module) -> torch.dtype:
    """Let NF4 layers merge to the dtype of the rest of `model`, which is returned."""
    dtype = dense_dtype(model)
    for layer in model.modules():
        if isinstance(layer, NF4LoraLinear) and not layer.merged:
            layer.merge_dtype = dtype
    return dtype
