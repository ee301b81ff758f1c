"""At home in Hugging Face's libraries: transformers' quantiser, and adapters in PEFT's format.

Importing this package registers `NF4Config` with transformers, where that is installed.
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

__all__ = ["NF4Config", "load_lora", "save_lora"]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if _has("transformers") and _has("transformers.core_model_loading"):  # which came with 5.0
    from qlora_native.hf import parameter_count
    from qlora_native.hf import quantizer as quantizer
    from qlora_native.hf.bitsandbytes import loading as _bitsandbytes_loading
    from qlora_native.hf.config import NF4Config as NF4Config

    _bitsandbytes_loading.install()
    parameter_count.install()


def __getattr__(name: str) -> Any:
    if name == "NF4Config":
        raise ImportError(
            "qlora_native.hf.NF4Config needs transformers 5 or newer: "
            "pip install 'qlora_native[train]'"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
