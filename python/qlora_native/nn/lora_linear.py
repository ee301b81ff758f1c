"""LoRALinear: a frozen linear layer and the low-rank updates that are trained beside it."""

import math
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.nn.held_merge import HeldMerge, held_forward
from qlora_native.nn.lora_adapter import LoRAAdapter, check_adapter_name, check_lora_arguments
from qlora_native.nn.lora_forward import dora_forward, draw_seed, lora_forward
from qlora_native.nn.nf4_linear import NF4Linear
from qlora_native.nn.routing import (
    BASE,
    Names,
    RoutedLayer,
    Routing,
    check_exist,
    groups_of_batch,
    rows_of_each_element,
)
from qlora_native.nn.row_norms import RowNorms
from qlora_native.ops.lora import LoRAFactors
from qlora_native.ops.lora_groups import LoRAGroup


class LoRALinear(HeldMerge, RoutedLayer):
    """y = base(x) + scaling · (dropout(x) · Aᵀ) · Bᵀ, as one autograd node.

    LoRA is by Hu et al. 2021, section 4.1. With `use_dora` (Liu et al. 2024, section 4) the sum of
    base and update is scaled row by row to the length `magnitude`, which is trained as well:
    y = magnitude / ‖W + scaling · B · A‖ ⊙ (W + scaling · B · A) · x, norms of rows.

    A layer has one adapter or several, each with a name, a rank and settings of its own:
    `adapters[name]` is a `LoRAAdapter`. `set_lora` says which is in force, for all rows or for each
    element of a batch; at the start it is the one that the constructor makes.

    A[r, in_features] starts Kaiming-uniform, B[out_features, r] at zero: at the start the layer is
    its base, bit for bit (with DoRA, to rounding). Only adapters are trained: base and bias are
    frozen here. The factors are fp32; a call rounds them to the compute dtype once, sums in fp32,
    and their gradients come back in fp32. Backward keeps x and x · Aᵀ, nothing else (with DoRA the
    output before it is scaled, too).

    Args:
        base: an NF4Linear or an nn.Linear; it becomes the attribute `base`.
        r: the rank, from 1 to min(in_features, out_features).
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: the probability with which an element of x is dropped before A while training,
            0 <= p < 1.
        use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023).
        use_dora: whether the adapter has a magnitude.
        adapter_name: the name of this first adapter.

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
        use_dora: bool = False,
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        check_adapter_name("LoRALinear", adapter_name)
        check_lora_arguments("LoRALinear", base, r, lora_alpha, lora_dropout)
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.routing = Routing(adapter_name)
        self._norms = RowNorms()
        self.train(base.training)
        self.adapters[adapter_name] = self.make_adapter(
            r, lora_alpha, lora_dropout, use_rslora, use_dora
        )

    def make_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        use_dora: bool,
    ) -> LoRAAdapter:
        """A new adapter for this layer; `adapters[name] = adapter` adds it."""
        return LoRAAdapter(
            self.in_features,
            self.out_features,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            weight_norm_squared=self._weight_norm_squared() if use_dora else None,
            device=self.base.weight.device,
        ).train(self.training)

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        """Add an adapter beside those that are here; `set_lora` puts it in force.

        Raises ValueError where the name is taken or an argument is out of its range, as the
        constructor's; the layer is then as it was.
        """
        check_adapter_name("LoRALinear.add_adapter", adapter_name, self.adapters)
        check_lora_arguments("LoRALinear.add_adapter", self.base, r, lora_alpha, lora_dropout)
        self.adapters[adapter_name] = self.make_adapter(
            r, lora_alpha, lora_dropout, use_rslora, use_dora
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter. ValueError if there is none of that name, or it is in force."""
        check_exist("LoRALinear.delete_adapter", [adapter_name], self.adapters)
        self.check_not_in_force("LoRALinear.delete_adapter", adapter_name)
        del self.adapters[adapter_name]

    def check_not_in_force(self, operation: str, adapter_name: str) -> None:
        """Raise ValueError if `set_lora` has put that adapter in force here."""
        names = self.routing.names
        if names == adapter_name or (isinstance(names, tuple) and adapter_name in names):
            raise ValueError(
                f"{operation}: {adapter_name!r} is in force; call set_lora with other names, or "
                "None, first"
            )

    def lora_names(self) -> Collection[str]:
        """The names of the adapters."""
        return self.adapters.keys()

    def check_unmerged(self, operation: str) -> None:
        """Raise ValueError if the layer holds a merged weight: a change would have no effect."""
        if self.holds_merged:
            raise ValueError(f"{operation}: adapters are merged; call unmerge_lora first")

    # ---- the one adapter, where there is one

    def _only_adapter(self) -> LoRAAdapter:
        if len(self.adapters) != 1:
            raise ValueError(
                f"LoRALinear: the layer has the adapters {list(self.adapters)}; ask "
                "layer.adapters[name]"
            )
        return next(iter(self.adapters.values()))

    @property
    def lora_a(self) -> nn.Parameter:
        """A[r, in_features] of the one adapter; ValueError where there are several."""
        return self._only_adapter().lora_a

    @property
    def lora_b(self) -> nn.Parameter:
        """B[out_features, r] of the one adapter."""
        return self._only_adapter().lora_b

    @property
    def magnitude(self) -> nn.Parameter | None:
        """The one adapter's magnitude [out_features], or None where it is no DoRA."""
        return self._only_adapter().magnitude

    @property
    def r(self) -> int:
        """The rank of the one adapter."""
        return self._only_adapter().r

    @property
    def lora_alpha(self) -> float:
        """lora_alpha of the one adapter."""
        return self._only_adapter().lora_alpha

    @property
    def lora_dropout(self) -> float:
        """lora_dropout of the one adapter."""
        return self._only_adapter().lora_dropout

    @property
    def use_rslora(self) -> bool:
        """use_rslora of the one adapter."""
        return self._only_adapter().use_rslora

    @property
    def scaling(self) -> float:
        """The factor of the one adapter's update."""
        return self._only_adapter().scaling

    @property
    def in_features(self) -> int:
        """k."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """n."""
        return self.base.out_features

    # ---- forward

    def forward(self, x: Tensor) -> Tensor:
        """x[..., in_features] -> y[..., out_features], in the dtype that the base would give."""
        if self.holds_merged:
            return held_forward(self.base, x, self.held_weight)
        self.routing.check_recomputation()
        y = self._forward_of(x, self.routing.names)
        if len(self._modules["adapters"]._modules) > 1 or self.routing.has_changed:
            return self.routing.checked(y)
        return y

    def _forward_of(self, x: Tensor, names: Names) -> Tensor:
        base = self._modules["base"]
        if isinstance(names, tuple):
            return self._forward_of_batch(base, x, names)
        adapter = None if names is None else self._adapter(names)
        if adapter is None:
            return base(x)
        factors = self._factors(adapter, x)
        if adapter.use_dora:
            norms = self._weight_norm_squared()
            return dora_forward(base, x, factors, adapter.magnitude, norms)
        return lora_forward(base, x, [LoRAGroup(0, math.prod(x.shape[:-1]), factors)])

    def _forward_of_batch(self, base: Any, x: Tensor, names: Sequence[str]) -> Tensor:
        rows_of_each_element(names, x)  # the check, even where no adapter is here
        adapters = {name: self._adapter(name) for name in dict.fromkeys(names)}
        found = {name: adapter for name, adapter in adapters.items() if adapter is not None}
        if any(adapter.use_dora for adapter in found.values()):
            # Each DoRA scales the base's product in its own way: a run of one name at a time.
            runs = [(name, sum(1 for _ in run)) for name, run in groupby(names)]
            parts = x.split([length for _, length in runs])
            pairs = zip(parts, runs, strict=True)
            return torch.cat([self._forward_of(part, name) for part, (name, _) in pairs])
        factors = {name: self._factors(adapter, x) for name, adapter in found.items()}
        return lora_forward(base, x, groups_of_batch(names, x, factors))

    def _adapter(self, name: str) -> Any:
        return self._modules["adapters"]._modules.get(name)

    def _factors(self, adapter: LoRAAdapter, x: Tensor) -> LoRAFactors:
        p = adapter.lora_dropout if self.training else 0.0
        return adapter.factors(p, draw_seed(x, p))

    # ---- the base's weight

    @torch.no_grad()
    def merged_weight(self, names: str | Sequence[str]) -> Tensor:
        """The weight [out_features, in_features], fp32, of the layer with all of `names` in force.

        It is W + scaling · B · A, with DoRA scaled by magnitude / ‖W + scaling · B · A‖; W is what
        was trained against, dequantised where the base is NF4. Of several adapters, the changes
        that each makes to W alone are added up. A name that this layer has not changes nothing.
        """
        base = self.base
        is_nf4 = isinstance(base, NF4Linear)
        weight = base.dequantize(torch.float32) if is_nf4 else base.weight.float()
        adapters = [
            self.adapters[name]
            for name in ([names] if isinstance(names, str) else names)
            if name != BASE and name in self.adapters
        ]
        merged = [adapter.merged_with(weight) for adapter in adapters]
        if len(merged) == 1:
            return merged[0]
        total = weight.clone()
        for one in merged:
            total += one - weight
        return total

    def _weight_norm_squared(self) -> Tensor:
        """‖W_n‖² of the base, fp32 [n]; computed again if its memory was written or moved."""
        base = self.base
        return self._norms.of(base.tensors() if isinstance(base, NF4Linear) else base.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        self._norms.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._norms.forget()  # the base is loaded after this
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"in_force={self.routing.names!r}"
