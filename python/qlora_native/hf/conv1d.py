"""NF4Conv1D: GPT-2's linear layer, which transformers stores transposed, on a 4-bit weight."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_native.nn import NF4Linear


class NF4Conv1D(NF4Linear):
    """An NF4Linear that stands for a Conv1D, whose dense weight is `[in_features, out_features]`.

    What is quantised is the transpose: blocks lie along in_features, as in every other layer.
    """

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `NF4Linear.quantize`, of a weight `[in_features, out_features]`."""
        self._check_dense_shape(weight, self.weight_shape[::-1])
        return super().quantize(weight.T.contiguous())

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype, weight: Tensor | None = None) -> nn.Module:
        """As `NF4Linear.to_dense` (`weight` is `[out_features, in_features]`): a Conv1D."""
        if weight is None:
            weight = self.dequantize(dtype)
        self._check_dense_shape(weight, self.weight_shape)
        with torch.device("meta"):
            dense = Conv1D(self.out_features, self.in_features)
        return self._fill_dense(dense, weight.to(dtype).T.contiguous(), dtype)
