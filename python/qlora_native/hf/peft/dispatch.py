"""Which layer PEFT's LoRA puts on an NF4Linear, and what "all-linear" targets."""

from typing import Any

from peft import PeftConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn

from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.patching import Function, checked, wrap, wrap_everywhere
from qlora_native.nn import NF4Linear


def install() -> None:
    """Wrap PEFT's dispatcher of LoRA layers, and what lists the layers of "all-linear"."""
    checked(lora_layer.Linear, "update_layer", ("adapter_name", "r", "lora_alpha", "config"))
    checked(lora_layer.Linear, "resolve_lora_variant", ("config",))
    wrap(lora_model, "dispatch_default", ("target", "adapter_name", "config"), _knows_nf4)
    wrap_everywhere(
        tuners_utils, "_maybe_include_all_linear_layers", ("peft_config", "model"), _includes_nf4
    )


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
                    f"which is {parameter.dtype}: a weight that is stored in 4 bits. Use "
                    "target_modules for NF4Linear layers, or leave this one dense"
                )
        elif isinstance(base, NF4Linear):
            if target is not base:
                raise NotImplementedError(
                    f"LoRA: the target is a {type(target).__name__}, another tuner's layer on an "
                    "NF4Linear; two kinds of tuners on one NF4Linear are not there"
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
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            nf4_layers = _targetable_nf4(model, peft_config)
            peft_config.target_modules = {*peft_config.target_modules, *nf4_layers}
        return peft_config

    return _maybe_include_all_linear_layers


def _targetable_nf4(model: nn.Module, config: PeftConfig) -> set[str]:
    """Names of the NF4Linear layers, without the head and those inside of tuners' layers.

    PEFT's rule for nn.Linear: the output embeddings are the head, or else that of a classifier.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    heads = [get_output_embeddings()] if callable(get_output_embeddings) else []
    if config.task_type == "SEQ_CLS":
        heads += [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    names = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    for name, module in model.named_modules():
        if any(module is head for head in heads):
            names.discard(name)
        elif isinstance(module, BaseTunerLayer):
            names = {each for each in names if not each.startswith(f"{name}.")}
    return names
