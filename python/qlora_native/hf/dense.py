"""A quantised transformers model that has become dense: nothing may say that it is quantised."""

from typing import Any

from torch import nn

from qlora_native.hf.training import restore_norms
from qlora_native.nn.dense import dense_dtype

# What transformers keeps on a quantised model, and on its config.
_OF_THE_MODEL = ("hf_quantizer", "quantization_method", "is_quantized")
_OF_THE_CONFIG = ("quantization_config", "_is_quantized")


def forget_quantization(model: nn.Module) -> nn.Module:
    """Take off `model` and its parts all by which transformers knows a quantised model, in place.

    The quantiser, its config (in sub-configs too) and the flags `is_quantized`,
    `quantization_method` and `_is_quantized` go. Of the conversions of weights by which saving
    would undo what loading did, those of the quantiser go and those of the model's class come back.
    Norms that `prepare_model` has cast to fp32 get their dtype back. The config's dtype becomes the
    dtype of the weights. The layers must be dense already; `dequantize_layers` makes them so.

    Args:
        model: a PreTrainedModel, or any module that holds some. A plain module is left as it is.

    Returns:
        `model`.
    """
    for module in model.modules():
        quantizer = vars(module).get("hf_quantizer")
        if hasattr(quantizer, "dense_conversions"):  # ours has put them by while there were codes
            conversions = quantizer.dense_conversions
            if quantizer.pre_quantized and not conversions:
                conversions = None  # a 4-bit checkpoint is read as it is: those of the class
            module._weight_conversions = conversions
        for name in _OF_THE_MODEL:
            _remove(module, name)
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            _clean_config(config)
        conversions = vars(module).get("_weight_conversions")
        if conversions:
            module._weight_conversions = [c for c in conversions if not _is_quantizers(c)]
    restore_norms(model)
    if getattr(getattr(model, "config", None), "dtype", None) is not None:
        model.config.dtype = dense_dtype(model)
    return model


def note_untied_head(model: nn.Module) -> None:
    """Have the config say so if a merge has parted the output head's weight from the embedding's.

    Loading, or `tie_weights()`, would tie them again. A model without a head leaves the config as
    it is, for a model that has one.
    """
    owner: Any
    config: Any
    for owner in model.modules():
        config = getattr(owner, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            continue
        if not hasattr(owner, "get_output_embeddings"):
            continue
        head, embedding = owner.get_output_embeddings(), owner.get_input_embeddings()
        if head is None or getattr(head, "weight", None) is getattr(embedding, "weight", None):
            continue
        config.tie_word_embeddings = False
        tied = getattr(owner, "all_tied_weights_keys", {})
        name = next((n for n, module in owner.named_modules() if module is head), "")
        tied.pop(f"{name}.weight", None)


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
