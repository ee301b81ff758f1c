"""What PEFT asks when it puts LoRA into a model, takes it out and merges it, for NF4 layers too."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.patching import Function, checked, wrap, wrap_everywhere
from qlora_native.hf.peft.rollback import unchanged_on_error
from qlora_native.nn import NF4Linear

_ALL_LINEAR = "all-linear"


def install() -> None:
    """Wrap PEFT's dispatcher of LoRA layers and the functions around it."""
    checked(NF4LoraLinear.__base__, "update_layer", ("adapter_name", "r", "lora_alpha", "config"))
    wrap(lora_model, "dispatch_default", ("target", "adapter_name", "config"), _knows_nf4)
    wrap_everywhere(
        tuners_utils, "_maybe_include_all_linear_layers", ("peft_config", "model"), _includes_nf4
    )
    wrap(LoraModel, "inject_adapter", ("model", "adapter_name"), _checks_first)
    for name in ("load_adapter", "from_pretrained"):
        wrap(PeftModel, name, ("model_id",), _all_or_nothing)
    wrap(BaseTuner, "merge_adapter", ("adapter_names", "safe_merge"), _merges_dense)
    wrap(LoraModel, "_unload_and_optionally_merge", ("merge", "safe_merge"), _merges_dense)


def _knows_nf4(original: Function) -> Function:
    def dispatch_default(
        target: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None:
            parameter = getattr(base, parameter_name, None)
            if parameter is not None and not parameter.is_floating_point():
                raise NotImplementedError(
                    f"LoRA: target_parameters names {parameter_name!r} of a {type(base).__name__}, "
                    "whose weight is stored in 4 bits; use target_modules for NF4Linear layers, or "
                    "leave this one dense"
                )
        elif isinstance(base, NF4Linear):
            if target is not base:
                raise NotImplementedError(
                    f"LoRA: the target is a {type(target).__name__} of another tuner, on an "
                    "NF4Linear; several kinds of tuners on one NF4Linear are not there"
                )
            return NF4LoraLinear(target, adapter_name, config=config, **kwargs)
        return original(
            target, adapter_name, config=config, parameter_name=parameter_name, **kwargs
        )

    return dispatch_default


def _includes_nf4(original: Function) -> Function:
    def _maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
        targets = getattr(peft_config, "target_modules", None)
        peft_config = original(peft_config, model)
        if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
            peft_config.target_modules |= _targetable_nf4(model, peft_config)
        return peft_config

    return _maybe_include_all_linear_layers


def _targetable_nf4(model: nn.Module, config: PeftConfig) -> set[str]:
    """Names of the NF4Linear layers that are in no tuner's layer, but for the head."""
    names = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    if config.task_type != "SEQ_CLS":
        heads = []
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        heads.append(get_output_embeddings())
    for name, module in model.named_modules():
        if any(module is head for head in heads):
            names.discard(name)
        elif isinstance(module, BaseTunerLayer):
            names = {each for each in names if not each.startswith(f"{name}.")}
    return names


def _checks_first(original: Function) -> Function:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any):
        if not has_nf4(model):
            return original(self, model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        check_modules_to_save(model, config)
        with unchanged_on_error(model):
            try:
                return original(self, model, adapter_name, *args, **kwargs)
            except NoMatchingPeftModuleError as error:
                raise NoMatchingPeftModuleError(
                    f"{error} The linear layers of the model are: {', '.join(_linears(model))}"
                ) from error

    return inject_adapter


def check_modules_to_save(model: nn.Module, config: PeftConfig) -> None:
    """Raise NotImplementedError if `config` would train a copy of a 4-bit layer."""
    for name in getattr(config, "modules_to_save", None) or ():
        for path, module in model.named_modules():
            if f".{path}".endswith(f".{name}") and has_nf4(module):
                raise NotImplementedError(
                    f"modules_to_save names {path!r}, which is, or has in it, an NF4Linear: a "
                    "4-bit weight cannot be trained. Leave it dense when quantising, or target it "
                    "with LoRA"
                )


def _all_or_nothing(original: Function) -> Function:
    def load(self_or_class: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        target = self_or_class if isinstance(self_or_class, nn.Module) else model
        if not isinstance(target, nn.Module) or not has_nf4(target):
            return original(self_or_class, model, *args, **kwargs)
        with unchanged_on_error(target):
            return original(self_or_class, model, *args, **kwargs)

    return load


def _merges_dense(original: Function) -> Function:
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_nf4(self.model):
            return original(self, *args, **kwargs)
        for layer in self.model.modules():
            if isinstance(layer, NF4LoraLinear):
                layer.merge_dtype = dense_dtype(self.model)
        with unchanged_on_error(self):
            return original(self, *args, **kwargs)

    return merge


def dense_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's weights that are neither 4-bit nor an adapter's."""
    adapters = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.startswith(adapters):
            return parameter.dtype
    return torch.float32


def has_nf4(model: nn.Module) -> bool:
    """Whether there is an NF4Linear in `model`."""
    return any(isinstance(module, NF4Linear) for module in model.modules())


def _linears(model: nn.Module) -> Iterable[str]:
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, NF4Linear | nn.Linear)
        }
    )
