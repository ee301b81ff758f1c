"""At home in Hugging Face's libraries: transformers' quantiser, and adapters in PEFT's format.

Importing this package registers `NF4Config` with transformers and installs the layers of PEFT,
where these are installed.
"""

import importlib.util
from typing import Any

try:
    from qlora_native.hf.adapter import load_lora, save_lora
except ImportError as error:
    if (error.name or "").partition(".")[0] != "safetensors":
        raise
    raise ImportError(
        "qlora_native.hf needs safetensors: pip install 'qlora_native[train]'", name=error.name
    ) from error
from qlora_native.hf.training import prepare_model

__all__ = ["NF4Config", "load_lora", "merge_into_checkpoint", "prepare_model", "save_lora"]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if _has("transformers") and _has("transformers.core_model_loading"):  # which came with 5.0
    from qlora_native.hf import parameter_count
    from qlora_native.hf import quantizer as quantizer
    from qlora_native.hf.bitsandbytes import loading as _bitsandbytes_loading
    from qlora_native.hf.config import NF4Config as NF4Config
    from qlora_native.hf.merge_checkpoint import merge_into_checkpoint as merge_into_checkpoint

    _bitsandbytes_loading.install()
    parameter_count.install()

if _has("transformers") and _has("peft"):  # which cannot be imported without it
    try:
        from qlora_native.hf.peft import install as _install_peft_layers
    except ImportError as error:
        raise ImportError(
            f"qlora_native.hf needs peft 0.21 or newer, and what is installed is another: {error}",
            name=error.name,
        ) from error
    _install_peft_layers()


def __getattr__(name: str) -> Any:
    if name in ("NF4Config", "merge_into_checkpoint"):
        raise ImportError(
            f"qlora_native.hf.{name} needs transformers 5 or newer: "
            "pip install 'qlora_native[train]'",
            name="transformers",
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
