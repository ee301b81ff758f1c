"""Turning a model of linear layers into a QLoRA model, and back."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import nn

from qlora_native.nn.lora_linear import LoRALinear, check_lora_arguments
from qlora_native.nn.nf4_linear import NF4Linear

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

    The dense weight of a layer is dropped before the next is quantised, so memory peaks at the
    model plus one layer.

    Args:
        model: any module; it is also what is returned.
        skip: names of what stays dense: a layer's whole name, or a part of it between dots
            (`"lm_head"`, `"visual"`).
        block_size: weights that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        compute_dtype: of the layers, see `NF4Linear`.
        progress: called with (layers done, layers in all, name of the layer) after each.

    Raises:
        ValueError: there is nothing to quantise, a name in `skip` matches no module, a layer's
            weight is shared with another module (quantising it would untie them), or a weight has a
            NaN or Inf (the layers before it are quantised).
    """
    if isinstance(skip, str):
        raise ValueError(f"quantize_model: skip is {skip!r}, want a list of names")
    names = [name for name, _ in model.named_modules()]
    for entry in skip:
        if entry != "lm_head" and not any(name_matches(name, entry) for name in names):
            raise ValueError(f"quantize_model: skip has {entry!r}, which matches no module")
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name_matches(name, entry) for entry in skip)
    ]
    subclasses = [name for name, module in targets if type(module) is not nn.Linear]
    if subclasses:
        warnings.warn(
            "quantize_model leaves subclasses of nn.Linear dense: " + ", ".join(subclasses),
            stacklevel=2,
        )
    targets = [(name, module) for name, module in targets if type(module) is nn.Linear]
    if not targets:
        raise ValueError("quantize_model: the model has no nn.Linear to quantise (after skip)")
    _check_not_root("quantize_model", model, [module for _, module in targets])
    _check_untied(model, targets)
    _warn_of_other_weights(model, skip)

    for done, name in enumerate([name for name, _ in targets], start=1):
        linear = targets.pop(0)[1]  # the list must not keep the dense weight alive
        try:
            quantized = NF4Linear.from_linear(
                linear,
                block_size=block_size,
                double_quant=double_quant,
                compute_dtype=compute_dtype,
            )
        except ValueError as error:
            raise ValueError(f"quantize_model: {name}: {error}") from error
        replace_module(model, [name], quantized)
        if progress is not None:
            progress(done, done + len(targets), name)
    return model


def add_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
) -> nn.Module:
    """Freeze `model` and put a LoRALinear around each target layer, in place.

    Args:
        model: any module; it is also what is returned.
        r: the rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: see `LoRALinear`.
        use_rslora: see `LoRALinear`.
        target_modules: `"all-linear"` for every NF4Linear and nn.Linear but the output head, or
            names: a layer's whole name or its end after a dot (`["q_proj", "v_proj"]`).

    Raises:
        ValueError: a target does not exist (the message lists those that do) or is no linear layer,
            a layer has a LoRA already, or an argument is out of range. The model is then as it was.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("add_lora: the model has LoRA layers already; merge_lora removes them")
    layers = modules_with_names(model, _is_linear)
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
    _check_not_root("add_lora", model, layers)
    for layer, names in layers.items():
        check_lora_arguments(f"add_lora: {names[0]}", layer, r, lora_alpha, lora_dropout)

    model.requires_grad_(False)
    for layer, names in layers.items():
        replace_module(model, names, LoRALinear(layer, r, lora_alpha, lora_dropout, use_rslora))
    tell_quantizer(model)
    return model


def tell_quantizer(model: nn.Module) -> None:
    """Tell the quantiser of a transformers model, where it asks, that the model has a LoRA now."""
    on_lora_added = getattr(getattr(model, "hf_quantizer", None), "on_lora_added", None)
    if on_lora_added is not None:
        on_lora_added()


def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every LoRALinear by a dense `nn.Linear` with W + scaling · B · A, in place.

    W is what was trained against: the dequantised weight where the base is NF4. The sum is done in
    fp32 and rounded once to `dtype`. None: a dense base's own dtype; for an NF4 base that of its
    bias or else of the model's first parameter that is neither 4-bit nor a LoRA factor.

    Raises:
        ValueError: the model has no LoRALinear.
    """
    layers = modules_with_names(model, lambda module: isinstance(module, LoRALinear))
    if not layers:
        raise ValueError("merge_lora: the model has no LoRALinear")
    _check_not_root("merge_lora", model, layers)
    model_dtype = _model_dtype(model)
    for layer, names in layers.items():
        replace_module(model, names, _merged(layer, dtype or _base_dtype(layer, model_dtype)))
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; an NF4 weight counts its n · k weights, not its bytes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, NF4Linear):
            stored = sum(p.numel() for p in module.parameters() if p.dtype == torch.uint8)
            total += module.weight_shape.numel() - stored
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, and their share of all."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def name_matches(name: str, entry: str) -> bool:
    """Whether `entry` is `name` or a run of whole components of it."""
    return f".{entry}." in f".{name}."


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, NF4Linear) or type(module) is nn.Linear


def _output_head(model: nn.Module) -> nn.Module | None:
    """transformers' models name theirs; another model has none that could be known."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if callable(get_output_embeddings) else None


_Layers: TypeAlias = dict[nn.Module, list[str]]


def modules_with_names(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> _Layers:
    """Every such module with all the names that it has in `model`: it may be shared."""
    layers: _Layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_wanted(module):
            layers.setdefault(module, []).append(name)
    return layers


def _match_targets(layers: _Layers, targets: Iterable[str]) -> _Layers:
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


def _check_untied(model: nn.Module, targets: Sequence[tuple[str, nn.Linear]]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, linear in targets:
        shared = [owner for owner in owners[id(linear.weight)] if owner != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"quantize_model: {name}.weight is also {', '.join(shared)}; quantising it would "
                f"untie them: add {name!r} to skip"
            )


def _warn_of_other_weights(model: nn.Module, skip: Sequence[str]) -> None:
    """Name the matrices that are no linear layer's: the experts of a mixture, for one."""
    left = [
        (f"{name}.{parameter_name}".lstrip("."), parameter)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding | NF4Linear)
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


def _check_not_root(operation: str, model: nn.Module, layers: Iterable[nn.Module]) -> None:
    if any(layer is model for layer in layers):
        raise ValueError(
            f"{operation}: the model is itself the layer to replace; wrap it in an nn.Sequential"
        )


def replace_module(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Put `new` in all the places of `model` that have these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def _model_dtype(model: nn.Module) -> torch.dtype:
    for name, parameter in model.named_parameters():
        is_factor = name.rpartition(".")[2] in ("lora_a", "lora_b")
        if parameter.is_floating_point() and not is_factor:
            return parameter.dtype
    return torch.float32


def _base_dtype(layer: LoRALinear, model_dtype: torch.dtype) -> torch.dtype:
    base = layer.base
    if not isinstance(base, NF4Linear):
        return base.weight.dtype
    return model_dtype if base.bias is None else base.bias.dtype


@torch.no_grad()
def _merged(layer: LoRALinear, dtype: torch.dtype) -> nn.Linear:
    base = layer.base
    is_nf4 = isinstance(base, NF4Linear)
    weight = base.dequantize(torch.float32) if is_nf4 else base.weight.float()
    weight = torch.addmm(weight, layer.lora_b.float(), layer.lora_a.float(), alpha=layer.scaling)
    merged = nn.Linear(
        base.in_features, base.out_features, bias=base.bias is not None, device="meta"
    )
    merged.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if base.bias is not None:
        merged.bias = nn.Parameter(base.bias.to(dtype, copy=True), requires_grad=False)
    return merged.train(layer.training)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRALinear with its name."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)
    )
