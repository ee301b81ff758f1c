"""LoRAAdapter: what is trained beside a layer, under one name."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.nn.nf4_linear import NF4Linear, parameter_of
from qlora_native.nn.routing import BASE
from qlora_native.ops.dora import row_gains
from qlora_native.ops.lora import LoRAFactors


class LoRAAdapter(nn.Module):
    """A[r, in_features], B[out_features, r] and, for DoRA, magnitude[out_features], with settings.

    It has no forward: a `LoRALinear` holds it beside a base. A starts Kaiming-uniform in
    ±1/sqrt(in_features), B at zero, and the magnitude at the norms of the base's rows. All are fp32
    whatever the default dtype is.

    Args:
        in_features: k.
        out_features: n.
        r: the rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: see `LoRALinear`.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        weight_norm_squared: ‖W_n‖² of the base, `[out_features]`: makes it a DoRA adapter.
        device: where the parameters are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        weight_norm_squared: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        # fp32 whatever the default dtype, which is a 16-bit one while transformers loads a model.
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.lora_a = nn.Parameter(torch.empty(r, in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(out_features, r, **options))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)
        self.magnitude = (
            None if weight_norm_squared is None else nn.Parameter(weight_norm_squared.sqrt())
        )

    @property
    def use_dora(self) -> bool:
        """Whether there is a magnitude."""
        return parameter_of(self, "magnitude") is not None

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def factors(self, p: float, seed: Tensor | None) -> LoRAFactors:
        """What the operations take, with a dropout of probability p and that seed."""
        lora_a, lora_b = parameter_of(self, "lora_a"), parameter_of(self, "lora_b")
        return LoRAFactors(lora_a, lora_b, seed, self.scaling, p)

    def merged_with(self, weight: Tensor) -> Tensor:
        """The weight [n, k] of a layer with this adapter, of the fp32 weight without it."""
        merged = torch.addmm(weight, self.lora_b.float(), self.lora_a.float(), alpha=self.scaling)
        if self.magnitude is not None:
            merged *= row_gains(self.magnitude, merged)[:, None]
        return merged

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, use_dora={self.use_dora}"
        )


def check_adapter_name(operation: str, adapter_name: str, taken: Collection[str] = ()) -> None:
    """Raise ValueError unless an adapter may have this name."""
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(
            f"{operation}: adapter_name is {adapter_name!r}, want a string without a dot, for it "
            "becomes a part of parameters' names"
        )
    if adapter_name == BASE or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"{operation}: adapter_name is {adapter_name!r}, which has a meaning already; want "
            "another"
        )
    if adapter_name in taken:
        raise ValueError(
            f"{operation}: adapter_name {adapter_name!r} is taken; there are: "
            + ", ".join(map(repr, sorted(taken)))
        )


def check_lora_arguments(
    operation: str, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float
) -> None:
    """Raise ValueError unless an adapter of these can be put beside `base`."""
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
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= largest:
        raise ValueError(
            f"{operation}: r is {r}, want an integer from 1 to {largest} for a layer "
            f"[{base.out_features}, {base.in_features}]"
        )
    if not math.isfinite(lora_alpha):
        raise ValueError(f"{operation}: lora_alpha is {lora_alpha}, want a finite number")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"{operation}: lora_dropout is {lora_dropout}, want 0 <= p < 1")
