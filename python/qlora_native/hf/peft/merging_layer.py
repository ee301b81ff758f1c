"""The merges of an NF4LoraLinear: into a dense weight that is held beside the 4-bit one."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qlora_native.nn.held_merge import HeldMerge
from qlora_native.ops.dora import row_gains


class MergingLayer(HeldMerge):
    """What PEFT calls to merge a LoRA layer; the part of NF4LoraLinear that does it.

    Merging dequantises the base and adds to that: nothing is quantised again. The dense weight
    lives beside the NF4 one until `unmerge`, which therefore restores the exact bits.
    """

    base_layer: Any
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    lora_variant: dict[str, Any]
    scaling: dict[str, Any]
    merged_adapters: list[str]
    merge_dtype: torch.dtype

    @torch.no_grad()
    def merged_weight(self, names: str | Sequence[str]) -> Tensor:
        """The weight of base and adapters together, fp32 `[out_features, in_features]`.

        W + scaling · B · A for each adapter, one after another; one that is DoRA then scales the
        rows of the sum by magnitude / ‖W + scaling · B · A‖, where W is the base's alone. Names
        that this layer has not change nothing.
        """
        base = self.base_layer.dequantize(torch.float32)
        weight = base.clone()
        for name in [names] if isinstance(names, str) else names:
            if name not in self.lora_A:
                continue
            update = self.weight_update(name)
            weight += update
            if name in self.lora_variant:
                magnitude = self.lora_magnitude_vector[name].weight
                weight *= row_gains(magnitude, base + update)[:, None]
        return weight

    def weight_update(self, name: str) -> Tensor:
        """Scaling · B · A of an adapter, fp32 `[out_features, in_features]`."""
        lora_a, lora_b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
        return lora_b @ lora_a * self.scaling[name]

    def bias_update(self, name: str) -> Tensor | None:
        """What an adapter with lora_bias adds to each row."""
        bias = self.lora_B[name].bias
        return None if bias is None else bias * self.scaling[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute with a dense weight that adapters are merged into, until `unmerge`.

        Args:
            safe_merge: raise ValueError, and change nothing, where the result is not finite in the
                dtype that it is held in.
            adapter_names: which; None: the active ones. Those that are merged already stay so.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        merged = [*self.merged_adapters, *names]
        weight = self.merged_weight(merged).to(self.merge_dtype)
        if safe_merge:
            parts = [weight, *(self.bias_update(name) for name in merged)]
            if not all(part is None or torch.isfinite(part).all() for part in parts):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapters {merged} seem to be broken"
                )
        self.release_merged()
        self.hold_merged(weight, self.merge_dtype)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Compute with the NF4 base and the adapters again; the base was never touched."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.release_merged()
        self.merged_adapters = []

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What takes this layer's place: the base, or a dense layer where adapters are merged."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.base_layer
        if not self.merged_adapters:
            return base
        dense = base.to_dense(self.merge_dtype, self.held_weight)
        for name in self.merged_adapters:
            if (bias := self.bias_update(name)) is None:
                continue
            if dense.bias is None:
                raise RuntimeError(
                    f"adapter {name!r} has lora_bias=True and the base layer has no bias to merge "
                    "that into"
                )
            dense.bias += bias.to(dense.bias.dtype)
        return dense
