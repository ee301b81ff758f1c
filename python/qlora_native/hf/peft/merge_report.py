"""`merge_lora` of a PeftModel: PEFT's merge_and_unload, and what it cost."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from qlora_native.hf.peft.lora_layer import NF4LoraLinear
from qlora_native.hf.peft.rollback import unchanged_on_error
from qlora_native.nn.dense import dense_dtype
from qlora_native.nn.merge_outputs import Batch, compare_outputs, logits_on
from qlora_native.nn.merge_report import LayerMerge, MergeReport, check_finite, measure_layer


def merge_peft_model(
    model: PeftModel, names: str | Sequence[str] | None, batch: Batch | None
) -> MergeReport:
    """Merge adapters by PEFT's `merge_and_unload`; the dense model is the report's `model`.

    Args:
        model: a PeftModel whose adapters are LoRA; it is of no use afterwards, as after
            merge_and_unload.
        names: the adapters to merge; None: the active ones.
        batch: see `merge_lora`.

    Raises:
        ValueError: see `merge_lora`; the model is then as it was.
    """
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(f"merge_lora: a {type(model.base_model).__name__} of PEFT has no merge")
    chosen = [names] if isinstance(names, str) else list(names or model.active_adapters)
    if unknown := sorted(set(chosen) - set(model.peft_config)):
        raise ValueError(
            f"merge_lora: there is no adapter {', '.join(map(repr, unknown))}; there are: "
            + ", ".join(map(repr, sorted(model.peft_config)))
        )
    layers = dict(_layers(model.base_model.model))
    if names is None:
        for layer in layers.values():
            if isinstance(layer, NF4LoraLinear):
                layer.check_active_in_force("merge_lora")
    for place, layer in layers.items():
        _check(place, layer, chosen)
    dtype = dense_dtype(model)
    with unchanged_on_error(model):
        before = None
        if batch is not None:
            model.base_model.set_adapter(chosen)
            before = logits_on(model, batch)
        measured: dict[str, LayerMerge | None] = {}
        pending: dict[str, tuple[Tensor, Tensor]] = {}  # W and W + ΔW of layers that PEFT merges
        for place, layer in layers.items():
            if isinstance(layer, NF4LoraLinear):
                measured[place] = _measure_nf4(place, layer, chosen, dtype)
            elif sums := _dense_sums(layer, chosen):
                measured[place], pending[place] = None, sums
        notes = [note for place in pending if (note := _note_on_tie(model, place, layers[place]))]
        with _dense_weights_restored_on_error(layers, pending):
            merged: nn.Module = model.base_model.merge_and_unload(adapter_names=chosen)
            for place, (base, exact) in pending.items():
                weight = merged.get_submodule(place).weight
                measured[place] = measure_layer(place, base, exact, weight)
            outputs = None
            if batch is not None and before is not None:
                outputs = compare_outputs(merged, batch, before, logits_on(merged, batch))
    if left_out := [place for place in layers if place not in measured]:
        notes.append(f"merged by PEFT and not measured: {', '.join(left_out)}")
    return MergeReport(
        into=str(dtype).removeprefix("torch."),
        base="the weights that the updates were trained beside",
        layers=tuple(layer for layer in measured.values() if layer is not None),
        outputs=outputs,
        notes=tuple(notes),
        model=merged,
    )


@contextlib.contextmanager
def _dense_weights_restored_on_error(
    layers: Mapping[str, Any], pending: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """PEFT adds to dense weights where they lie; if an error comes, they are as they were."""
    try:
        yield
    except BaseException:
        for place, (weight, _) in pending.items():
            layers[place].get_base_layer().weight.data.copy_(weight)
        raise


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer))


def _check(place: str, layer: Any, names: Sequence[str]) -> None:
    if layer.merged:
        raise ValueError(f"merge_lora: {place} is merged already; unmerge_adapter takes that back")
    for parameter_name, parameter in layer.named_parameters():
        if set(parameter_name.split(".")) & set(names) and parameter_name.startswith("lora_"):
            check_finite("merge_lora", place, parameter_name, parameter)


def _note_on_tie(model: nn.Module, place: str, layer: Any) -> str | None:
    """What a merge by PEFT, which adds to the weight where it lies, does to a tied one."""
    base = layer.get_base_layer()
    inside = set(base.parameters())
    others = [
        name
        for name, module in model.base_model.model.named_modules()
        if module is not base and inside & set(module.parameters(recurse=False))
    ]
    if not others:
        return None
    return f"{place} is tied to {', '.join(others)}: PEFT merges the update into both"


@torch.no_grad()
def _measure_nf4(
    place: str, layer: NF4LoraLinear, names: Sequence[str], dtype: torch.dtype
) -> LayerMerge:
    exact = layer.merged_weight(names)
    merged = exact.to(dtype)
    check_finite("merge_lora", place, f"the merged weight in {dtype}", merged)
    return measure_layer(place, layer.base_layer.dequantize(), exact, merged)


@torch.no_grad()
def _dense_sums(layer: Any, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
    """W and W + ΔW of PEFT's plain LoRA on an nn.Linear; None of its other layers."""
    base = layer.get_base_layer()
    if not isinstance(layer, Linear) or type(base) is not nn.Linear or layer.lora_variant:
        return None
    weight = base.weight.detach().clone()
    exact = weight.float()
    for name in names:
        if name in layer.lora_A:
            exact = exact + layer.get_delta_weight(name).float()
    return weight, exact
