"""An adapter of a folder, or of a model, without the layers that it belongs to."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from qlora_native.hf.adapter import layers_of_file, save_lora
from qlora_native.hf.adapter_config import AdapterConfig, AdapterSettings
from qlora_native.hf.adapter_files import read_config, read_tensors
from qlora_native.nn import LoRAAdapter
from qlora_native.nn.merge_report import check_finite

Source: TypeAlias = str | Path | nn.Module


def read_adapters(sources: Source | Sequence[Source]) -> dict[str, list[LoRAAdapter]]:
    """What several adapters have for each layer, by its name.

    Args:
        sources: folders in PEFT's format, or models (this library's with one adapter, or PEFT's
            with one that is active).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter cannot be read or is neither LoRA nor DoRA, its factors do not fit
            each other (all that is wrong is listed), or one has a NaN or Inf.
    """
    each = [sources] if isinstance(sources, str | Path | nn.Module) else list(sources)
    if not each:
        raise ValueError("merge_into_checkpoint: there is no adapter, want at least one")
    adapters: dict[str, list[LoRAAdapter]] = {}
    for source in each:
        with _folder_of(source) as folder:
            for layer, adapter in _read(folder).items():
                adapters.setdefault(layer, []).append(adapter)
    return adapters


@contextlib.contextmanager
def _folder_of(source: Source) -> Iterator[Path]:
    if not isinstance(source, nn.Module):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as name:
        peft_names = getattr(source, "active_adapters", None)
        if not hasattr(source, "peft_config") or peft_names is None:
            save_lora(source, name)
            yield Path(name)
            return
        if len(peft_names) != 1:
            raise ValueError(
                f"merge_into_checkpoint: the model's active adapters are {peft_names}, want one; "
                "save them to folders and give those"
            )
        model: Any = source
        model.save_pretrained(name, selected_adapters=peft_names)
        is_default = peft_names[0] == "default"
        yield Path(name) if is_default else Path(name, peft_names[0])


def _read(folder: Path) -> dict[str, LoRAAdapter]:
    try:
        config = read_config(folder)
        # It says how the base's weight lies, not the factors; the base is asked itself.
        config["fan_in_fan_out"] = False
        layers, problems = layers_of_file(read_tensors(folder), AdapterConfig(config, folder))
    except (FileNotFoundError, ValueError) as error:
        message = str(error).removeprefix("load_lora: ")
        raise type(error)(f"merge_into_checkpoint: {message}") from error
    adapters = {}
    for name, (tensors, settings) in layers.items():
        if problem := _misfit(tensors, settings.r):
            problems.append(f"{name}: {problem}")
        else:
            adapters[name] = _adapter(tensors, settings)
    if problems:
        raise ValueError(
            f"merge_into_checkpoint: {folder} is no whole adapter:\n  " + "\n  ".join(problems)
        )
    for name, adapter in adapters.items():
        for part, parameter in adapter.named_parameters():
            check_finite("merge_into_checkpoint", name, part, parameter)
    return adapters


def _misfit(tensors: dict[str, torch.Tensor], r: int) -> str | None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    a, b = shapes["lora_a"], shapes["lora_b"]
    fits = len(a) == len(b) == 2 and r == a[0] == b[1] and r > 0
    if fits and shapes.get("magnitude", b[:1]) == b[:1]:
        return None
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return f"{listed} do not fit each other and r={r}"


def _adapter(tensors: dict[str, torch.Tensor], settings: AdapterSettings) -> LoRAAdapter:
    n, k = tensors["lora_b"].shape[0], tensors["lora_a"].shape[1]
    r, lora_alpha, lora_dropout, use_rslora, use_dora = settings
    norms = torch.zeros(n) if use_dora else None
    adapter = LoRAAdapter(k, n, r, lora_alpha, lora_dropout, use_rslora, norms)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(tensors[name])
    return adapter.requires_grad_(False)
