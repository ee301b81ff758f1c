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

__all__ = ["NF4Config", "load_lora", "save_lora"]

if importlib.util.find_spec("transformers.core_model_loading") is not None:
    from qlora_native.hf import quantizer as quantizer
    from qlora_native.hf.config import NF4Config as NF4Config

if importlib.util.find_spec("peft") is not None:
    from qlora_native.hf.peft import install as _install_peft_layers

    _install_peft_layers()


def __getattr__(name: str) -> Any:
    if name == "NF4Config":
        raise ImportError(
            "qlora_native.hf.NF4Config needs transformers 5 or newer: "
            "pip install 'qlora_native[train]'"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
