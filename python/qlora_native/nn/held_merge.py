"""A merge that can be undone to the bit: the merged weight is held beside the untouched base."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native.nn.nf4_linear import NF4Linear, autocast_dtype


class HeldMerge(nn.Module):
    """The part of a LoRA layer that holds a merged weight.

    The base is not written to: its 4-bit codes, or its dense weight, stay where they are, and the
    merged weight is a buffer that moves with the layer, follows its casts and is in no state dict.
    Letting go of it gives back the layer with every bit as it was. It costs the memory of a dense
    weight for as long as it is held.
    """

    def hold_merged(self, weight: Tensor, dtype: torch.dtype) -> None:
        """From now on the layer is merged: `weight` `[n, k]`, rounded to `dtype`, is all of it."""
        self.register_buffer("held_weight", weight.detach().to(dtype), persistent=False)

    def release_merged(self) -> None:
        """From now on the layer is its base and its update again."""
        if self.holds_merged:
            del self.held_weight

    @property
    def holds_merged(self) -> bool:
        """Whether a merged weight stands in the place of base and update."""
        return "held_weight" in self._buffers


def held_forward(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """y[..., n] = x · weightᵀ + bias, in the dtypes in which `base` would compute."""
    compute_dtype = base.compute_dtype if isinstance(base, NF4Linear) else None
    dtype = compute_dtype or autocast_dtype(x) or x.dtype
    bias = base.bias
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y if compute_dtype is None else y.to(x.dtype)
