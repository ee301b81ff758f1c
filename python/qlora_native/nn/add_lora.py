"""Putting adapters beside the layers of a model, and taking them away."""

from collections.abc import Callable, Sequence

from torch import nn

from qlora_native.nn.lora_adapter import LoRAAdapter, check_adapter_name, check_lora_arguments
from qlora_native.nn.lora_linear import LoRALinear
from qlora_native.nn.model import Layers, check_not_root, modules_with_names, replace_module
from qlora_native.nn.nf4_linear import NF4Linear
from qlora_native.nn.routing import Names, check_exist, routed_layers
from qlora_native.nn.wrapping import check_not_distributed


def add_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    adapter_name: str = "default",
    use_dora: bool = False,
) -> nn.Module:
    """Freeze `model` and put an adapter beside each target layer, in place.

    A layer becomes a LoRALinear when it gets its first adapter. Called again with another name this
    adds a second adapter, whose rank, settings and targets may differ; the first one's stay as they
    are, trainable or not. The first adapter of a model is in force; another is after
    `set_lora(model, adapter_name)`.

    Args:
        model: any module; it is also what is returned.
        r: the rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: see `LoRALinear`.
        use_rslora: see `LoRALinear`.
        target_modules: `"all-linear"` for every NF4Linear and nn.Linear but the output head, or
            names: a layer's whole name or its end after a dot (`["q_proj", "v_proj"]`).
        adapter_name: no dot in it, and no adapter of the model has it.
        use_dora: see `LoRALinear`.

    Raises:
        ValueError: a target does not exist (the message lists those that do) or is no linear layer,
            the name is taken, an argument is out of range, or the model's adapters are merged or
            PEFT's. The model is then as it was.
    """
    check_not_distributed("add_lora", model)
    check_may_change("add_lora", model)
    check_adapter_name("add_lora", adapter_name, adapter_names(model))
    layers = _targets(model, target_modules)
    for layer, names in layers.items():
        base = layer.base if isinstance(layer, LoRALinear) else layer
        check_lora_arguments(f"add_lora: {names[0]}", base, r, lora_alpha, lora_dropout)

    def wrap(base: nn.Module) -> LoRALinear:
        return LoRALinear(base, r, lora_alpha, lora_dropout, use_rslora, use_dora, adapter_name)

    def make(layer: LoRALinear) -> LoRAAdapter:
        return layer.make_adapter(r, lora_alpha, lora_dropout, use_rslora, use_dora)

    put_adapters(model, adapter_name, layers, wrap, make)
    return model


def put_adapters(
    model: nn.Module,
    adapter_name: str,
    layers: Layers,
    wrap: Callable[[nn.Module], LoRALinear],
    make: Callable[[LoRALinear], LoRAAdapter],
) -> None:
    """Put a new adapter on `layers`, and freeze all of `model` that is no adapter.

    A LoRALinear gets what `make` gives of it, another layer is replaced by what `wrap` does. If
    either raises, the model is as it was.
    """
    others = adapter_parameters(model)
    in_force = _in_force(model, adapter_name)
    required_grad = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in required_grad:
            if parameter not in others:
                parameter.requires_grad_(False)
        made = [make(layer) if isinstance(layer, LoRALinear) else wrap(layer) for layer in layers]
    except BaseException:
        for parameter, flag in required_grad:
            parameter.requires_grad_(flag)
        raise
    for (layer, names), new in zip(layers.items(), made, strict=True):
        if isinstance(new, LoRALinear):
            new.routing.change(in_force)
            replace_module(model, names, new)
        else:
            layer.adapters[adapter_name] = new


def delete_lora(model: nn.Module, adapter_name: str) -> nn.Module:
    """Take an adapter off `model`, in place; a layer left without one is its base again.

    Raises ValueError if the model has no adapter of that name (the message lists those that it
    has), or if it is in force: `set_lora` puts another, or None, in force first. The model is then
    as it was.
    """
    check_not_distributed("delete_lora", model)
    check_may_change("delete_lora", model)
    check_exist("delete_lora", [adapter_name], adapter_names(model))
    layers = modules_with_names(
        model, lambda m: isinstance(m, LoRALinear) and adapter_name in m.adapters
    )
    for layer in layers:
        layer.check_not_in_force("delete_lora", adapter_name)
    emptied = {layer: names for layer, names in layers.items() if len(layer.adapters) == 1}
    check_not_root("delete_lora", model, emptied)
    for layer, names in layers.items():
        if layer in emptied:
            replace_module(model, names, layer.base)
        else:
            layer.delete_adapter(adapter_name)
    return model


def adapter_names(model: nn.Module) -> set[str]:
    """The names of all adapters of `model`."""
    return {name for layer in routed_layers(model) for name in layer.lora_names()}


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all LoRAAdapters of `model`."""
    adapters = (module for module in model.modules() if isinstance(module, LoRAAdapter))
    return {parameter for adapter in adapters for parameter in adapter.parameters()}


def check_may_change(operation: str, model: nn.Module) -> None:
    """Raise ValueError if adapters of `model` are PEFT's, or are merged."""
    check_not_peft(operation, model)
    for layer in routed_layers(model):
        layer.check_unmerged(operation)


def check_not_peft(operation: str, model: nn.Module) -> None:
    """Raise ValueError if there are layers of PEFT in `model`, on whatever base.

    A LoRALinear beside them would save and switch only its own half of an adapter.
    """
    for name, module in model.named_modules():
        if is_layer_of_peft(module):
            raise ValueError(
                f"{operation}: {name or 'the model'} is a layer of PEFT; PEFT adds, saves and "
                "loads theirs (save_pretrained, load_adapter)"
            )


def is_layer_of_peft(module: nn.Module) -> bool:
    """Whether it is a tuner's layer. PEFT may be missing: it is known by its base class's name."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def _in_force(model: nn.Module, first: str) -> Names:
    """What a layer that gets its first adapter starts with: what is in force in all others.

    If there is no other, `first`; if they differ, the base.
    """
    layers = list(routed_layers(model))
    names = {layer.routing.names for layer in layers}
    if not layers:
        return first
    return names.pop() if len(names) == 1 else None


def _targets(model: nn.Module, target_modules: str | Sequence[str]) -> Layers:
    """The layers that `target_modules` speaks of, with all their names."""
    layers = modules_with_names(model, lambda m: _is_linear(m) or isinstance(m, LoRALinear))
    bases = {layer.base for layer in layers if isinstance(layer, LoRALinear)}
    layers = {layer: names for layer, names in layers.items() if layer not in bases}
    if isinstance(target_modules, str):
        if target_modules != "all-linear":
            raise ValueError(
                f"add_lora: target_modules is {target_modules!r}, want 'all-linear' or a list"
            )
        head = _output_head(model)
        layers = {layer: names for layer, names in layers.items() if layer is not head}
    else:
        layers = _match_targets(layers, target_modules)
    if not layers:
        raise ValueError("add_lora: the model has no linear layer to put a LoRA beside")
    check_not_root("add_lora", model, layers)
    return layers


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, NF4Linear) or type(module) is nn.Linear


def _output_head(model: nn.Module) -> nn.Module | None:
    """transformers' models name theirs; another model has none that could be known."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if callable(get_output_embeddings) else None


def _match_targets(layers: Layers, targets: Sequence[str]) -> Layers:
    matched: set[nn.Module] = set()
    for target in targets:
        found = [
            layer
            for layer, names in layers.items()
            if any(f".{name}".endswith(f".{target}") for name in names)
        ]
        if not found:
            known = sorted({n.rsplit(".", 1)[-1] for names in layers.values() for n in names})
            raise ValueError(
                f"add_lora: target_modules has {target!r}, which is no linear layer; there are: "
                + ", ".join(known)
            )
        matched.update(found)
    return {layer: names for layer, names in layers.items() if layer in matched}
