"""NF4LoraLinear: PEFT's LoRA layer on an NF4 base, computed by one autograd node."""

import warnings
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from qlora_native.hf.conv1d import NF4Conv1D
from qlora_native.hf.peft.dora_variant import NF4Dora
from qlora_native.hf.peft.lora_settings import check_settings
from qlora_native.hf.peft.merging_layer import MergingLayer
from qlora_native.nn import NF4Linear
from qlora_native.nn.held_merge import held_forward
from qlora_native.nn.lora_forward import dora_forward, draw_seed, lora_forward
from qlora_native.nn.nf4_linear import parameter_of
from qlora_native.nn.routing import (
    Names,
    RoutedLayer,
    Routing,
    groups_of_batch,
    rows_of_each_element,
)
from qlora_native.nn.row_norms import RowNorms
from qlora_native.nn.wrapping import check_not_distributed
from qlora_native.ops.lora import LoRAFactors
from qlora_native.ops.lora_groups import LoRAGroup

# What the routing says while PEFT's active adapters act, or none does, is no adapter's name, and
# changes with them: a recomputation that finds another than the forward is noticed.
_DISABLED = "(PEFT's adapters disabled)"


class NF4LoraLinear(RoutedLayer, MergingLayer, Linear):
    """y = base(x) + Σ scaling · (dropout(x) · Aᵀ) · Bᵀ over the active adapters, or DoRA.

    PEFT builds it for each NF4Linear that a LoraConfig targets, and sees one of its own layers: the
    factors are `lora_A[name].weight` and `lora_B[name].weight`, and are saved, loaded, switched and
    deleted by PEFT. The forward is this library's: base, updates, dropout and bias are one autograd
    node, which saves x and x · Aᵀ. It reads the factors, so that hooks on PEFT's `lora_A` and
    `lora_B` modules do not run; where the base itself has hooks, as when it is offloaded, it
    raises.

    Which adapters act is said by PEFT (`set_adapter`, `disable_adapter`, `adapter_names`) or by
    `set_lora`, which trains several at once; the later call holds, but for `adapter_names`, which
    is for one call, and `disable_adapter`, at whose end the last `set_lora` is in force.

    Raises ValueError or NotImplementedError for settings that are wrong or not right on NF4.
    """

    def __init__(
        self,
        base_layer: NF4Linear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        _check_fusible(base_layer)
        is_conv1d = isinstance(base_layer, NF4Conv1D)
        if config.fan_in_fan_out != is_conv1d:
            warnings.warn(
                f"fan_in_fan_out is {config.fan_in_fan_out} but the target module is "
                f"{type(base_layer).__name__}. Setting fan_in_fan_out to {is_conv1d}.",
                stacklevel=2,
            )
            config.fan_in_fan_out = is_conv1d
        self.routing = Routing()
        self.merged_adapters: list[str] = []
        self.merge_dtype = torch.float32  # of a merged weight; PEFT's merge calls have no such word
        self._norms = RowNorms()
        self._active_names = ""
        self._names_when_enabled: Names = None
        super().__init__(base_layer, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)
        self.fan_in_fan_out = False  # a 4-bit weight is never transposed
        self.register_load_state_dict_post_hook(NF4LoraLinear._forget_norms)

    # ---- what PEFT asks while it builds adapters

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: NF4Linear
    ) -> tuple[torch.device, torch.dtype | None]:
        """Where new factors go, and the dtype that a dense base would give them, if it is known."""
        bias_dtype = None if base_layer.bias is None else base_layer.bias.dtype
        return base_layer.tensors().codes.device, base_layer.compute_dtype or bias_dtype

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; see `check_settings` for what is refused."""
        layer = kwargs.get("target_name") or "NF4LoraLinear"
        check_not_distributed("add_adapter", self.base_layer)
        check_settings(f"adapter {adapter_name!r}: {layer}", self.base_layer, r, lora_alpha, config)
        names = self.routing.names
        has_adapters = bool(self.lora_A)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if has_adapters:  # PEFT has set the active adapters once more, which ends a set_lora
            self.routing.change(names)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """DoRA, or None for plain LoRA; `check_settings` has refused the others."""
        return NF4Dora() if config.use_dora else None

    @torch.no_grad()
    def orthogonal_init(self, adapter_name: str) -> None:
        """A and B with orthogonal rows from the two halves of one rotation, A · B = 0.

        PEFT's, which asks the base weight for its dtype.
        """
        r = self.r[adapter_name]
        if r % 2 != 0:
            raise ValueError(f"init_lora_weights='orthogonal' takes an even r, got {r}")
        rotation, _ = torch.linalg.qr(torch.randn(r, r))
        lora_a = torch.randn(self.in_features, r // 2) @ rotation[0::2] / 10.0
        lora_b = torch.randn(r // 2, self.out_features).t() @ rotation[1::2] / 10.0
        self.lora_A[adapter_name].weight.copy_(lora_a.t())
        self.lora_B[adapter_name].weight.copy_(lora_b)

    # ---- which adapters act

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let these adapters act, all of them for all rows, whatever `set_lora` has said before."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._active_names = f"(PEFT's active adapters: {', '.join(self.active_adapters)})"
        self.routing.change(self._active_names)

    def enable_adapters(self, enabled: bool) -> None:
        """Let adapters act, as before, or the base alone; `set_lora` stays in force."""
        names = self.routing.names
        if names == _DISABLED:
            names = self._names_when_enabled
        super().enable_adapters(enabled)
        self._names_when_enabled = names
        self.routing.change(names if enabled else _DISABLED)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; where `set_lora` has put it in force, PEFT's active ones act again."""
        active = self._active_names

        def survives(names: Names) -> bool:
            is_in = isinstance(names, tuple) and adapter_name in names
            return names not in (active, adapter_name) and not is_in

        names, when_enabled = self.routing.names, self._names_when_enabled
        super().delete_adapter(adapter_name)
        self._names_when_enabled = when_enabled if survives(when_enabled) else self._active_names
        self.routing.change(names if survives(names) else self._active_names)

    def lora_names(self) -> Collection[str]:
        """The names of the adapters."""
        return self.lora_A.keys()

    def check_active_in_force(self, operation: str) -> None:
        """Raise ValueError if `set_lora` has put others in force than PEFT's active adapters."""
        names = self.routing.names
        if names == _DISABLED:
            names = self._names_when_enabled
        if names != self._active_names and [names] != self.active_adapters:
            raise ValueError(
                f"{operation}: PEFT's active adapters are {self.active_adapters}, but set_lora has "
                f"put {names!r} in force; say which to merge, or call set_adapter first"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See `MergingLayer.merge`. ValueError where it is not clear which adapters are meant."""
        if adapter_names is None:
            self.check_active_in_force("merge")
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    # ---- forward

    def forward(
        self, x: Tensor, *, adapter_names: Sequence[str] | None = None, alora_offsets: Any = None
    ) -> Tensor:
        """x[..., in_features] -> y[..., out_features].

        Args:
            x: its dtype is that of the result, unless autocast is on.
            adapter_names: one adapter's name, or "__base__", for each element of x's first
                dimension; PEFT passes it on from the model's call. None: what acts is as set.
            alora_offsets: PEFT's, for activated LoRA; no adapter of this layer is one.
        """
        self.routing.check_recomputation()
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
        y = self._forward_of(x, adapter_names)
        return self.routing.checked(y) if len(self._modules["lora_A"]._modules) > 1 else y

    def _forward_of(self, x: Tensor, adapter_names: Sequence[str] | None) -> Tensor:
        base = self._modules["base_layer"]
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return base(x)
        names = self.routing.names
        by_peft = names == self._active_names
        if self.merged_adapters:
            if not by_peft:
                raise ValueError(
                    f"NF4LoraLinear: set_lora has put {names!r} in force, but the adapters "
                    f"{self.merged_adapters} are merged; call unmerge_adapter first"
                )
            y = held_forward(base, x, self.held_weight)
            return self._add_lora_bias(y, self.merged_adapters)
        if adapter_names is not None:
            return self._forward_of_batch(base, x, adapter_names)
        if by_peft:
            return self._forward_of_all(base, x, self.active_adapters)
        if isinstance(names, tuple):
            return self._forward_of_batch(base, x, names)
        return self._forward_of_all(base, x, () if names is None else (names,))

    def _forward_of_all(self, base: NF4Linear, x: Tensor, names: Sequence[str]) -> Tensor:
        """All rows with the sum of all adapters of these names."""
        existing = self._modules["lora_A"]._modules
        names = [name for name in names if name in existing]
        if not names:
            return base(x)
        _check_fusible(base)
        factors = [self._factors(name, x) for name in names]
        if doras := [name for name in names if name in self.lora_variant]:
            if len(names) > 1:
                raise NotImplementedError(
                    f"NF4LoraLinear: the adapters {names} are active and of them {doras} are DoRA, "
                    "which is right on its own alone; set one adapter active"
                )
            magnitude = self.lora_magnitude_vector[doras[0]].weight
            return dora_forward(base, x, factors[0], magnitude, self.weight_norms_squared)
        rows = x.shape[:-1].numel()
        y = lora_forward(base, x, [LoRAGroup(0, rows, each) for each in factors])
        return self._add_lora_bias(y, names)

    def _forward_of_batch(self, base: NF4Linear, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each element of the batch with the adapter of its name."""
        found = [name for name in dict.fromkeys(names) if name in self.lora_A]
        if found:
            _check_fusible(base)
        if any(name in self.lora_variant for name in found):
            # Each DoRA scales the base's product in its own way: a run of one name at a time.
            rows_of_each_element(names, x)
            runs = [(name, sum(1 for _ in run)) for name, run in groupby(names)]
            parts = x.split([length for _, length in runs])
            pairs = zip(parts, runs, strict=True)
            return torch.cat(
                [self._forward_of_all(base, part, (name,)) for part, (name, _) in pairs]
            )
        factors = {name: self._factors(name, x) for name in found}
        y = lora_forward(base, x, groups_of_batch(names, x, factors))
        biases = {name: bias for name in found if (bias := self.bias_update(name)) is not None}
        if biases:
            nothing = torch.zeros_like(next(iter(biases.values())))
            rows = torch.stack([biases.get(name, nothing) for name in names])
            y = y + rows.to(y.dtype).view(len(names), *(1,) * (y.dim() - 2), -1)
        return y

    def _factors(self, name: str, x: Tensor) -> LoRAFactors:
        modules = self._modules  # an attribute that is a module costs half a microsecond
        lora_a = parameter_of(modules["lora_A"]._modules[name], "weight")
        lora_b = parameter_of(modules["lora_B"]._modules[name], "weight")
        scaling = self.scaling[name]
        if isinstance(scaling, Tensor):  # PEFT's, for a compiled model whose adapter is swapped
            lora_b, scaling = lora_b * scaling, 1.0
        dropout = modules["lora_dropout"]._modules[name]
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return LoRAFactors(lora_a, lora_b, draw_seed(x, p), scaling, p)

    def _add_lora_bias(self, y: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            bias = self.bias_update(name) if self.lora_bias[name] else None
            y = y if bias is None else y + bias.to(y.dtype)
        return y

    # ---- DoRA

    @property
    def weight_norms_squared(self) -> Tensor:
        """‖W_n‖² of the base, fp32 `[out_features]`; computed again if it was written or moved."""
        return self._norms.of(self.base_layer.tensors())

    def _forget_norms(self, *_: Any) -> None:
        self._norms.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._norms.forget()
        return super()._apply(fn, recurse)


def _check_fusible(base: NF4Linear) -> None:
    """Refuse hooks that would have to run inside of the one node."""
    hooks = base._forward_hooks or base._forward_pre_hooks
    if hooks or base._backward_hooks or base._backward_pre_hooks or "forward" in vars(base):
        raise NotImplementedError(
            "NF4LoraLinear: the NF4Linear inside has hooks, as accelerate's for offloaded layers, "
            "which the fused layer would pass over. Register hooks on the LoRA layer, and load the "
            "model without offloading"
        )
