"""Turning a model of linear layers into a QLoRA model, and back."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from qlora_native.nn.lora_linear import LoRALinear
from qlora_native.nn.nf4_experts import NF4Experts, is_experts
from qlora_native.nn.nf4_linear import NF4Linear
from qlora_native.nn.wrapping import check_not_distributed, plain_name

Progress = Callable[[int, int, str], None]


def quantize_model(
    model: nn.Module,
    skip: Sequence[str] = ("lm_head",),
    *,
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` of `model` by an `NF4Linear`, in place and one at a time.

    The experts of transformers' mixtures, which are parameters of three dimensions, become
    NF4Experts. The dense weight of a layer is dropped before the next is quantised, so memory peaks
    at the model plus one layer.

    Args:
        model: any module; it is also what is returned.
        skip: names of what stays dense: a layer's whole name, or a part of it between dots
            (`"lm_head"`, `"visual"`). So does what transformers keeps in fp32 (T5's `wo`).
        block_size: weights that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        compute_dtype: of the layers, see `NF4Linear`.
        progress: called with (layers done, layers in all, name of the layer) after each.

    A model of transformers can then be saved with `save_pretrained` and loaded again as a 4-bit
    model, once `qlora_native.hf` is imported.

    Raises:
        ValueError: there is nothing to quantise, a name in `skip` matches no module, a layer's
            weight is shared with another module (quantising it would untie them), or a weight has a
            NaN or Inf (the layers before it are quantised).
    """
    check_not_distributed("quantize_model", model)
    if isinstance(skip, str):
        raise ValueError(f"quantize_model: skip is {skip!r}, want a list of names")
    names = [name for name, _ in model.named_modules()]
    for entry in skip:
        if entry != "lm_head" and not any(name_matches(name, entry) for name in names):
            raise ValueError(f"quantize_model: skip has {entry!r}, which matches no module")
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_experts(module))
        and not any(name_matches(name, entry) for entry in {*skip, *kept_in_fp32(model)})
    ]
    subclasses = [name for name, module in targets if not is_quantizable(module)]
    if subclasses:
        warnings.warn(
            "quantize_model leaves subclasses of nn.Linear dense: " + ", ".join(subclasses),
            stacklevel=2,
        )
    targets = [(name, module) for name, module in targets if is_quantizable(module)]
    if not targets:
        raise ValueError("quantize_model: the model has no nn.Linear to quantise (after skip)")
    check_not_root("quantize_model", model, [module for _, module in targets])
    _check_untied(model, targets)
    hf_quantizer = _quantizer_for(model, block_size, double_quant, compute_dtype, skip)
    _warn_of_other_weights(model, skip)

    for done, name in enumerate([name for name, _ in targets], start=1):
        layer = targets.pop(0)[1]  # the list must not keep the dense weight alive
        quantize = NF4Linear.from_linear if type(layer) is nn.Linear else NF4Experts.from_experts
        try:
            quantized = quantize(
                layer,
                block_size=block_size,
                double_quant=double_quant,
                compute_dtype=compute_dtype,
            )
        except ValueError as error:
            raise ValueError(f"quantize_model: {name}: {error}") from error
        replace_module(model, [name], quantized)
        if progress is not None:
            progress(done, done + len(targets), name)
    if hf_quantizer is not None:
        hf_quantizer.attach(model)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; an NF4 weight counts its n · k weights, not its bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, NF4Linear | NF4Experts):
            stored = sum(p.numel() for p in module.parameters() if p.dtype == torch.uint8)
            total += module.weight_count - stored
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, and their share of all."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def name_matches(name: str, entry: str) -> bool:
    """Whether `entry` is `name` or a run of whole components of it."""
    return f".{entry}." in f".{name}."


Layers: TypeAlias = dict[nn.Module, list[str]]


def modules_with_names(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> Layers:
    """Every such module with all the names that it has in `model`: it may be shared."""
    layers: Layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_wanted(module):
            layers.setdefault(module, []).append(name)
    return layers


def kept_in_fp32(model: Any) -> set[str]:
    """Modules that transformers keeps in fp32 where the model is not: T5's `wo`, for one.

    Their models cast activations to the dtype of such a weight, which 4-bit codes have not.
    """
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {name for names in lists for name in getattr(model, names, None) or ()}


def is_quantizable(module: nn.Module) -> bool:
    """Whether there is a 4-bit layer for it. A subclass may compute something else."""
    return type(module) is nn.Linear or is_experts(module)


def _check_untied(model: nn.Module, targets: Sequence[tuple[str, nn.Module]]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in targets:
        for weight_name, weight in layer.named_parameters(recurse=False):
            weight_name = f"{name}.{weight_name}"
            shared = [owner for owner in owners[id(weight)] if owner != weight_name]
            if shared and weight.dim() > 1:
                raise ValueError(
                    f"quantize_model: {weight_name} is also {', '.join(shared)}; quantising it "
                    f"would untie them: add {name!r} to skip"
                )


def _warn_of_other_weights(model: nn.Module, skip: Sequence[str]) -> None:
    """Name the matrices that are no linear layer's: the experts of a mixture, for one."""
    left = [
        (f"{name}.{parameter_name}".lstrip("."), parameter)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding | NF4Linear | NF4Experts)
        and not is_experts(module)
        and not any(name_matches(name, entry) for entry in skip)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and parameter.is_floating_point()
    ]
    if left:
        size = sum(parameter.nbytes for _, parameter in left)
        warnings.warn(
            f"quantize_model leaves {size:,} bytes of other weights dense: "
            + ", ".join(name for name, _ in left),
            stacklevel=3,
        )


def _quantizer_for(
    model: nn.Module,
    block_size: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
    skip: Sequence[str],
) -> Any:
    """By which a model of transformers says in its config.json how to load what it saves.

    None for another model, and with transformers before 5, which could not load it.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    from qlora_native import hf

    if "NF4Config" not in vars(hf):
        return None
    config = hf.NF4Config(block_size, double_quant, compute_dtype, list(skip))
    return hf.quantizer.NF4HfQuantizer(config, pre_quantized=True)


def check_not_root(operation: str, model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raise ValueError if `model` is one of `layers`: it cannot be replaced in itself."""
    if any(layer is model for layer in layers):
        raise ValueError(
            f"{operation}: the model is itself the layer to replace; wrap it in an nn.Sequential"
        )


def replace_module(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Put `new` in all the places of `model` that have these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRALinear with its name, as it was before parts of the model were wrapped."""
    return (
        (plain_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    )
