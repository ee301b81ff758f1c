"""Which layers of a transformers model become 4-bit, and what takes their places."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from qlora_native.hf.config import NF4Config
from qlora_native.hf.conv1d import NF4Conv1D
from qlora_native.nn import NF4Experts, NF4Linear
from qlora_native.nn.model import modules_with_names, name_matches, replace_module
from qlora_native.nn.nf4_experts import is_experts
from qlora_native.ops.storage import NF4Tensors

_LARGE = 2**20  # elements from which a matrix that is no layer's is worth a warning


def put_nf4_layers(
    model: Any, config: NF4Config, is_wanted: Callable[[list[str]], bool]
) -> dict[str, nn.Module]:
    """Replace the layers whose names are wanted by empty 4-bit ones on the meta device.

    Args:
        model: a PreTrainedModel on the meta device.
        config: the layers' settings.
        is_wanted: given all names of a layer, whether it is to be 4-bit.

    Returns:
        The new layers by name; a layer that has several names is there with the first.
    """
    placed = {}
    for layer, names in modules_with_names(model, is_quantizable).items():
        if is_wanted(names):
            placed[names[0]] = empty_nf4_layer(layer, config)
            replace_module(model, names, placed[names[0]])
    return placed


def is_quantizable(module: nn.Module) -> bool:
    """Whether there is a 4-bit layer for it. A subclass may compute something else: it is left."""
    return type(module) in (nn.Linear, Conv1D) or is_experts(module)


def empty_nf4_layer(layer: Any, config: NF4Config) -> nn.Module:
    """The 4-bit layer for `layer`, on the meta device; a bias has the dtype that it had."""
    settings: dict[str, Any] = {
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "compute_dtype": config.compute_dtype,
        "device": "meta",
    }
    if is_experts(layer):
        return NF4Experts(layer, **settings)
    is_conv1d = isinstance(layer, Conv1D)
    k, n = layer.weight.shape if is_conv1d else reversed(layer.weight.shape)
    nf4 = (NF4Conv1D if is_conv1d else NF4Linear)(k, n, bias=layer.bias is not None, **settings)
    if layer.bias is not None:
        nf4.bias = nn.Parameter(layer.bias.to("meta"), requires_grad=False)
    return nf4.train(layer.training)


def is_named(name: str, entries: Iterable[str]) -> bool:
    """Whether one of `entries` is `name` or a run of whole parts of it."""
    return any(name_matches(name, entry) for entry in entries)


def default_skip(model: Any) -> set[str]:
    """The output head, what is tied to another weight, and the layer at the model's end.

    That last one is the head of a classifier, say, which the checkpoint of a language model does
    not have: it starts at random and is trained.
    """
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    last = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0]
    if is_quantizable(model.get_submodule(last)):
        names.add(last)
    return names | tied_layers(model)


def tied_layers(model: Any) -> set[str]:
    """Layers whose weight is another module's as well, by name."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {key.rpartition(".")[0] for key in (*keys.keys(), *keys.values())}
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    tied.update(*(names for names in owners.values() if len(names) > 1))
    return {name for name in tied if is_quantizable(model.get_submodule(name))}


def check_skip(model: Any, skip: Iterable[str]) -> None:
    """Raise ValueError for an entry that matches no module, or a tied layer that none matches."""
    skip = list(skip)
    names = [name for name, _ in model.named_modules()]
    for entry in skip:
        if entry != "lm_head" and not any(name_matches(name, entry) for name in names):
            raise ValueError(f"NF4Config: skip has {entry!r}, which matches no module")
    for name in sorted(tied_layers(model)):
        if not is_named(name, skip):
            raise ValueError(
                f"NF4Config: skip does not have {name!r}, whose weight is tied to another; "
                "quantising it would untie them"
            )


def warn_of_dense_weights(model: Any, skip: Iterable[str]) -> None:
    """Name the large weights that stay dense without having been asked to: experts, for one."""
    left: Mapping[str, Any] = {
        f"{name}.{parameter_name}".lstrip("."): parameter
        for name, module in model.named_modules()
        if not _stays_as_it_is(module) and not is_named(name, skip)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
        and (parameter.dim() >= 3 or (parameter.dim() == 2 and _is_large(module, parameter)))
    }
    if left:
        size = sum(parameter.nbytes for parameter in left.values())
        warnings.warn(
            f"NF4Config leaves {size:,} bytes of weights dense for which it has no 4-bit layer: "
            + ", ".join(left),
            stacklevel=2,
        )


def _is_large(module: nn.Module, parameter: torch.Tensor) -> bool:
    return isinstance(module, nn.Linear) or parameter.numel() >= _LARGE


def _stays_as_it_is(module: nn.Module) -> bool:
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    known = nn.Embedding | NF4Linear | NF4Experts | convolutions
    return is_quantizable(module) or isinstance(module, known)


def names_in_model(model: Any, layers: Iterable[str]) -> set[str]:
    """Names that layers of a checkpoint may have in `model`, by which it is loaded.

    The model may be newer than the checkpoint, and its class have other names. A head's model has a
    prefix before the names that the bare model has, and loads both.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    names = set()
    for layer in layers:
        key = f"{layer}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        name = key.removesuffix(".weight")
        names |= {name, name.removeprefix(prefix), prefix + name}
    return names


def nf4_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The 4-bit layers of `model`, with their names."""
    return modules_with_names(model, lambda module: isinstance(module, NF4Linear | NF4Experts))


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate keeps the layer's parameters elsewhere until it is called."""
    return any(parameter.is_meta for parameter in layer.parameters())


def has_finite_scales(layer: Any) -> bool:
    """Whether all of a layer's scales are numbers; a file may hold any bytes."""
    if isinstance(layer, NF4Linear):
        return _finite(layer.tensors())
    return all(
        _finite(layer.tensors(name, e))
        for name in layer.weight_shapes
        for e in range(layer.num_experts)
    )


def _finite(weight: NF4Tensors) -> bool:
    """Nested scales are not decoded for it: none is larger than the largest of these sums."""
    nested = [part for part in (weight.nested_absmax, weight.nested_offset) if part is not None]
    parts = nested or [weight.absmax]
    extremes = [torch.stack(torch.aminmax(part.view(torch.float32))) for part in parts]
    return bool(sum(extreme.abs().amax() for extreme in extremes).isfinite())
