"""From 4-bit layers back to dense ones."""

from collections import Counter

import torch
from torch import nn

from qlora_native.nn.model import modules_with_names, replace_module
from qlora_native.nn.wrapping import check_not_distributed
from qlora_native.ops.storage import FLOAT_DTYPES


def dense_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which dense layers go into `model`: that of most of its weights that have one.

    Neither 4-bit bytes nor the factors of an adapter count. A model that has nothing else goes by
    the dtype in its config, as transformers' models have one, and a plain module by float32.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():
        is_adapters = "lora_" in name or name.endswith(".magnitude")
        if parameter.dtype in FLOAT_DTYPES and not is_adapters:
            sizes[parameter.dtype] += parameter.numel()
    if sizes:
        return sizes.most_common(1)[0][0]
    configured = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(configured, str):  # as it is once the model was saved
        configured = getattr(torch, configured, None)
    return configured if configured in FLOAT_DTYPES else torch.float32


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every 4-bit layer of `model` by the dense layer that it stands for, in place.

    A 4-bit layer is a module with a method `to_dense(dtype)`, as `NF4Linear` has one. A layer that
    is shared stays shared. One layer at a time is dense beside its 4-bit weight.

    Args:
        model: any module that is not itself a 4-bit layer.
        dtype: float32, bfloat16 or float16; None: `dense_dtype(model)`.

    Returns:
        The names of the layers that were replaced, each by the first of its names.

    Raises:
        ValueError: a layer's weight is offloaded, the model is in the hands of DDP or FSDP2, or an
            argument is wrong; nothing is replaced.
    """
    dtype = check_dtype("dequantize_layers", dtype) or dense_dtype(model)
    if is_four_bit(model):
        raise ValueError(
            "dequantize_layers: the model is itself the layer to replace; call its to_dense"
        )
    check_not_distributed("dequantize_layers", model)
    names = modules_with_names(model, is_four_bit)
    for layer, places in names.items():
        check_materialised("dequantize_layers", places[0], layer)
    first_names = [places[0] for places in names.values()]
    while names:
        layer, places = names.popitem()  # which lets go of the 4-bit weight
        replace_module(model, places, replacement(layer, layer.to_dense(dtype)))
    return first_names


def is_four_bit(module: nn.Module) -> bool:
    """Whether `module` stores its weight in 4 bits and can give a dense layer instead."""
    return callable(getattr(module, "to_dense", None))


def check_dtype(operation: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype`, or ValueError if it is none of the three that weights can have."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"{operation}: dtype is {dtype}, want float32, bfloat16 or float16")
    return dtype


def check_materialised(operation: str, name: str, layer: nn.Module) -> None:
    """Raise ValueError if the layer's weight is somewhere else than in memory."""
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ValueError(
            f"{operation}: {name} has parameters on the meta device, as offloaded layers have; "
            "load the model without offloading"
        )


def replacement(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, ready to stand where `old` stood: with the hook by which accelerate places layers."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    return new
