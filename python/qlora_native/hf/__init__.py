"""Exchange with Hugging Face's libraries: adapters in PEFT's format."""

try:
    from qlora_native.hf.adapter import load_lora, save_lora
except ImportError as error:
    if (error.name or "").partition(".")[0] != "safetensors":
        raise
    raise ImportError(
        "qlora_native.hf needs safetensors: pip install 'qlora_native[train]'", name=error.name
    ) from error
from qlora_native.hf.training import prepare_model

__all__ = ["load_lora", "prepare_model", "save_lora"]
