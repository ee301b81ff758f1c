"""QLoRA, natively: a frozen base in 4-bit NF4, LoRA matrices beside it, and their optimiser."""

from qlora_native import _core
from qlora_native.build import build_info
from qlora_native.nf4_weight import NF4Weight, nf4_dequantize, nf4_quantize
from qlora_native.nn import (
    LoRAAdapter,
    LoRALinear,
    MergeReport,
    NF4Experts,
    NF4Linear,
    add_lora,
    count_parameters,
    delete_lora,
    merge_lora,
    print_trainable_parameters,
    quantize_model,
    set_lora,
    unmerge_lora,
)
from qlora_native.optim import PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit

__version__: str = _core.build_info()["version"]

__all__ = [
    "LoRAAdapter",
    "LoRALinear",
    "MergeReport",
    "NF4Experts",
    "NF4Linear",
    "NF4Weight",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "__version__",
    "add_lora",
    "build_info",
    "count_parameters",
    "delete_lora",
    "merge_lora",
    "nf4_dequantize",
    "nf4_quantize",
    "print_trainable_parameters",
    "quantize_model",
    "set_lora",
    "unmerge_lora",
]
