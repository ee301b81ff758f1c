"""Layers on a 4-bit base, and the functions that put them into a model."""

from qlora_native.nn.add_lora import add_lora, delete_lora
from qlora_native.nn.lora_adapter import LoRAAdapter
from qlora_native.nn.lora_linear import LoRALinear
from qlora_native.nn.merge import merge_lora, unmerge_lora
from qlora_native.nn.merge_report import MergeReport
from qlora_native.nn.model import (
    count_parameters,
    print_trainable_parameters,
    quantize_model,
)
from qlora_native.nn.nf4_experts import NF4Experts
from qlora_native.nn.nf4_linear import NF4Linear
from qlora_native.nn.routing import set_lora

__all__ = [
    "LoRAAdapter",
    "LoRALinear",
    "MergeReport",
    "NF4Experts",
    "NF4Linear",
    "add_lora",
    "count_parameters",
    "delete_lora",
    "merge_lora",
    "print_trainable_parameters",
    "quantize_model",
    "set_lora",
    "unmerge_lora",
]
