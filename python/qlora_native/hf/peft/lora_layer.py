"""NF4LoraLinear: PEFT's LoRA layer on an NF4 base, computed by one autograd node."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qlora_native import ops
from qlora_native.hf.peft.lora_settings import check_settings
from qlora_native.nn import NF4Linear
from qlora_native.ops.lora import LoRAFactors


class NF4LoraLinear(Linear):
    """y = base(x) + Σ scaling · (dropout(x) · Aᵀ) · Bᵀ over the active adapters, or DoRA.

    PEFT builds it for each NF4Linear that a LoraConfig targets, and sees one of its own layers: the
    factors are `lora_A[name].weight` and `lora_B[name].weight`, and are saved, loaded, switched and
    deleted by PEFT. The forward is this library's: base, updates, dropout and bias are one autograd
    node, which saves x and x · Aᵀ. It reads the factors, so that hooks on PEFT's `lora_A` and
    `lora_B` modules do not run; where the base itself has hooks, as when it is offloaded, PEFT's
    own forward runs instead.

    Merging dequantises the base and adds to that: nothing is quantised again. The dense weight
    lives beside the NF4 one until `unmerge`, which therefore restores the exact bits.

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
        if config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to True but an NF4Linear's weight is [out_features, "
                "in_features]. Setting fan_in_fan_out to False.",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs)
        self._weight_norms: Tensor | None = None
        self.merge_dtype = torch.float32
        self.register_buffer("_merged_weight", None, persistent=False)
        self.register_buffer("_merged_bias", None, persistent=False)
        self.register_load_state_dict_post_hook(NF4LoraLinear._forget_weight_norms)

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
        check_settings(f"adapter {adapter_name!r}: {layer}", self.base_layer, r, lora_alpha, config)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """DoRA, or None for plain LoRA; `check_settings` has refused the others."""
        return _NF4Dora() if config.use_dora else None

    @torch.no_grad()
    def orthogonal_init(self, adapter_name: str) -> None:
        """A and B with orthogonal rows from the two halves of one rotation, A · B = 0.

        PEFT's, which asks the base weight for its dtype.
        """
        r = self.r[adapter_name]
        if r % 2 != 0:
            raise ValueError(f"init_lora_weights='orthogonal' takes an even r, got {r}")
        rotation, _ = torch.linalg.qr(torch.randn(r, r))
        for factor, half, features in (
            (self.lora_A, rotation[0::2], self.in_features),
            (self.lora_B, rotation[1::2], self.out_features),
        ):
            matrix = torch.randn(features, r // 2) @ half / 10.0
            weight = factor[adapter_name].weight
            weight.copy_(matrix.t() if factor is self.lora_A else matrix)

    # ---- forward

    def forward(
        self, x: Tensor, *, adapter_names: Sequence[str] | None = None, alora_offsets: Any = None
    ) -> Tensor:
        """x[..., in_features] -> y[..., out_features].

        Args:
            x: its dtype is that of the result.
            adapter_names: one adapter's name, or "__base__", for each element of x's first
                dimension; PEFT passes it on from the model's call. None: the active adapters.
            alora_offsets: PEFT's, for activated LoRA; no adapter of this layer is one.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if self.merged:
            self._check_forward_args(x, adapter_names=adapter_names)
            return self._merged_forward(x)
        if adapter_names is not None or _has_hooks(self.base_layer):
            return super().forward(x, adapter_names=adapter_names)
        names = [name for name in self.active_adapters if name in self.lora_A]
        return self._fused_forward(x, names)

    def _fused_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.base_layer
        if not names:
            return base(x)
        dtype = base.compute_dtype_for(x)
        x_in_dtype = x if x.dtype == dtype else x.to(dtype)
        weight, bias = base.tensors(), base.bias_in(dtype)
        for name in names:
            if self.lora_bias[name]:
                update = self.lora_B[name].bias * self.scaling[name]
                bias = update.to(dtype) if bias is None else bias + update.to(dtype)
        if len(names) > 1:
            raise NotImplementedError("several active adapters")
        a, b, seed, scaling, p = self._factors(names[0], x)
        if names[0] in self.lora_variant:
            magnitude = self.lora_magnitude_vector[names[0]].weight
            raise NotImplementedError(magnitude)
        y = ops.lora_linear(x_in_dtype, weight, bias, a, b, scaling, p, seed)
        return y if base.compute_dtype is None else y.to(x.dtype)

    def _factors(self, name: str, x: Tensor) -> LoRAFactors:
        lora_b, scaling = self.lora_B[name].weight, self.scaling[name]
        if isinstance(scaling, Tensor):  # PEFT's, for a compiled model whose adapter is swapped
            lora_b, scaling = lora_b * scaling, 1.0
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        # torch's generator draws the seed, so that its state, checkpointing's replay and CUDA
        # graphs all govern the mask.
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0.0 else None
        return LoRAFactors(self.lora_A[name].weight, lora_b, seed, scaling, p)

    # ---- DoRA

    @property
    def weight_norms_squared(self) -> Tensor:
        """‖W_n‖² of the base's rows, fp32 `[out_features]`: computed once and kept.

        A load of the base's state or a move of the layer makes it forget them.
        """
        if self._weight_norms is None:
            self._weight_norms = ops.row_norms_squared(self.base_layer.tensors())
        return self._weight_norms

    def _forget_weight_norms(self, *_: Any) -> None:
        self._weight_norms = None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._forget_weight_norms()
        return super()._apply(fn, recurse)

    # ---- merging

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The weight of base and adapters together, fp32 `[out_features, in_features]`.

        In order: W + scaling · B · A for LoRA; for DoRA, of what it is put on, the rows of
        that sum times magnitude / ‖W + scaling · B · A‖, W the base's. Names that this layer has
        not are passed over.
        """
        base = self.base_layer.dequantize(torch.float32)
        weight = base.clone()
        for name in names:
            if name not in self.lora_A:
                continue
            update = self.get_delta_weight(name).float()
            weight += update
            if name in self.lora_variant:
                norms = (base + update).norm(dim=1)
                weight *= (self.lora_magnitude_vector[name].weight.float() / norms)[:, None]
        return weight

    @torch.no_grad()
    def merged_bias(self, names: Sequence[str]) -> Tensor | None:
        """The bias of base and adapters together, or None where neither has one."""
        bias: Tensor | None = self.base_layer.bias
        for name in names:
            if not self.lora_bias.get(name, False):
                continue
            if bias is None:
                raise RuntimeError(
                    f"adapter {name!r} has lora_bias=True and the base layer has no bias to merge "
                    "that into"
                )
            bias = bias + self.lora_B[name].bias * self.scaling[name]
        return bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute with a dense weight in which adapters are merged, until `unmerge`.

        Args:
            safe_merge: raise ValueError, and change nothing, where the result is not finite.
            adapter_names: which; None: the active ones. Those that are merged stay so.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        merged = [*self.merged_adapters, *names]
        weight, bias = self.merged_weight(merged), self.merged_bias(merged)
        for tensor in (weight, bias) if safe_merge else ():
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be "
                    "broken"
                )
        self._merged_weight = weight.to(self.merge_dtype)
        self._merged_bias = None if bias is None else bias.detach().clone()
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Compute with the NF4 base and the adapters again; the base was never touched."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self._merged_weight = self._merged_bias = None
        self.merged_adapters = []

    def _merged_forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        dtype = base.compute_dtype_for(x)
        bias = None if self._merged_bias is None else self._merged_bias.to(dtype)
        y = nn.functional.linear(x.to(dtype), self._merged_weight.to(dtype), bias)
        return y if base.compute_dtype is None else y.to(x.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What takes this layer's place: the base, or a dense nn.Linear with what is merged."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            return self.base_layer
        base, bias = self.base_layer, self._merged_bias
        dense = nn.Linear(base.in_features, base.out_features, bias is not None, device="meta")
        dense.weight = nn.Parameter(self._merged_weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.to(self._merged_weight.dtype), requires_grad=False)
        return dense.train(self.training)


class _NF4Dora(LoraVariant):
    """DoRA on an NF4 base: what PEFT asks when it adds such an adapter. The layer computes it."""

    @staticmethod
    @torch.no_grad()
    def init(module: NF4LoraLinear, adapter_name: str, **kwargs: Any) -> None:
        """Let the magnitude be ‖W + scaling · B · A‖ of every row."""
        holder = DoraLinearLayer(fan_in_fan_out=False)
        lora_b = module.lora_B[adapter_name].weight
        if lora_b.is_meta:  # low_cpu_mem_usage: it will be loaded
            norms = torch.empty(module.out_features, device="meta")
        else:
            norms = module.merged_weight([]).add_(module.get_delta_weight(adapter_name)).norm(dim=1)
        holder.weight = nn.Parameter(norms)
        module.lora_magnitude_vector[adapter_name] = holder

    @staticmethod
    def forward(
        module: NF4LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Refuse PEFT's own forward, which would take the codes for a weight."""
        raise NotImplementedError(
            f"NF4LoraLinear: adapter {active_adapter!r} is DoRA and the base layer has hooks, so "
            "that PEFT's forward would have to run, which knows no NF4 weight"
        )


def _has_hooks(base: nn.Module) -> bool:
    """Whether a call of `base` does more than its class's forward: hooks, accelerate's too."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in vars(base)
    )
