"""PEFT's merges on a model with NF4 layers: in the model's dtype, whole or not at all."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from qlora_native.hf.dense import forget_quantization
from qlora_native.hf.peft.injection import has_nf4
from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.patching import Function, wrap
from qlora_native.hf.peft.rollback import unchanged_on_error
from qlora_native.nn.dense import dense_dtype, dequantize_layers


def install() -> None:
    """Wrap `merge_adapter`, `merge_and_unload` and `unload`."""
    wrap(BaseTuner, "merge_adapter", ("adapter_names", "safe_merge"), _merges_whole)
    wrap(BaseTuner, "merge_and_unload", ("safe_merge", "adapter_names"), _leaves_dense)
    wrap(BaseTuner, "unload", (), _unloads_merged)


def _merges_whole(original: Function) -> Function:
    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_error(self):
            _set_merge_dtype(self.model)
            original(self, *args, **kwargs)

    return merge_adapter


def _leaves_dense(original: Function) -> Function:
    def merge_and_unload(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if not has_nf4(self.model):
            return original(self, *args, **kwargs)
        dtype = _set_merge_dtype(self.model)
        with unchanged_on_error(self):
            model = original(self, *args, **kwargs)
        dequantize_layers(model, dtype)
        return forget_quantization(model)

    return merge_and_unload


def _unloads_merged(original: Function) -> Function:
    def unload(self: Any) -> nn.Module:
        layers = [layer for layer in self.model.modules() if isinstance(layer, NF4LoraLinear)]
        is_merged = any(layer.merged for layer in layers)
        model = original(self)
        if is_merged:  # then the layers that were are dense, as PEFT's would keep what is merged
            dequantize_layers(model, layers[0].merge_dtype)
            forget_quantization(model)
        return model

    return unload


def _set_merge_dtype(model: nn.Module) -> Any:
    """Let NF4 layers merge to the dtype of the rest of `model`, which is returned."""
    dtype = dense_dtype(model)
    for layer in model.modules():
        if isinstance(layer, NF4LoraLinear) and not layer.merged:
            layer.merge_dtype = dtype
    return dtype
