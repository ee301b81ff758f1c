"""The operations on torch tensors: checks, autograd, and their registration with torch.library.

Each operation has two doors to one implementation (see doors.py): plain eager calls go straight to
an `autograd.Function`, everything that traces or intercepts goes through `torch.ops.qlora_native`.
"""

from qlora_native.ops.codec import dequantize, dequantize_absmax, quantize
from qlora_native.ops.dora import dora_linear, row_norms_squared
from qlora_native.ops.linear import nf4_linear
from qlora_native.ops.lora import lora_linear
from qlora_native.ops.lora_groups import LoRAGroup, lora_linear_groups
from qlora_native.ops.lora_update import LoRAFactors
from qlora_native.ops.storage import NF4Tensors

__all__ = [
    "LoRAFactors",
    "LoRAGroup",
    "NF4Tensors",
    "dequantize",
    "dequantize_absmax",
    "dora_linear",
    "lora_linear",
    "lora_linear_groups",
    "nf4_linear",
    "quantize",
    "row_norms_squared",
]
