"""Which tensors of a checkpoint the layers of an adapter are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_native.hf.checkpoint_folder import CONFIG_FILE, CheckpointFolder
from qlora_native.hf.safetensors_files import TensorSpec
from qlora_native.nn import LoRAAdapter

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Target(NamedTuple):
    """A weight that updates are added to."""

    layer: str  # its name, as the adapter has it
    tensor: str  # the weight's name in the checkpoint
    spec: TensorSpec
    is_transposed: bool  # [in_features, out_features], as GPT-2's layers have it
    adapters: Sequence[LoRAAdapter]


def find_targets(
    folder: CheckpointFolder, adapters: Mapping[str, Sequence[LoRAAdapter]]
) -> dict[str, Target]:
    """The targets by the names of their tensors.

    A tensor is `<layer>.weight`, with or without the prefix that a model with a head has before the
    names of its body. Whether it is transposed is known from the model's class, which is built
    without weights; a model of a class that transformers has not is taken to have nn.Linear layers.

    Raises ValueError, which lists every layer that has no tensor, or one that does not fit.
    """
    model = _model_of(folder)
    targets, problems = {}, []
    for layer, of_layer in adapters.items():
        try:
            target = _target_of(folder, model, layer, of_layer)
        except _Problem as problem:
            problems.append(f"{layer}: {problem}")
        else:
            targets[target.tensor] = target
    if problems:
        raise ValueError(
            f"merge_into_checkpoint: the adapter does not fit {folder.path}:\n  "
            + "\n  ".join(problems)
        )
    return targets


class _Problem(Exception):
    """Why a layer cannot be merged."""


def _target_of(
    folder: CheckpointFolder, model: Any, layer: str, adapters: Sequence[LoRAAdapter]
) -> Target:
    module = None
    if model is not None:
        module = dict(model.named_modules()).get(layer)
        if module is None:
            raise _Problem(f"a {type(model).__name__} has no such layer")
        if not isinstance(module, nn.Linear | Conv1D):
            raise _Problem(f"is a {type(module).__name__}, want a linear layer")
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        if other := {**tied, **{v: k for k, v in tied.items()}}.get(f"{layer}.weight"):
            raise _Problem(f"its weight is tied to {other}, which an update would change as well")
    tensor = _tensor_of(folder, getattr(model, "base_model_prefix", ""), f"{layer}.weight")
    spec = folder.spec(tensor)
    if spec.dtype not in FLOATS:
        raise _Problem(f"{tensor} is {spec.dtype}, want F32, BF16 or F16")
    is_transposed = isinstance(module, Conv1D)
    for adapter in adapters:
        n, k = adapter.lora_b.shape[0], adapter.lora_a.shape[1]
        wanted = (k, n) if is_transposed else (n, k)
        if spec.shape != wanted:
            raise _Problem(
                f"{tensor} is {list(spec.shape)}; the adapter, lora_A {list(adapter.lora_a.shape)} "
                f"and lora_B {list(adapter.lora_b.shape)}, is for {list(wanted)}"
            )
    return Target(layer, tensor, spec, is_transposed, adapters)


def _tensor_of(folder: CheckpointFolder, prefix: str, name: str) -> str:
    dotted = f"{prefix}." if prefix else ""
    for candidate in (name, name.removeprefix(dotted), dotted + name):
        if candidate in folder.file_of:
            return candidate
    raise _Problem(f"the checkpoint has no {name}")


def _model_of(folder: CheckpointFolder) -> Any:
    """The model of the folder on the meta device; None if transformers has no such class."""
    names = folder.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if architecture is None or "auto_map" in folder.config:
        return None
    try:
        with torch.device("meta"):
            return architecture(architecture.config_class.from_pretrained(folder.path))
    except Exception as error:  # a config can be wrong in ways that have errors of their own
        raise ValueError(
            f"merge_into_checkpoint: no {name} can be built from {folder.path / CONFIG_FILE}: "
            f"{error}"
        ) from error
