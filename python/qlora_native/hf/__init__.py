"""Exchange with Hugging Face's libraries: adapters in PEFT's format."""

try:
    from qlora_native.hf.adapter import load_lora, save_lora
except ImportError as error:
    if (error.name or "").partition(".")[0] != "safetensors":
        raise
    raise ImportError(
        "qlora_native.hf needs safetensors: pip install 'qlora_native[train]'", name=error.name
    ) from error

try:
    import peft  # noqa: F401
except ImportError:
    pass
else:
    from qlora_native.hf.peft import install

    install()

__all__ = ["load_lora", "save_lora"]
