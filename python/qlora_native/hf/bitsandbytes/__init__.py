"""4-bit checkpoints in bitsandbytes' format, which this package reads and writes by itself."""

from qlora_native.hf.bitsandbytes.convert import convert_checkpoint

__all__ = ["convert_checkpoint"]
