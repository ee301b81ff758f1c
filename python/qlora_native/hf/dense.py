"""A quantised transformers model that has become dense: nothing may say that it is quantised."""

from typing import Any

from torch import nn

from qlora_native.nn.dense import dense_dtype

# What transformers keeps on a quantised model, and on its config.
_OF_THE_MODEL = ("hf_quantizer", "quantization_method", "is_quantized")
_OF_THE_CONFIG = ("quantization_config", "_is_quantized")


def forget_quantization(model: nn.Module) -> nn.Module:
    """Take off `model` and its parts all by which transformers knows a quantised model, in place.

    The quantiser, its config (in sub-configs too) and the flags `is_quantized`,
    `quantization_method` and `_is_quantized` go, and so do the conversions of weights by which the
    quantiser loaded a checkpoint and by which saving would undo them. The config's dtype becomes
    the dtype of the weights. The layers must be dense already; `dequantize_layers` makes them so.

    Args:
        model: a PreTrainedModel, or any module that holds some. A plain module is left as it is.

    Returns:
        `model`.
    """
    for module in model.modules():
        for name in _OF_THE_MODEL:
            _remove(module, name)
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            _clean_config(config)
        conversions = module.__dict__.get("_weight_conversions")
        if conversions:
            module._weight_conversions = [c for c in conversions if not _is_quantizers(c)]
    if getattr(getattr(model, "config", None), "dtype", None) is not None:
        model.config.dtype = dense_dtype(model)
    return model


def _clean_config(config: Any) -> None:
    for name in _OF_THE_CONFIG:
        _remove(config, name)
    for part in getattr(config, "sub_configs", {}):
        sub_config = getattr(config, part, None)
        if sub_config is not None:
            _clean_config(sub_config)


def _is_quantizers(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or []
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)


def _remove(owner: Any, name: str) -> None:
    if name in vars(owner):
        delattr(owner, name)
