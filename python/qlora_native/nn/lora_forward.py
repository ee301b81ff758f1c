"""One call of a LoRA layer: which dtype it computes in, and which operation does it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_native import ops
from qlora_native.nn.nf4_linear import NF4Linear, autocast_dtype
from qlora_native.ops.base_product import BaseWeight
from qlora_native.ops.dora import dora_linear
from qlora_native.ops.lora import LoRAFactors
from qlora_native.ops.lora_groups import LoRAGroup, lora_linear_groups


def lora_forward(base: NF4Linear | nn.Linear, x: Tensor, groups: Sequence[LoRAGroup]) -> Tensor:
    """y = base(x), and to the rows of each group its update, as one autograd node.

    Args:
        base: the frozen layer. It says what is computed in: its compute_dtype, else autocast's
            dtype, else x's.
        x: `[..., in_features]`.
        groups: rows of x.reshape(-1, in_features); none: the base alone.

    Returns:
        `[..., out_features]`, in the dtype that the base would give.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if not groups:
        return base(x)
    inner, weight, bias = _operands(base, x)
    if len(groups) == 1 and (groups[0].begin, groups[0].end) == (0, math.prod(x.shape[:-1])):
        lora_a, lora_b, seed, scaling, p = groups[0].factors
        y = ops.lora_linear(inner, weight, bias, lora_a, lora_b, scaling, p, seed)
    else:
        y = lora_linear_groups(inner, weight, bias, groups)
    return _as_from_base(base, x, y)


def dora_forward(
    base: NF4Linear | nn.Linear,
    x: Tensor,
    factors: LoRAFactors,
    magnitude: Tensor,
    weight_norm_squared: Tensor,
) -> Tensor:
    """`lora_forward` of one group over all rows, normalised and scaled as DoRA does it."""
    inner, weight, bias = _operands(base, x)
    lora_a, lora_b, seed, scaling, p = factors
    y = dora_linear(
        inner, weight, bias, lora_a, lora_b, magnitude, scaling, weight_norm_squared, p, seed
    )
    return _as_from_base(base, x, y)


def draw_seed(x: Tensor, p: float) -> Tensor | None:
    """A seed for a dropout mask of x; None where p is 0.

    torch's generator draws it, so that its state, checkpointing's replay and CUDA graphs all govern
    the mask.
    """
    return torch.randint(2**63 - 1, (1,), device=x.device) if p > 0.0 else None


def _operands(base: NF4Linear | nn.Linear, x: Tensor) -> tuple[Tensor, BaseWeight, Tensor | None]:
    """x, weight and bias as the operations take them: x and bias in the dtype of the product."""
    if isinstance(base, NF4Linear):
        dtype = base.compute_dtype_for(x)
        return x if x.dtype == dtype else x.to(dtype), base.tensors(), base.bias_in(dtype)
    autocast = autocast_dtype(x)
    bias = base.bias
    if autocast is not None:
        return x.to(autocast), base.weight, None if bias is None else bias.to(autocast)
    if base.weight.dtype != x.dtype:
        raise ValueError(f"LoRALinear: x is {x.dtype}, base.weight is {base.weight.dtype}")
    return x, base.weight, bias


def _as_from_base(base: NF4Linear | nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Y in the dtype that the base would give: with a compute_dtype that of x."""
    return y.to(x.dtype) if isinstance(base, NF4Linear) and base.compute_dtype is not None else y
