"""merge_lora and unmerge_lora: updates into the weights, and out of them again."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from qlora_native.nn.dense import (
    check_dtype,
    check_materialised,
    dense_dtype,
    is_four_bit,
    replacement,
)
from qlora_native.nn.lora_linear import LoRALinear
from qlora_native.nn.merge_outputs import Batch, applying, compare_outputs, logits_on
from qlora_native.nn.merge_report import LayerMerge, MergeReport, check_finite, measure_layer
from qlora_native.nn.model import check_not_root, modules_with_names, replace_module
from qlora_native.nn.nf4_linear import NF4Linear
from qlora_native.nn.routing import BASE, check_names
from qlora_native.nn.wrapping import check_not_distributed

_Layers: TypeAlias = Mapping[LoRALinear, list[str]]
_Undo: TypeAlias = list[Callable[[], None]]


def merge_lora(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    names: str | Sequence[str] | None = None,
    into: Literal["dense", "nf4"] = "dense",
    reversible: bool = False,
    batch: Batch | None = None,
) -> MergeReport:
    """Put the updates of `model` into the weights that they were trained beside, in place.

    Such a weight is the dequantised one where the base is 4-bit, so that the merged model computes
    what was trained. W + ΔW is added up in fp32 and rounded once: to `dtype`, or to NF4.

    Args:
        model: any module with LoRALinear layers; or a PeftModel, whose LoRA is merged by PEFT's
            `merge_and_unload` (`dtype`, `into` and `reversible` are then as they are by default):
            go on with the report's `model`, the dense one.
        dtype: of the dense weights and their biases; None: that of most of the model's other
            weights, but a dense base keeps its own.
        names: the adapter to merge, or several, whose changes are added up; None: the one in force.
            Adapters that are not merged are gone afterwards, unless it is reversible.
        into: `"dense"` makes the whole model dense, 4-bit layers without an update too, and takes
            all marks of the quantiser off a transformers model. `"nf4"` quantises the sums again
            as their bases were (a layer on a dense base becomes dense); that costs a good part of
            the update, and a warning says how much.
        reversible: keep bases and adapters, and let each LoRALinear compute with a merged weight,
            whatever `set_lora` says, until `unmerge_lora` takes it away, with every bit as before.
            All else stays as it is. It takes the memory of the dense weights on top.
        batch: what to compare logits and perplexity on, before and after: a mapping of what the
            model is called with by name, or the one tensor that it is called with.

    Returns:
        What it cost, layer by layer; print it. Its `model` is `model`, but for a PeftModel.

    Raises:
        ValueError: the model has no LoRALinear, is itself one, or is merged already; there is no
            such adapter; a factor has a NaN or Inf; a merged weight is out of the range of `dtype`;
            a layer is offloaded; an argument is wrong. Whatever goes wrong, the model is then as it
            was; to that end the replaced layers are kept until all is done.
    """
    check_not_distributed("merge_lora", model)
    _check_arguments(dtype, into, reversible)
    if hasattr(model, "peft_config") and hasattr(model, "base_model"):
        return _merge_peft_model(model, dtype, names, into, reversible, batch)
    layers: _Layers = modules_with_names(model, lambda module: isinstance(module, LoRALinear))
    chosen = _chosen_adapters(model, layers, names)
    _check_layers(layers, chosen)
    before = None
    if batch is not None:
        with applying(chosen):
            before = logits_on(model, batch)
    notes = () if reversible else tuple(_notes_on_sharing(model, layers))
    model_dtype = dtype or dense_dtype(model)
    measured: list[LayerMerge] = []
    others: list[str] = []
    outputs = None
    with _undone_on_error() as undo:
        for layer, places in layers.items():
            own_dtype = dtype or _own_dtype(layer, model_dtype)
            if not chosen[layer] and not reversible:
                _replace(model, places, layer, layer.base, undo)
                continue
            module, weight, cost = _merged(places[0], layer, chosen[layer], own_dtype, into)
            measured.append(cost)
            if reversible:
                undo.append(layer.release_merged)
                layer.hold_merged(weight, own_dtype)
            else:
                _replace(model, places, layer, module, undo)
            del module, weight
        if into == "dense" and not reversible:
            others = _dequantize_others(model, model_dtype, undo)
        if batch is not None and before is not None:
            outputs = compare_outputs(model, batch, before, logits_on(model, batch))
        if not reversible:
            _tell_transformers(model, is_dense=into == "dense")
    report = MergeReport(
        into="NF4" if into == "nf4" else str(model_dtype).removeprefix("torch."),
        base="the weights that the updates were trained beside",
        layers=tuple(measured),
        outputs=outputs,
        dequantized=tuple(others),
        notes=notes,
        model=model,
    )
    if into == "nf4":
        _warn_of_loss(report)
    return report


def _merge_peft_model(
    model: nn.Module,
    dtype: torch.dtype | None,
    names: str | Sequence[str] | None,
    into: str,
    reversible: bool,
    batch: Batch | None,
) -> MergeReport:
    if dtype is not None or into != "dense" or reversible:
        raise ValueError(
            f"merge_lora: the model is a {type(model).__name__}, whose merge is into dense weights "
            "of the model's own dtype; cast or quantise the merged model, and for a merge that can "
            "be taken back call its merge_adapter and unmerge_adapter"
        )
    from qlora_native.hf.peft.merge_report import merge_peft_model

    return merge_peft_model(model, names, batch)


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take back `merge_lora(model, reversible=True)`: every bit is as it was.

    Returns:
        `model`.

    Raises:
        ValueError: nothing of the model is merged reversibly.
    """
    merged = [m for m in model.modules() if isinstance(m, LoRALinear) and m.holds_merged]
    if not merged:
        raise ValueError(
            "unmerge_lora: the model has no layer merged by merge_lora(model, reversible=True)"
        )
    for layer in merged:
        layer.release_merged()
    return model


# ---- before


def _check_arguments(dtype: torch.dtype | None, into: str, reversible: bool) -> None:
    check_dtype("merge_lora", dtype)
    if into not in ("dense", "nf4"):
        raise ValueError(f"merge_lora: into is {into!r}, want 'dense' or 'nf4'")
    if into == "nf4" and reversible:
        raise ValueError("merge_lora: a reversible merge holds dense weights; into is 'nf4'")


def _chosen_adapters(
    model: nn.Module, layers: _Layers, names: str | Sequence[str] | None
) -> dict[LoRALinear, tuple[str, ...]]:
    """The adapters to merge into each layer: those of `names`, or of what is in force, it has."""
    if not layers:
        raise ValueError("merge_lora: the model has no LoRALinear")
    check_not_root("merge_lora", model, layers)
    existing = {name for layer in layers for name in layer.lora_names()}
    wanted = (names,) if isinstance(names, str) else None if names is None else tuple(names)
    if wanted is not None:
        check_names("merge_lora", wanted, existing)
        if not wanted or BASE in wanted or len(set(wanted)) < len(wanted):
            raise ValueError(f"merge_lora: names is {names!r}, want different adapters' names")
    chosen = {}
    for layer in layers:
        in_force = layer.routing.names
        of_layer: tuple[str, ...]
        if wanted is not None:
            of_layer = wanted
        elif isinstance(in_force, tuple):
            raise ValueError(
                "merge_lora: set_lora has put a list of names in force, one for each element of a "
                "batch; say by names which adapter to merge"
            )
        else:
            of_layer = () if in_force is None else (in_force,)
        chosen[layer] = tuple(name for name in of_layer if name in layer.lora_names())
    if not any(chosen.values()):
        raise ValueError(
            "merge_lora: set_lora has put no adapter in force; say by names which to merge, of "
            + ", ".join(map(repr, sorted(existing)))
        )
    return chosen


def _check_layers(layers: _Layers, chosen: Mapping[LoRALinear, tuple[str, ...]]) -> None:
    for layer, (place, *_) in layers.items():
        check_materialised("merge_lora", place, layer)
        if layer.holds_merged:
            raise ValueError(f"merge_lora: {place} is merged already; unmerge_lora takes that back")
        for name in chosen[layer]:
            for part, parameter in layer.adapters[name].named_parameters():
                check_finite("merge_lora", place, f"{part} of {name!r}", parameter)


def _own_dtype(layer: LoRALinear, model_dtype: torch.dtype) -> torch.dtype:
    return model_dtype if isinstance(layer.base, NF4Linear) else layer.base.weight.dtype


def _notes_on_sharing(model: nn.Module, layers: _Layers) -> Iterator[str]:
    """A note for each dense base whose weight another module has too: they part by the merge."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer, places in layers.items():
        own = {f"{place}.base.weight" for place in places}
        others = [name for name in owners[id(layer.base.weight)] if name not in own]
        if others:
            yield (
                f"{places[0]}.weight was also {', '.join(others)}, which keeps its value: the two "
                "are no longer tied"
            )


# ---- the merge


@torch.no_grad()
def _merged(
    place: str, layer: LoRALinear, names: Sequence[str], dtype: torch.dtype, into: str
) -> tuple[nn.Module, Tensor, LayerMerge]:
    """The layer that `layer` becomes, its weight `[n, k]`, and what that costs."""
    base = layer.base
    exact = layer.merged_weight(names)
    module: nn.Module
    if isinstance(base, NF4Linear) and into == "nf4":
        check_finite("merge_lora", place, "the merged weight", exact)
        module = base.requantized(exact)
        weight = module.dequantize()
    else:
        weight = exact.to(dtype)
        check_finite("merge_lora", place, f"the merged weight in {dtype}", weight)
        module = _dense(base, weight)
    trained = base.dequantize() if isinstance(base, NF4Linear) else base.weight
    return module.train(layer.training), weight, measure_layer(place, trained, exact, weight)


def _dense(base: nn.Module, weight: Tensor) -> nn.Module:
    if isinstance(base, NF4Linear):
        return base.to_dense(weight.dtype, weight)
    linear = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        bias = base.bias.detach().to(weight.dtype, copy=True)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _replace(
    model: nn.Module, places: list[str], old: nn.Module, new: nn.Module, undo: _Undo
) -> None:
    undo.append(partial(replace_module, model, places, old))
    replace_module(model, places, replacement(old, new))


def _dequantize_others(model: nn.Module, dtype: torch.dtype, undo: _Undo) -> list[str]:
    """Replace the 4-bit layers that are left; their names."""
    layers = modules_with_names(model, is_four_bit)
    for layer, places in layers.items():
        check_materialised("merge_lora", places[0], layer)
        _replace(model, places, layer, layer.to_dense(dtype), undo)
    return [places[0] for places in layers.values()]


@contextlib.contextmanager
def _undone_on_error() -> Iterator[_Undo]:
    """Inside, every change adds what undoes it; if an error comes, all is undone."""
    undo: _Undo = []
    try:
        yield undo
    except BaseException:
        while undo:
            undo.pop()()
        raise


# ---- after


def _tell_transformers(model: nn.Module, is_dense: bool) -> None:
    """Where it is a model of transformers, its config and flags say what it is now."""
    if any(hasattr(getattr(module, "config", None), "to_dict") for module in model.modules()):
        from qlora_native.hf.dense import forget_quantization, note_untied_head

        note_untied_head(model)
        if is_dense:
            forget_quantization(model)


def _warn_of_loss(report: MergeReport) -> None:
    worst = report.worst(1)[0]
    if worst.lost_of_update is not None:
        warnings.warn(
            "merge_lora: quantising the merged weights again to NF4 has changed them by up to "
            f"{worst.lost_of_update:.2g} times the norm of the update ({worst.name}): what was "
            "trained is lost where that is near 1 or above; into='dense' keeps it",
            stacklevel=3,
        )
