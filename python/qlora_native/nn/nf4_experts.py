"""NF4Experts: the experts of a mixture, whose frozen weights are stored in 4 bits."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import ops
from qlora_native.nn.nf4_linear import autocast_dtype, parameter_of, unless_bytes
from qlora_native.ops.storage import NF4Tensors, check_block_size, empty_nf4_tensors

# What transformers' decorator `use_experts_implementation` says of an experts module.
_TRAITS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts")
_SUFFIXES = ("", "_absmax", "_nested_absmax", "_nested_offset")  # in the order of NF4Tensors


class NF4Experts(nn.Module):
    """The experts of a transformers model, with both projections of every expert in NF4.

    Stands for a module that holds them as two parameters of three dimensions, such as
    MixtralExperts, and computes what it does: for a token x that is routed to expert e with weight
    g, `y += g · down_e(act(gate_up_e(x)))`, where the activation, what is clamped, biases and norms
    are the module's own. Each expert is quantised by itself.

    The weights are uint8 parameters, `gate_up_proj` (or `up_proj`) and `down_proj` with codes
    `[experts, n, k/2]`, and their scales `…_absmax`, `…_nested_absmax` and `…_nested_offset`, as
    NF4Linear has them, with one more dimension in front.

    Args:
        experts: a module for which `is_experts` is true. Its biases and submodules become this
            one's, its weights are not read.
        block_size: as in NF4Linear.
        double_quant: as in NF4Linear.
        compute_dtype: as in NF4Linear.
        device: where the weights are.

    New weights are zero; `from_experts` and `load_state_dict` fill them.
    """

    def __init__(
        self,
        experts: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not is_experts(experts):
            raise ValueError(
                f"NF4Experts: experts is {type(experts).__name__}, want a module of experts as "
                "transformers' use_experts_implementation makes it"
            )
        check_block_size("NF4Experts", block_size)
        self.source_class = type(experts)
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self.source_attributes = _attributes(experts)
        for name, value in self.source_attributes.items():
            setattr(self, name, value)
        for name, child in experts.named_children():
            self.add_module(name, child)
        self.weight_shapes: dict[str, torch.Size] = {}  # of one expert, [n, k]
        for name in projections(experts):
            shape = getattr(experts, name).shape[1:]
            self.weight_shapes[name] = torch.Size(shape[::-1] if self.is_transposed else shape)
            self._set_zero(name, device)
        for name, parameter in experts.named_parameters(recurse=False):
            if name not in self.weight_shapes:
                self.register_parameter(name, parameter.requires_grad_(False))
        self.train(experts.training)

    @classmethod
    def from_experts(cls, experts: Any, **settings: Any) -> "NF4Experts":
        """Quantise dense experts; `settings` as in the constructor."""
        layer = cls(experts, **settings, device="meta")
        for name in layer.weight_shapes:
            for part, tensor in layer.quantize(getattr(experts, name).detach(), name).items():
                layer.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        return layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token through the experts that it is routed to.

        Args:
            hidden_states: `[m, hidden]`.
            top_k_index: `[m, top_k]`, the experts of each token.
            top_k_weights: `[m, top_k]`, what their outputs are multiplied by.

        Returns:
            `[m, hidden]` in the dtype of hidden_states.
        """
        if getattr(self, "_is_expert_parallel", False):
            raise NotImplementedError("NF4Experts: expert parallelism, want all experts here")
        m, top_k = top_k_index.shape
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)  # (token, expert) pairs, an expert's together
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        inputs = hidden_states[order // top_k].split(counts)
        outputs = [self._expert(e, x) for e, x in enumerate(inputs) if counts[e]]
        if not outputs:
            return torch.zeros_like(hidden_states)
        y = torch.cat(outputs)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        weighted = weighted[order.argsort()].view(m, top_k, -1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        up, down = self.weight_shapes
        hidden = self._project(up, e, x)
        hidden = (
            self.source_class._apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)
        )
        return self._project(down, e, hidden)

    def _project(self, name: str, e: int, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or autocast_dtype(x) or x.dtype
        bias = getattr(self, f"{name}_bias")[e].to(dtype) if self.has_bias else None
        y = ops.nf4_linear(x.to(dtype), self.tensors(name, e), bias)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def tensors(self, name: str, e: int) -> NF4Tensors:
        """The weight `name` of expert e as the operations take it; views of the parameters."""
        return self._of_one(name, e, self._weight(name))

    def quantize(self, weight: Iterable[Tensor], name: str) -> dict[str, Tensor]:
        """The parameters, by name, in which this layer would store a dense weight.

        Args:
            weight: as the dense module has it, `[experts, n, k]`, or `[experts, k, n]` where that
                is transposed; or its experts one by one. The layer is left as it is.
            name: of the weight, `"down_proj"` for one.

        Raises:
            ValueError: another shape or dtype, or a NaN or Inf.
        """
        stored: list[Tensor | None] = []
        e = -1
        for e, dense in enumerate(weight):
            if not stored:
                stored = self._empty(name, dense.device)
            self._quantize_one(dense, name, e, stored)
            del dense
        if e + 1 != self.num_experts:
            raise ValueError(f"NF4Experts: {name} has {e + 1} experts, want {self.num_experts}")
        return {
            name + suffix: part
            for suffix, part in zip(_SUFFIXES, stored, strict=True)
            if part is not None
        }

    def _quantize_one(self, dense: Tensor, name: str, e: int, stored: list[Tensor | None]) -> None:
        shape = self._dense_shape(name)[1:]
        if dense.shape != shape or e >= self.num_experts:
            raise ValueError(
                f"NF4Experts: the dense {name}[{e}] is {list(dense.shape)}, want {list(shape)} of "
                f"{self.num_experts} experts"
            )
        dense = dense.T.contiguous() if self.is_transposed else dense
        try:
            ops.quantize(dense, self.block_size, self.double_quant, self._of_one(name, e, stored))
        except ValueError as error:
            raise ValueError(f"{name}[{e}]: {error}") from error

    def _of_one(self, name: str, e: int, parts: Sequence[Tensor | None]) -> NF4Tensors:
        codes, absmax, nested_absmax, nested_offset = (
            None if part is None else part[e] for part in parts
        )
        n, k = self.weight_shapes[name]
        return NF4Tensors(codes, absmax, nested_absmax, nested_offset, n, k, self.block_size)

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `name` of all experts in `dtype`, in the dense module's shape."""
        device = parameter_of(self, name).device
        dense = torch.empty(self._dense_shape(name), dtype=dtype, device=device)
        for e in range(self.num_experts):
            weight = ops.dequantize(self.tensors(name, e), dtype)
            dense[e] = weight.T if self.is_transposed else weight
        return dense

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that this one stands for, dequantised, in `dtype` and frozen."""
        dense: Any = object.__new__(self.source_class)
        nn.Module.__init__(dense)
        for name, value in self.source_attributes.items():
            setattr(dense, name, value)
        for name, child in self.named_children():
            dense.add_module(name, child)
        stored = self._stored_names()
        for name, parameter in self.named_parameters(recurse=False):
            if name not in stored:
                parameter = nn.Parameter(parameter.to(dtype, copy=True), requires_grad=False)
                dense.register_parameter(name, parameter)
        for name in self.weight_shapes:
            weight = self.dequantize(name, dtype)
            dense.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return dense.train(self.training)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Of the weights that are 4-bit, as the dense module has them."""
        return tuple(self.weight_shapes)

    @property
    def weight_count(self) -> int:
        """How many weights the codes stand for."""
        return self.num_experts * sum(shape.numel() for shape in self.weight_shapes.values())

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self.weight_shapes.items())
        return (
            f"{self.num_experts} × ({shapes}), block_size={self.block_size}, "
            f"double_quant={self.double_quant}, compute_dtype={self.compute_dtype}"
        )

    def _dense_shape(self, name: str) -> torch.Size:
        n, k = self.weight_shapes[name]
        return torch.Size(
            (self.num_experts, k, n) if self.is_transposed else (self.num_experts, n, k)
        )

    def _empty(self, name: str, device: torch.device | str | None) -> list[Tensor | None]:
        n, k = self.weight_shapes[name]
        one = empty_nf4_tensors(n, k, self.block_size, self.double_quant, "meta")
        return [
            None
            if part is None
            else torch.empty(self.num_experts, *part.shape, dtype=torch.uint8, device=device)
            for part in one[:4]
        ]

    def _stored_names(self) -> list[str]:
        return [name + suffix for name in self.weight_shapes for suffix in _SUFFIXES]

    def _weight(self, name: str) -> list[Tensor | None]:
        return [parameter_of(self, name + suffix) for suffix in _SUFFIXES]

    def _set_zero(self, name: str, device: torch.device | str | None) -> None:
        for suffix, part in zip(_SUFFIXES, self._empty(name, device), strict=True):
            zero = None if part is None else nn.Parameter(part.zero_(), requires_grad=False)
            self.register_parameter(name + suffix, zero)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Refuse a weight that is not bytes: copying would turn floats into codes in silence."""
        if problem := unless_bytes(state_dict, prefix, self._stored_names()):
            arguments[-1].append(f"NF4Experts: {problem}; dense ones are quantised by from_experts")
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def is_experts(module: nn.Module) -> bool:
    """Whether NF4Experts can stand for it: transformers' decorator made it, and it is dense."""
    return (
        not isinstance(module, NF4Experts)
        and all(hasattr(module, trait) for trait in _TRAITS)
        and hasattr(type(module), "_apply_gate")
        and all(
            isinstance(weight := getattr(module, name, None), nn.Parameter)
            and weight.dim() == 3
            and weight.shape[0] == module.num_experts
            and weight.is_floating_point()
            for name in projections(module)
        )
    )


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of the two weights, in the order in which they are used."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside what every module has: sizes, limits, its configuration."""
    every = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in every}
