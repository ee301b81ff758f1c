"""Adapters on a model with NF4 layers: checks before, and a model as it was after an error."""

import inspect
import itertools
import warnings
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.integrations import PeftAdapterMixin

from qlora_native.hf.peft.patching import Function, wrap
from qlora_native.hf.peft.rollback import unchanged_on_error
from qlora_native.nn import LoRALinear, NF4Linear
from qlora_native.nn.routing import routed_layers


def install() -> None:
    """Wrap what puts adapters into a model, and what loads their weights."""
    wrap(BaseTuner, "inject_adapter", ("model", "adapter_name"), _checks_first)
    wrap(PeftModel, "load_adapter", ("model_id", "adapter_name"), _leaves_nothing_out)
    wrap(PeftAdapterMixin, "load_adapter", ("adapter_name",), _leaves_nothing_out)
    for name in ("load_adapter", "from_pretrained"):
        wrap(PeftModel, name, ("model_id", "adapter_name"), _all_or_nothing)
    for name in ("load_adapter", "add_adapter"):  # of transformers' models
        wrap(PeftAdapterMixin, name, ("adapter_name",), _all_or_nothing)


def has_nf4(model: nn.Module) -> bool:
    """Whether there is an NF4Linear in `model`."""
    return any(isinstance(module, NF4Linear) for module in model.modules())


def _checks_first(original: Function) -> Function:
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        _check_not_native(model)
        if not has_nf4(model):
            return original(self, model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        _check_modules_to_save(model, config)
        targets = getattr(config, "target_modules", None)
        routing = [(layer, layer.routing.names) for layer in routed_layers(model)]
        with unchanged_on_error(model):
            try:
                original(self, model, adapter_name, *args, **kwargs)
            except NoMatchingPeftModuleError as error:
                raise NoMatchingPeftModuleError(
                    f"{error} The model's linear layers are: {', '.join(_linear_names(model))}"
                ) from error
        if not isinstance(targets, str):
            _warn_of_unknown(model, targets or ())
        for layer, names in routing:  # another adapter does not end what set_lora has said
            layer.routing.change(names)

    return inject_adapter


def _check_not_native(model: nn.Module) -> None:
    """PEFT would put its layers inside of ours, as the base or on an adapter's place."""
    native = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if native:
        raise ValueError(
            f"PEFT cannot add an adapter: the model has adapters of add_lora or load_lora already, "
            f"as {native[0]}; use either these or PEFT's in one model"
        )


def _check_modules_to_save(model: nn.Module, config: PeftConfig) -> None:
    for name in getattr(config, "modules_to_save", None) or ():
        for path, module in model.named_modules():
            if path and f".{path}".endswith(f".{name}") and has_nf4(module):
                raise NotImplementedError(
                    f"modules_to_save has {name!r}, but {path} is or contains an NF4Linear, and a "
                    "4-bit weight cannot be trained. Leave it dense when quantising, or target it "
                    "with LoRA"
                )


def _warn_of_unknown(model: nn.Module, targets: Iterable[str]) -> None:
    """PEFT says nothing of a target that matches no module as long as another one does."""
    names = [f".{name}" for name, _ in model.named_modules()]
    unknown = [t for t in targets if not any(name.endswith(f".{t}") for name in names)]
    if unknown:
        warnings.warn(
            f"target_modules has {', '.join(map(repr, sorted(unknown)))}, which match no module. "
            f"The model's linear layers are: {', '.join(_linear_names(model))}",
            stacklevel=3,
        )


def _linear_names(model: nn.Module) -> list[str]:
    kinds = NF4Linear | nn.Linear
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return sorted({name.rpartition(".")[2] for name in names})


def _leaves_nothing_out(original: Function) -> Function:
    """What the file has for layers that are not there is dropped, by PEFT without a word."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # Those of older transformers return nothing.
        unknown = sorted(key for key in getattr(result, "unexpected_keys", ()) if ".lora_" in key)
        if unknown and has_nf4(self):
            raise ValueError(
                f"load_adapter: the file has {len(unknown)} tensors for which the model has no "
                f"layer with an adapter: {', '.join(unknown[:6])}{', …' * (len(unknown) > 6)}"
            )
        return result

    return load_adapter


def _all_or_nothing(original: Function) -> Function:
    signature = inspect.signature(original)

    def load(self_or_class: Any, *args: Any, **kwargs: Any) -> Any:
        model = self_or_class
        if not isinstance(model, nn.Module):  # `from_pretrained` is a class's
            model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module) or not has_nf4(model):
            return original(self_or_class, *args, **kwargs)
        given = signature.bind_partial(self_or_class, *args, **kwargs).arguments
        adapter_name = given.get("adapter_name") or "default"
        with unchanged_on_error(model, _tensors_of(model, adapter_name)):
            return original(self_or_class, *args, **kwargs)

    return load


def _tensors_of(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """What an adapter of this name has already: loading over it writes there."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return [tensor for name, tensor in named if adapter_name in name.split(".")]
