"""A 4-bit checkpoint of this library's made one of bitsandbytes', or the other way round."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_native.hf.bitsandbytes.config import is_bitsandbytes
from qlora_native.hf.bitsandbytes.conversions import Conversion, Form, ToBitsAndBytes, ToNF4
from qlora_native.hf.bitsandbytes.layers import Layer
from qlora_native.hf.checkpoint_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointFolder,
    copy_others,
    new_folder,
    write_json,
)
from qlora_native.hf.config import QUANT_METHOD
from qlora_native.hf.safetensors_files import SafetensorsWriter, TensorSpec

Progress = Callable[[int, int, str], None]


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: Form | None = None,
    *,
    quant_storage: torch.dtype = torch.uint8,
    progress: Progress | None = None,
) -> Form:
    """Write the 4-bit checkpoint in `source` to `destination`, in the other form.

    Nothing is quantised: both forms hold the same codes and scales, so that the way there and back
    gives equal bytes. Weights pass through memory one layer at a time, however large the files
    are. What is neither weights nor config.json (tokenizer, generation settings) is copied.

    Args:
        source: a folder with config.json and safetensors files, as `save_pretrained` writes it.
        destination: a new or empty folder; it appears when all is done, and not before.
        to: the form that is wanted; None: the one that `source` has not.
        quant_storage: of bitsandbytes' form: the dtype that the codes' bytes are stored as.
        progress: called with (layers done, layers in all, name of the layer) after each.

    Returns:
        The form that was written.

    Raises:
        FileNotFoundError: `source`, config.json or a file of weights is not there.
        FileExistsError: `destination` has something in it.
        ValueError: `source` is not a whole 4-bit checkpoint, or has the wanted form already.
        NotImplementedError: it is quantised by another method (FP4, LLM.int8()).
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}")
    if source.resolve() in destination.resolve().parents:
        raise ValueError(f"{destination} is in {source}, which would be copied into itself")
    with CheckpointFolder(source) as folder:
        conversion = _conversion_of(folder, quant_storage)
        if to not in (None, conversion.form):
            raise ValueError(f"{source} is of the form {to!r} already")
        if quant_storage != torch.uint8 and conversion.form != "bitsandbytes":
            raise ValueError(
                f"quant_storage is {quant_storage}, which only bitsandbytes' form can have"
            )
        with new_folder(destination) as filling:
            _write_weights(folder, conversion, filling, progress)
            config = copy.deepcopy(folder.config)
            _holder(config)["quantization_config"] = conversion.quantization_config()
            write_json(filling / CONFIG_FILE, config)
            copy_others(folder.path, filling)
    return conversion.form


def _conversion_of(folder: CheckpointFolder, quant_storage: torch.dtype) -> Conversion:
    stored = _holder(folder.config).get("quantization_config")
    if not isinstance(stored, Mapping):
        raise ValueError(f"{folder.path / CONFIG_FILE} has no quantization_config: not in 4 bits")
    if is_bitsandbytes(stored):
        return ToNF4(folder, stored)
    if stored.get("quant_method") != QUANT_METHOD:
        raise NotImplementedError(
            f"{folder.path / CONFIG_FILE}: quant_method is {stored.get('quant_method')!r}, want "
            f"'bitsandbytes' or {QUANT_METHOD!r}"
        )
    return ToBitsAndBytes(folder, stored, quant_storage)


def _holder(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's configuration that has its quantization_config, where one has it."""
    text = config.get("text_config")
    if config.get("quantization_config") is None and isinstance(text, dict):
        return text if text.get("quantization_config") is not None else config
    return config


def _write_weights(
    folder: CheckpointFolder, conversion: Conversion, filling: Path, progress: Progress | None
) -> None:
    """As many files as the source has: a layer is where its codes were."""
    converted = {f"{layer.name}.{part}" for layer in conversion.layers for part in layer.parts}
    layers: dict[str, list[Layer]] = {file: [] for file in folder.files}
    for layer in conversion.layers:
        layers[folder.file_of[f"{layer.name}.weight"]].append(layer)
    file_of: dict[str, str] = {}
    total_size, done = 0, 0
    for file, reader in folder.files.items():
        copied = {
            name: stored.spec for name, stored in reader.tensors.items() if name not in converted
        }
        specs: dict[str, TensorSpec] = dict(copied)
        for layer in layers[file]:
            new = {f"{layer.name}.{part}": s for part, s in conversion.specs(layer).items()}
            if clash := sorted(new.keys() & specs.keys()):
                raise ValueError(f"{folder.path}: has {clash[0]} beside the weight it is to be of")
            specs |= new
        with SafetensorsWriter(filling / file, specs, reader.metadata) as writer:
            for name in copied:
                writer.copy(name, reader)
            for layer in layers[file]:
                for part, tensor in conversion.convert(layer).items():
                    writer.write(f"{layer.name}.{part}", tensor)
                done += 1
                if progress is not None:
                    progress(done, len(conversion.layers), layer.name)
        file_of |= dict.fromkeys(specs, file)
        total_size += sum(spec.nbytes for spec in specs.values())
    if folder.index is not None:
        metadata = {**folder.index.get("metadata", {}), "total_size": total_size}
        index = {**folder.index, "metadata": metadata, "weight_map": file_of}
        write_json(filling / INDEX_FILE, index)
