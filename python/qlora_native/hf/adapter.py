"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are `base_model.model.<path>.lora_A.weight` [r, in_features],
`base_model.model.<path>.lora_B.weight` [out_features, r] and, for DoRA,
`base_model.model.<path>.lora_magnitude_vector` [out_features], where <path> is the layer's name in
the model. An adapter's own name is in neither file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlora_native.hf.adapter_config import AdapterConfig, AdapterSettings, config_of
from qlora_native.hf.adapter_files import read_config, read_tensors, write_adapter
from qlora_native.nn import LoRAAdapter, LoRALinear
from qlora_native.nn.add_lora import adapter_names, check_may_change, check_not_peft, put_adapters
from qlora_native.nn.lora_adapter import check_adapter_name, check_lora_arguments
from qlora_native.nn.model import Layers, lora_layers, modules_with_names
from qlora_native.nn.routing import check_exist
from qlora_native.nn.wrapping import check_not_distributed, plain_name, unwrapped
from qlora_native.sharding import copy_whole, gathered, on_first_rank

# The parameters of a LoRAAdapter, with the ends of their keys.
_KEY_ENDS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_KEY = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?P<end>"
    + "|".join(map(re.escape, _KEY_ENDS.values()))
    + ")"
)


class _SavedLayer(NamedTuple):
    """What a folder has for one layer."""

    tensors: dict[str, Tensor]  # by the name of the LoRAAdapter's parameter
    settings: AdapterSettings


def save_lora(
    model: nn.Module,
    directory: str | Path,
    base_model_name_or_path: str | None = None,
    adapter_name: str | None = None,
) -> None:
    """Write an adapter of `model` to `directory`, in PEFT's format.

    `peft.PeftModel.from_pretrained(base, directory)` reads it, and so does `load_lora`. Factors are
    written in their own dtype. Layers may differ in r and lora_alpha (PEFT's `rank_pattern` and
    `alpha_pattern`); lora_dropout, use_rslora and use_dora are one value for all, as PEFT has it.

    Args:
        model: has LoRALinear layers.
        directory: created if it is not there; an adapter in it is overwritten.
        base_model_name_or_path: recorded in the config for programs that load the base by it.
        adapter_name: which adapter; None: the one that the model has.

    Raises:
        ValueError: the model has no LoRALinear, no adapter of that name or, without a name,
            several; its layers are PEFT's, which saves them itself; or PEFT's format cannot say
            what it has: the layers differ in a setting that is one value for all, or PEFT's
            matching of names would hit more modules than those that have the adapter. No file is
            then written.
    """
    model = unwrapped(model)
    check_not_peft("save_lora", model)
    layers = dict(lora_layers(model))
    existing = {name for layer in layers.values() for name in layer.lora_names()}
    if not existing:
        raise ValueError("save_lora: the model has no LoRALinear; add_lora puts them in")
    if adapter_name is None:
        if len(existing) > 1:
            raise ValueError(
                "save_lora: adapter_name is None, but the model has several adapters: "
                + ", ".join(map(repr, sorted(existing)))
            )
        (adapter_name,) = existing
    check_exist("save_lora", [adapter_name], existing)
    adapters = {
        name: layer.adapters[adapter_name]
        for name, layer in layers.items()
        if adapter_name in layer.adapters
    }
    config = config_of(model, adapters, base_model_name_or_path)
    parameters = {
        f"base_model.model.{name}.{_KEY_ENDS[parameter_name]}": parameter
        for name, adapter in adapters.items()
        for parameter_name, parameter in adapter.named_parameters()
    }
    tensors = {key: gathered(parameter) for key, parameter in parameters.items()}
    on_first_rank(parameters.values(), lambda: write_adapter(Path(directory), tensors, config))


def load_lora(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> nn.Module:
    """Put the adapter of `directory`, in PEFT's format, on `model` under a name, in place.

    If the model has no adapter of that name, each layer that the file names gets one, as by
    `add_lora`: all that is no adapter is frozen, and the first adapter of a model is in force. If
    it has one, in the same layers with the same r and settings, its factors are overwritten where
    they lie: the base is not touched, a compiled model is not compiled again, and an optimiser or a
    CUDA graph keeps what it has. Factors are converted to the parameters' dtype (fp32, unless they
    were cast).

    Args:
        model: its NF4Linear and nn.Linear layers have the names that they had when it was trained.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: what it is called in this model.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: a file cannot be read, the adapter is neither LoRA nor DoRA, or it does not fit
            the model; the message lists what differs. The model is then as it was.
    """
    directory = Path(directory)
    wrapped, model = model, unwrapped(model)
    check_may_change("load_lora", model)
    if adapter_name not in adapter_names(model):
        check_adapter_name("load_lora", adapter_name)
    config = AdapterConfig(read_config(directory), directory)
    saved, differences = layers_of_file(read_tensors(directory), config)
    equipped = {name: layer for name, layer in lora_layers(model) if adapter_name in layer.adapters}
    is_new = not equipped
    for name, layer in saved.items():
        differences += _differences(model, name, layer, None if is_new else adapter_name)
    differences += [f"{name}: the file has no such layer" for name in equipped if name not in saved]
    targets = _modules_of(model, saved, differences)
    if differences:
        raise ValueError(
            f"load_lora: {directory} does not fit the model:\n  " + "\n  ".join(differences)
        )
    if is_new:
        check_not_distributed("load_lora", wrapped)
        _put_new(model, adapter_name, targets, saved)
    with torch.no_grad():
        for name, layer in saved.items():
            adapter = model.get_submodule(name).adapters[adapter_name]
            for parameter_name, parameter in adapter.named_parameters():
                copy_whole(layer.tensors[parameter_name], into=parameter)
    return wrapped


def _put_new(
    model: nn.Module, adapter_name: str, targets: Layers, saved: Mapping[str, _SavedLayer]
) -> None:
    settings = {
        module: saved[name].settings
        for module, names in targets.items()
        for name in map(plain_name, names)
        if name in saved
    }

    def wrap(base: nn.Module) -> LoRALinear:
        return LoRALinear(base, *settings[base], adapter_name)

    def make(layer: LoRALinear) -> LoRAAdapter:
        return layer.make_adapter(*settings[layer])

    put_adapters(model, adapter_name, targets, wrap, make)


def _modules_of(
    model: nn.Module, saved: Mapping[str, _SavedLayer], differences: list[str]
) -> Layers:
    """The modules that the file speaks of, with all their names; a line for what is twice in it."""
    modules = {module for name, module in model.named_modules() if plain_name(name) in saved}
    shared = modules_with_names(model, lambda module: module in modules)
    for names in shared.values():
        if len(in_file := [name for name in map(plain_name, names) if name in saved]) > 1:
            differences.append(f"{', '.join(in_file)}: one layer of the model, twice in the file")
    return shared


def layers_of_file(
    tensors: Mapping[str, Tensor], config: AdapterConfig
) -> tuple[dict[str, _SavedLayer], list[str]]:
    """What the file has for each layer, by its name, and a line for all that makes no layer."""
    parameter_of_end = {end: parameter for parameter, end in _KEY_ENDS.items()}
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        if not (match := _KEY.fullmatch(key)):
            problems.append(f"{key}: not a factor of a LoRA layer")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: {tensor.dtype}, want floating-point numbers")
        else:
            found.setdefault(match["layer"], {})[parameter_of_end[match["end"]]] = tensor
    if not tensors:
        problems.append("the file has no tensors")
    wanted = set(_KEY_ENDS) if config.use_dora else set(_KEY_ENDS) - {"magnitude"}
    layers = {}
    for name, of_layer in found.items():
        for parameter in sorted(wanted - set(of_layer)):
            problems.append(f"{name}: {_KEY_ENDS[parameter]} is missing")
        if set(of_layer) - wanted:
            problems.append(f"{name}: lora_magnitude_vector is there, but use_dora is false")
        if wanted == set(of_layer):
            layers[name] = _SavedLayer(of_layer, config.settings_of(name))
    return layers, problems


def _differences(
    model: nn.Module, name: str, saved: _SavedLayer, adapter_name: str | None
) -> list[str]:
    """A line for each thing that keeps `saved` off the layer of that name.

    With an adapter's name the layer must have that adapter, with the same settings.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return [f"{name}: the model has no such module"]
    parent = name.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), LoRALinear):
        return [f"{name}: the base of a LoRA layer, want {parent}"]
    lines = []
    settings = saved.settings
    if adapter_name is not None:
        if not isinstance(module, LoRALinear) or adapter_name not in module.adapters:
            return [f"{name}: the model has no adapter {adapter_name!r} there"]
        adapter = module.adapters[adapter_name]
        compared = ("r", "lora_alpha", "use_rslora", "use_dora")
        in_model = tuple(getattr(adapter, setting) for setting in compared)
        in_file = tuple(getattr(settings, setting) for setting in compared)
        if in_model != in_file:
            lines.append(f"{name}: ({', '.join(compared)}) is {in_file}, the model's is {in_model}")
    base = module.base if isinstance(module, LoRALinear) else module
    try:
        check_lora_arguments(name, base, settings.r, settings.lora_alpha, settings.lora_dropout)
    except ValueError as error:
        return [*lines, str(error)]
    shapes = {
        "lora_a": [settings.r, base.in_features],
        "lora_b": [base.out_features, settings.r],
        "magnitude": [base.out_features],
    }
    for parameter_name, tensor in saved.tensors.items():
        if list(tensor.shape) != shapes[parameter_name]:
            end = _KEY_ENDS[parameter_name].removesuffix(".weight")
            lines.append(f"{name}: {end} is {list(tensor.shape)}, want {shapes[parameter_name]}")
    return lines
