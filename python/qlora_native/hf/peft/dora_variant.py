"""DoRA on an NF4 base, as PEFT knows it: a variant of its LoRA layer."""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn


class NF4Dora(LoraVariant):
    """DoRA on an NF4 base: what PEFT asks when it adds such an adapter. The layer computes it."""

    @staticmethod
    @torch.no_grad()
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Let the magnitude be ‖W + scaling · B · A‖ of every row."""
        holder = DoraLinearLayer(fan_in_fan_out=False)
        lora_b = module.lora_B[adapter_name].weight
        if lora_b.is_meta:  # low_cpu_mem_usage: it will be loaded
            norms = torch.empty(module.out_features, device="meta")
        else:
            weight = module.base_layer.dequantize(torch.float32)
            weight += module.weight_update(adapter_name)
            norms = torch.linalg.vector_norm(weight, dim=1)
        holder.weight = nn.Parameter(norms)
        module.lora_magnitude_vector[adapter_name] = holder

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Refuse PEFT's own forward, which would take the codes for a weight."""
        raise NotImplementedError(
            "an NF4LoraLinear computes DoRA itself; PEFT's forward would take codes for weights"
        )
