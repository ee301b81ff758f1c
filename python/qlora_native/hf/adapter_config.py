"""What `adapter_config.json` says of an adapter: PEFT's settings, read and written.

A layer's r and lora_alpha are the config's, unless a key of `rank_pattern` or `alpha_pattern` is a
regular expression for the end of its name; all else is one value for all layers.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from qlora_native.hf.adapter_files import CONFIG_FILE
from qlora_native.nn import LoRAAdapter
from qlora_native.nn.wrapping import plain_name

# Settings of PEFT that change what an adapter computes, with the value at which they do not. An
# adapter that has another is refused: loaded as plain LoRA it would compute something else.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_qalora": False,
    "use_bdlora": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}

# Settings that are read here, and those that say where layers are, how an adapter was initialised
# or trained, or who made the file: the tensors' names and values tell all that matters of them.
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"}
_READ |= {"alpha_pattern", "init_lora_weights"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}

# Initialisations of PEFT that take something out of the base weight: beside another base such an
# adapter computes something else.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdapterSettings(NamedTuple):
    """What a config says of one layer's adapter."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool


class AdapterConfig:
    """A config that has been found to be of plain LoRA or DoRA.

    Raises ValueError where it is of something else, or where a setting that is read has a type that
    it cannot have. Settings that this library does not know are named in a warning.
    """

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        self._path = directory / CONFIG_FILE
        for setting in ("peft_type", "r", "lora_alpha"):
            if setting not in config:
                raise ValueError(f"load_lora: {self._path} has no {setting}")
        self._check_is_plain(config)
        self._r = self._number(config, "r", 0, int)
        self._lora_alpha = self._number(config, "lora_alpha", 0.0)
        self._lora_dropout = self._number(config, "lora_dropout", 0.0)
        self._use_rslora = self._flag(config, "use_rslora")
        self.use_dora = self._flag(config, "use_dora")
        self._ranks = self._pattern(config, "rank_pattern", int)
        self._alphas = self._pattern(config, "alpha_pattern")

    def settings_of(self, name: str) -> AdapterSettings:
        """Of the layer of that name."""
        return AdapterSettings(
            r=_value_for(name, self._r, self._ranks),
            lora_alpha=_value_for(name, self._lora_alpha, self._alphas),
            lora_dropout=self._lora_dropout,
            use_rslora=self._use_rslora,
            use_dora=self.use_dora,
        )

    def _check_is_plain(self, config: Mapping[str, Any]) -> None:
        initialisation = config.get("init_lora_weights")
        if str(initialisation).lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"load_lora: {self._path} has init_lora_weights={initialisation!r}, with which "
                "PEFT trains beside a changed base; save it from PEFT with "
                "path_initial_model_for_weight_conversion"
            )
        for setting, plain in _PLAIN.items():
            value = config.get(setting, plain)
            if value != plain and (value or plain):  # [] and {} say as little as null
                raise ValueError(
                    f"load_lora: {self._path} has {setting}={value!r}, want {plain!r}: "
                    "a LoRALinear does plain LoRA and DoRA alone"
                )
        known = _PLAIN.keys() | _READ | _WITHOUT_EFFECT
        if unknown := sorted(key for key, value in config.items() if value and key not in known):
            warnings.warn(
                f"load_lora: {self._path} has settings that are not known here and have no effect: "
                + ", ".join(f"{key}={config[key]!r}" for key in unknown),
                stacklevel=4,
            )

    def _number(
        self, config: Mapping[str, Any], setting: str, default: float, kind: type = float
    ) -> Any:
        value = config.get(setting, default)
        self._check_number(setting, value, kind)
        return value

    def _check_number(self, setting: str, value: Any, kind: type) -> None:
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not is_number or not -math.inf < value < math.inf:
            wanted = "an integer" if kind is int else "a number"
            raise ValueError(f"load_lora: {self._path} has {setting}={value!r}, want {wanted}")

    def _flag(self, config: Mapping[str, Any], setting: str) -> bool:
        value = config.get(setting, False)
        if not isinstance(value, bool):
            raise ValueError(f"load_lora: {self._path} has {setting}={value!r}, want true or false")
        return value

    def _pattern(
        self, config: Mapping[str, Any], setting: str, kind: type = float
    ) -> dict[str, Any]:
        pattern = config.get(setting) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"load_lora: {self._path} has {setting}={pattern!r}, want an object")
        for key, value in pattern.items():
            self._check_number(f"{setting}[{key!r}]", value, kind)
            try:
                re.compile(_in_pattern(key))
            except re.error as error:
                raise ValueError(
                    f"load_lora: {self._path} has {setting} with the key {key!r}, which is no "
                    f"regular expression: {error}"
                ) from error
        return pattern


def config_of(
    model: nn.Module,
    adapters: Mapping[str, LoRAAdapter],
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    """The config of the adapter that the layers of these names have.

    Raises ValueError where PEFT's format cannot say it: the layers differ in a setting that it has
    once, or its matching of names would hit more modules than those that have the adapter.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": _shared_value(adapters, "use_dora"),
        "use_rslora": _shared_value(adapters, "use_rslora"),
        "lora_dropout": _shared_value(adapters, "lora_dropout"),
        "target_modules": _target_modules(model, adapters),
        **_default_and_pattern("r", "rank_pattern", {n: x.r for n, x in adapters.items()}),
        **_default_and_pattern(
            "lora_alpha", "alpha_pattern", {n: x.lora_alpha for n, x in adapters.items()}
        ),
    }


def _in_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _value_for(name: str, default: Any, pattern: Mapping[str, Any]) -> Any:
    """PEFT's rule: the first key of `pattern` that is a regular expression for the name's end."""
    for key, value in pattern.items():
        if re.match(_in_pattern(key), name):
            return value
    return default


def _shared_value(adapters: Mapping[str, LoRAAdapter], attribute: str) -> Any:
    values = {getattr(adapter, attribute) for adapter in adapters.values()}
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
    if any(_value_for(name, default, others) != value for name, value in values.items()):
        # A whole name is the end of another one as well.
        others = {f"^{re.escape(name)}": value for name, value in others.items()}
    return {setting: default, pattern: others}


def _target_modules(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Names by which PEFT finds `layers` and nothing else: short ones if they do, else whole ones.

    PEFT takes every module whose name is a target or ends in a dot and a target.
    """
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    lora_layers = [name for name, module in modules if hasattr(module, "lora_names")]
    inside = tuple(f"{name}." for name in lora_layers)
    names = [name for name, _ in modules if not name.startswith(inside)]

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
