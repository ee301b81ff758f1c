"""The two files of an adapter in PEFT's format, as a whole: read, checked for form, and written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_config(directory: Path) -> dict[str, Any]:
    """The object in `adapter_config.json`; ValueError where it holds none."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"load_lora: there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_lora: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"load_lora: {path} holds a {type(config).__name__}, want an object")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`; ValueError where it cannot be read."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"load_lora: there is no {path}")
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"load_lora: {path} cannot be read: {error}") from error


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write both files; an older adapter is there until the new one is whole."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    new_weights, new_config = (
        directory / f".{name}.{os.getpid()}.new" for name in (WEIGHTS_FILE, CONFIG_FILE)
    )
    try:
        save_file(dict(tensors), new_weights, metadata={"format": "pt"})
        new_config.write_text(text, encoding="utf-8")
        new_weights.replace(directory / WEIGHTS_FILE)
        new_config.replace(directory / CONFIG_FILE)
    finally:
        new_weights.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)
