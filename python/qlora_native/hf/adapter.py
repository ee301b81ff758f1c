"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are `base_model.model.<path>.lora_A.weight` [r, in_features] and
`base_model.model.<path>.lora_B.weight` [out_features, r], where <path> is the layer's name in the
model. The config says how to scale them and, for a program that builds the layers itself, which
modules they belong to.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_native.nn import LoRALinear
from qlora_native.nn.lora_adapter import check_lora_arguments
from qlora_native.nn.model import lora_layers, modules_with_names, replace_module

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")

# Settings of PEFT that change what an adapter computes, with the value at which they do not. An
# adapter that has another is refused: loaded as plain LoRA it would compute something else.
_PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}


# Initialisations of PEFT that take something out of the base weight: beside another base such an
# adapter computes something else.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


class _SavedLayer(NamedTuple):
    """What a folder has for one layer."""

    lora_a: Tensor  # [r, in_features]
    lora_b: Tensor  # [out_features, r]
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool


def save_lora(
    model: nn.Module,
    directory: str | Path,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write the LoRA matrices of `model` to `directory`, in PEFT's format.

    `peft.PeftModel.from_pretrained(base, directory)` reads it, and so does `load_lora`. Factors are
    written in their own dtype. Layers may differ in r and lora_alpha (PEFT's `rank_pattern` and
    `alpha_pattern`); lora_dropout and use_rslora are one value for all, as PEFT has it.

    Args:
        model: has LoRALinear layers.
        directory: created if it is not there; an adapter in it is overwritten.
        base_model_name_or_path: recorded in the config for programs that load the base by it.

    Raises:
        ValueError: the model has no LoRALinear, the layers differ in lora_dropout or use_rslora, or
            PEFT's matching of names would hit more modules than those that have a LoRA.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("save_lora: the model has no LoRALinear; add_lora puts them in")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": _shared_value(layers, "use_rslora"),
        "lora_dropout": _shared_value(layers, "lora_dropout"),
        "target_modules": _target_modules(model, layers),
        **_default_and_pattern("r", "rank_pattern", {n: x.r for n, x in layers.items()}),
        **_default_and_pattern(
            "lora_alpha", "alpha_pattern", {n: x.lora_alpha for n, x in layers.items()}
        ),
    }
    tensors = {}
    for name, layer in layers.items():
        for factor, parameter in (("A", layer.lora_a), ("B", layer.lora_b)):
            key = f"base_model.model.{name}.lora_{factor}.weight"
            tensors[key] = parameter.detach().cpu().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_lora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put the adapter of `directory`, in PEFT's format, on `model`, in place.

    A model without LoRA gets a LoRALinear around each layer that the file names, and all else is
    frozen, as by `add_lora`. A model that has LoRA layers must have them where the file does, with
    the same r and scaling; their factors are overwritten.

    Args:
        model: its NF4Linear and nn.Linear layers have the names that they had when it was trained.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: a file cannot be read, the adapter is not plain LoRA (but DoRA, say), or it does
            not fit the model; the message lists what differs. The model is then as it was.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    saved, differences = _pair_factors(_read_tensors(directory / WEIGHTS_FILE), config)
    existing = dict(lora_layers(model))
    for name, layer in saved.items():
        differences += _compare_with_model(model, name, layer)
    differences += [f"{name}: the file has no such layer" for name in existing if name not in saved]
    if differences:
        raise ValueError(
            f"load_lora: {directory} does not fit the model:\n  " + "\n  ".join(differences)
        )
    if not existing:
        model.requires_grad_(False)
        bases = {model.get_submodule(name): layer for name, layer in saved.items()}
        for base, names in modules_with_names(model, lambda module: module in bases).items():
            layer = bases[base]
            settings = layer.r, layer.lora_alpha, layer.lora_dropout, layer.use_rslora
            replace_module(model, names, LoRALinear(base, *settings))
    with torch.no_grad():
        for name, layer in saved.items():
            module = model.get_submodule(name)
            module.lora_a.copy_(layer.lora_a)
            module.lora_b.copy_(layer.lora_b)
    return model


# ---- what a model has


def _shared_value(layers: Mapping[str, LoRALinear], attribute: str) -> Any:
    values = {getattr(layer, attribute) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(
            f"save_lora: the layers' {attribute} are {sorted(values)}, want one value: "
            "PEFT's format holds one for all layers"
        )
    return values.pop()


def _default_and_pattern(setting: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The commonest value as `setting`, and the layers that differ as `pattern`."""
    default = Counter(values.values()).most_common(1)[0][0]
    others = {name: value for name, value in values.items() if value != default}
    return {setting: default, pattern: others}


def _target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str]:
    """Names by which PEFT finds `layers` and nothing else: short ones if they do, else whole ones.

    PEFT takes every module whose name is a target or ends in a dot and a target.
    """
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.named_modules() if not name.startswith(inside)]

    def found(targets: Collection[str]) -> set[str]:
        return {
            name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)
        }

    for targets in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        if found(targets) == set(layers):
            return sorted(targets)
    more = sorted(found(set(layers)) - set(layers))
    raise ValueError(
        "save_lora: by the names of the LoRA layers PEFT would find these as well, which have no "
        f"LoRA: {', '.join(more)}"
    )


# ---- what a folder has


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"load_lora: there is no {path}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"load_lora: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"load_lora: {path} holds a {type(config).__name__}, want an object")
    for setting in ("peft_type", "r", "lora_alpha"):
        if setting not in config:
            raise ValueError(f"load_lora: {path} has no {setting}")
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise ValueError(
            f"load_lora: {path} has init_lora_weights={config['init_lora_weights']!r}, with which "
            "PEFT trains beside a changed base; save it from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    for setting, plain in _PLAIN_LORA.items():
        value = config.get(setting, plain)
        if value != plain and (value or plain):  # [] and {} say as little as null
            raise ValueError(
                f"load_lora: {path} has {setting}={value!r}, want {plain!r}: "
                "a LoRALinear does plain LoRA alone"
            )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"load_lora: there is no {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_lora: {path} cannot be read: {error}") from error


def _pair_factors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, _SavedLayer], list[str]]:
    """What the file has for each layer, by its name, and a line for all that makes no layer."""
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            found.setdefault(match["name"], {})[match["factor"]] = tensor
        else:
            problems.append(f"{key}: not a factor of a plain LoRA layer")
    if not tensors:
        problems.append("the file has no tensors")
    layers = {}
    for name, factors in found.items():
        if missing := {"A", "B"} - set(factors):
            problems.append(f"{name}: lora_{missing.pop()} is missing")
            continue
        layers[name] = _SavedLayer(
            factors["A"],
            factors["B"],
            r=_value_for(name, config["r"], config.get("rank_pattern")),
            lora_alpha=_value_for(name, config["lora_alpha"], config.get("alpha_pattern")),
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
        )
    return layers, problems


def _value_for(name: str, default: Any, pattern: Mapping[str, Any] | None) -> Any:
    """PEFT's rule: the first key of `pattern` that is a regular expression for the name's end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _compare_with_model(model: nn.Module, name: str, saved: _SavedLayer) -> list[str]:
    """A line for each thing that keeps `saved` off the layer of that name."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return [f"{name}: the model has no such module"]
    lines = []
    if isinstance(module, LoRALinear):
        in_model = (module.r, module.lora_alpha, module.use_rslora)
        in_file = (saved.r, saved.lora_alpha, saved.use_rslora)
        if in_model != in_file:
            lines.append(
                f"{name}: (r, lora_alpha, use_rslora) is {in_file}, the model's is {in_model}"
            )
        module = module.base
    try:
        check_lora_arguments(name, module, saved.r, saved.lora_alpha, saved.lora_dropout)
    except ValueError as error:
        return [*lines, str(error)]
    for factor, tensor, shape in (
        ("A", saved.lora_a, [saved.r, module.in_features]),
        ("B", saved.lora_b, [module.out_features, saved.r]),
    ):
        if list(tensor.shape) != shape:
            lines.append(f"{name}: lora_{factor} is {list(tensor.shape)}, want {shape}")
    return lines
