"""bitsandbytes' layer, as both benchmarks compare with it."""

import torch
from torch import Tensor, nn


def make_linear4bit(dense: Tensor) -> nn.Module:
    """A frozen NF4 layer with nested scales of `dense[n, k]`; quantised when it is moved."""
    import bitsandbytes as bnb  # the CUDA benchmark does without it where it is missing

    n, k = dense.shape
    layer = bnb.nn.Linear4bit(
        k,
        n,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        dense, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer
