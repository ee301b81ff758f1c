"""LoRALinear: a frozen linear layer and the low-rank update that is trained beside it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import ops
from qlora_native.nn.held_merge import HeldMerge, held_forward
from qlora_native.nn.nf4_linear import NF4Linear, autocast_dtype, parameter_of


class LoRALinear(HeldMerge):
    """y = base(x) + scaling · (dropout(x) · Aᵀ) · Bᵀ, as one autograd node.

    LoRA is by Hu et al. 2021, section 4.1.

    A[r, in_features] starts Kaiming-uniform, B[out_features, r] at zero: at the start the layer is
    its base, bit for bit. Only A and B are trained: base and bias are frozen here. The factors are
    fp32; a call rounds them to the compute dtype once, sums in fp32, and their gradients come back
    in fp32. Backward keeps x and x · Aᵀ, nothing else.

    Args:
        base: an NF4Linear or an nn.Linear; it becomes the attribute `base`.
        r: the rank, from 1 to min(in_features, out_features).
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: the probability with which an element of x is dropped before A while training,
            0 <= p < 1.
        use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023).

    Raises:
        ValueError: an argument is out of its range, or base is of another type.
    """

    def __init__(
        self,
        base: NF4Linear | nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        check_lora_arguments("LoRALinear", base, r, lora_alpha, lora_dropout)
        self.base = base.requires_grad_(False)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        # fp32 whatever the default dtype, which is a 16-bit one while transformers loads a model.
        options: dict[str, Any] = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, r, **options))
        self.reset_lora_parameters()
        self.train(base.training)

    def reset_lora_parameters(self) -> None:
        """A Kaiming-uniform in ±1/sqrt(in_features), B zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def in_features(self) -> int:
        """k."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """n."""
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x[..., in_features] -> y[..., out_features], in the dtype that the base would give."""
        if self.holds_merged:
            return held_forward(self.base, x, self.held_weight)
        p = self.lora_dropout if self.training else 0.0
        # torch's generator draws the seed, so that its state, checkpointing's replay and CUDA
        # graphs all govern the mask.
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0.0 else None
        base = self._modules["base"]
        lora_a, lora_b = parameter_of(self, "lora_a"), parameter_of(self, "lora_b")
        if isinstance(base, NF4Linear):
            dtype = base.compute_dtype_for(x)
            weight, bias = base.tensors(), base.bias_in(dtype)
            x_in_dtype = x if x.dtype == dtype else x.to(dtype)
            y = ops.lora_linear(x_in_dtype, weight, bias, lora_a, lora_b, self.scaling, p, seed)
            return y if base.compute_dtype is None else y.to(x.dtype)
        dtype = autocast_dtype(x)
        bias = base.bias
        if dtype is not None:
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        elif base.weight.dtype != x.dtype:
            raise ValueError(f"LoRALinear: x is {x.dtype}, base.weight is {base.weight.dtype}")
        return ops.lora_linear(x, base.weight, bias, lora_a, lora_b, self.scaling, p, seed)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · B · A in fp32 `[out_features, in_features]`, W as it is trained beside."""
        base = self.base
        weight = base.dequantize() if isinstance(base, NF4Linear) else base.weight.float()
        a, b = self.lora_a.float(), self.lora_b.float()
        return torch.addmm(weight, b, a, alpha=self.scaling)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}"
        )


def check_lora_arguments(
    operation: str, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float
) -> None:
    """Raise ValueError unless a LoRALinear can be made of these."""
    if not isinstance(base, NF4Linear | nn.Linear):
        raise ValueError(
            f"{operation}: base is {type(base).__name__}, want an NF4Linear or an nn.Linear"
        )
    if isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward:
        raise ValueError(
            f"{operation}: base is {type(base).__name__}, whose forward is not nn.Linear's and "
            "would not be called"
        )
    largest = min(base.in_features, base.out_features)
    if not isinstance(r, int) or not 1 <= r <= largest:
        raise ValueError(
            f"{operation}: r is {r}, want an integer from 1 to {largest} for a layer "
            f"[{base.out_features}, {base.in_features}]"
        )
    if not math.isfinite(lora_alpha):
        raise ValueError(f"{operation}: lora_alpha is {lora_alpha}, want a finite number")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"{operation}: lora_dropout is {lora_dropout}, want 0 <= p < 1")
