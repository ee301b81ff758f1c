"""PEFT's tuners on NF4 layers: which of them work, and the one place where they are let in.

A tuner that PEFT injects looks for nn.Linear layers and reads their weights. While it does so, the
model's NF4 layers show it that face (`nf4_as_linear`); those that it has wrapped keep it, and the
wrapping layers merge into dense copies (`tuner_merging`). LoRA does not come this way: it has a
fused layer of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
from peft import PeftConfig
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.xlora import XLoraModel
from torch import nn

from qlora_native.hf.peft.injection import has_nf4
from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.nf4_as_linear import NF4AsLinear, ReadOnlyWeightError, hide, show
from qlora_native.hf.peft.patching import Function, wrap
from qlora_native.hf.peft.tuner_merging import MergesIntoDense, on_nf4
from qlora_native.nn import NF4Linear
from qlora_native.nn.dense import dense_dtype

# Tested against the same tuner on the dequantised weights (tests/python/hf/peft/test_all_tuners).
ON_NF4 = frozenset(
    {
        "ADALORA",
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LOHA",
        "LOKR",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
# Through PEFT's LoRA layers, for which there is a fused one.
BY_LORA = frozenset(["LORA", "XLORA"])


def install() -> None:
    """Let PEFT's tuners find NF4 layers; again, nothing happens.

    Raises ImportError where the installed PEFT has not what is wrapped.
    """
    wrap(BaseTuner, "__init__", ("model", "peft_config", "adapter_name"), _constructs)
    wrap(BaseTuner, "inject_adapter", ("model", "adapter_name"), _injects)
    unloading = ("merge", "safe_merge", "adapter_names")
    for tuner in (BaseTuner, MixedModel):
        wrap(tuner, "_unload_and_optionally_merge", unloading, _unloads)
    wrap(XLoraModel, "_check_merge_allowed", (), _refuses_to_merge)
    wrap(BaseTunerLayer, "_get_base_layer_device_and_dtype", ("base_layer",), _knows_dtype)
    wrap(AdaptionPromptModel, "_create_adapted_attentions", ("config", "parents"), _asks_dtype)
    if hasattr(peft, "GloraModel"):
        parameters = ("peft_config", "adapter_name", "target")
        wrap(peft.GloraModel, "_create_new_module", parameters, _takes_face)


# ---- what PEFT's functions become


def _constructs(original: Function) -> Function:
    def __init__(
        self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        with _let_in(model, config):
            original(self, model, peft_config, adapter_name, *args, **kwargs)

    return __init__


def _injects(original: Function) -> Function:
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        with _let_in(model, config):
            self._create_and_replace = _checking(self._create_and_replace, _name(config))
            try:
                original(self, model, adapter_name, *args, **kwargs)
            finally:
                del self._create_and_replace

    return inject_adapter


def _unloads(original: Function) -> Function:
    def _unload_and_optionally_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        _settle(self.model)
        return model

    return _unload_and_optionally_merge


def _refuses_to_merge(original: Function) -> Function:
    def _check_merge_allowed(self: Any) -> None:
        if has_nf4(self.lora_model):
            raise NotImplementedError(
                "PEFT's XLORA weighs its adapters anew for each token: there is no one weight to "
                "merge into an NF4Linear"
            )
        original(self)

    return _check_merge_allowed


def _knows_dtype(original: Function) -> Function:
    def _get_base_layer_device_and_dtype(self: Any, base_layer: nn.Module) -> Any:
        """As for a dense layer; compute_dtype, by which PEFT would go, is about products alone."""
        if isinstance(base_layer, NF4AsLinear):
            return base_layer.weight.device, base_layer.weight.dtype
        return original(self, base_layer)

    return _get_base_layer_device_and_dtype


def _asks_dtype(original: Function) -> Function:
    def _create_adapted_attentions(self: Any, *args: Any, **kwargs: Any) -> None:
        """The prompts get the dtype of the projections beside them, which stay as they are."""
        with _shown(self.model):
            original(self, *args, **kwargs)

    return _create_adapted_attentions


def _takes_face(original: Function) -> Function:
    def _create_new_module(
        peft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        """GLoRA takes nn.Linear itself and no subclass; its layer can do with any weight."""
        if isinstance(_base_of(target), NF4AsLinear):
            return peft.tuners.glora.layer.GloraLinear(target, adapter_name, config=peft_config)
        return original(peft_config, adapter_name, target, **kwargs)

    return _create_new_module


# ---- letting a tuner in


@contextmanager
def _let_in(model: nn.Module, config: PeftConfig) -> Iterator[None]:
    """A tuner goes about `model`; what it may not do there raises."""
    name = _name(config)
    try:
        with _shown(model) if name in ON_NF4 and has_nf4(model) else nullcontext():
            yield
    except ReadOnlyWeightError as error:
        raise TypeError(f"PEFT's {name} cannot start from an NF4Linear: {error}") from error


def _checking(create: Function, name: str) -> Function:
    """PEFT's `_create_and_replace`, which must wrap an NF4 layer or raise."""

    def _create_and_replace(
        config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        base = _base_of(target)
        is_nf4 = isinstance(base, NF4Linear)
        if is_nf4 and name not in ON_NF4 | BY_LORA:
            raise NotImplementedError(
                f"PEFT's {name} (peft {peft.__version__}) is not known to be right on an "
                f"NF4Linear, and {target_name} is one; known are "
                + ", ".join(sorted(ON_NF4 | BY_LORA))
            )
        if isinstance(target, NF4LoraLinear) and name not in BY_LORA:
            raise NotImplementedError(
                f"PEFT's {name} would be put on the LoRA of {target_name}, an NF4Linear, which is "
                "not there; give the two different target_modules"
            )
        if is_nf4 and name in ON_NF4 and not isinstance(base, NF4AsLinear):
            raise NotImplementedError(
                f"PEFT's {name} is there for NF4Linear itself, and {target_name} is an "
                f"{type(base).__name__}, which stands for another layer than an nn.Linear; LoRA is "
                "there for both"
            )
        create(config, adapter_name, target, target_name, parent, *args, **kwargs)
        if is_nf4 and not isinstance(getattr(parent, target_name), BaseTunerLayer):
            raise NotImplementedError(f"PEFT's {name} has left out the NF4Linear {target_name}")

    return _create_and_replace


@contextmanager
def _shown(model: nn.Module) -> Iterator[None]:
    """NF4 layers show the face of an nn.Linear, and those that are wrapped by then keep it."""
    shown = [module for module in model.modules() if isinstance(module, NF4AsLinear)]
    dtype = shown[0].dense_dtype if shown else dense_dtype(model)
    under_lora = {m.base_layer for m in model.modules() if isinstance(m, NF4LoraLinear)}
    for module in model.modules():
        if type(module) is NF4Linear and module not in under_lora:
            show(module, dtype)
    try:
        yield
    finally:
        _settle(model)


def _settle(model: nn.Module) -> None:
    """Wrapped NF4 layers have the face of an nn.Linear and their wrapper's merge; others not."""
    wrapped = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(_base_of(module), NF4AsLinear):
            wrapped.add(_base_of(module))
            if not isinstance(module, MergesIntoDense):
                made: Any = type(module)
                module.__class__ = on_nf4(made)
    for module in model.modules():
        if isinstance(module, NF4AsLinear) and module not in wrapped:
            hide(module)


def _name(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _base_of(target: nn.Module) -> nn.Module:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
