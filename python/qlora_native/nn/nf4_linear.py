"""NF4Linear: a linear layer whose frozen weight is stored in 4 bits."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import ops
from qlora_native.nf4_weight import NF4Weight, nf4_dequantize, nf4_quantize
from qlora_native.ops.storage import (
    FLOAT_DTYPES,
    NF4Tensors,
    check_block_size,
    empty_nf4_tensors,
)

# The parameter that each stored tensor of the weight is, in the order of NF4Tensors.
WEIGHT_PARAMETERS = ("weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset")


class NF4Linear(nn.Module):
    """y = x · dequantize(W, compute dtype)ᵀ + bias, with W frozen in NF4.

    The weight is `weight` (codes) and `weight_absmax`, `weight_nested_absmax`,
    `weight_nested_offset` (scales): uint8 parameters that need no gradient, with shapes known from
    the constructor. Casts (`.to(bfloat16)`, `.half()`) leave them alone, FSDP2 shards them (tested
    with torch 2.13; that of 2.6 cannot), and `state_dict` holds all there is. The bias is an
    ordinary parameter, frozen as well.

    This is not an `nn.Linear`: code that would take the codes for weights fails instead of
    computing nonsense.

    Args:
        in_features: k.
        out_features: n.
        bias: whether there is a bias.
        block_size: weights that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits (4.127 bits a weight at block 64, against 4.5).
        compute_dtype: the dtype of the product; x is cast to it and y back to x's dtype. None
            follows autocast where it is on, else x.
        device: where the parameters are.

    A new layer's weight is zero; `from_linear` and `load_state_dict` fill it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"NF4Linear: {name} is {size}, want at least 1")
        check_block_size("NF4Linear", block_size)
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"NF4Linear: compute_dtype is {compute_dtype}, want one of {FLOAT_DTYPES} or None"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self._set_weight(
            empty_nf4_tensors(out_features, in_features, block_size, double_quant, device)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()  # scales of zero: whatever the codes, the weight is zero
        self.bias = _frozen(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "NF4Linear":
        """Quantise a dense layer; the layer itself is left as it is.

        Args:
            linear: the layer.
            block_size: as in the constructor.
            double_quant: as in the constructor.
            compute_dtype: as in the constructor.
            device: where the result is; None: where `linear` is.

        Raises:
            ValueError: the weight has a NaN or Inf, or an argument is wrong.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"NF4Linear.from_linear: linear is {type(linear).__name__}, want an nn.Linear"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            block_size=block_size,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device="meta",
        )
        device = linear.weight.device if device is None else device
        layer._set_weight(nf4_quantize(linear.weight.to(device), block_size, double_quant).tensors)
        if linear.bias is not None:
            layer.bias = _frozen(linear.bias.detach().to(device, copy=True))
        return layer.train(linear.training)

    @property
    def weight_shape(self) -> torch.Size:
        """[out_features, in_features], the shape of the dense weight."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Of the weights that are 4-bit, as the dense layer has them."""
        return ("weight",)

    @property
    def weight_count(self) -> int:
        """How many weights the codes stand for."""
        return self.weight_shape.numel()

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight; it shares the parameters' memory."""
        return NF4Weight(self.tensors(), self.weight_shape)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The dense weight `[out_features, in_features]` in `dtype`, into `out` where given."""
        return nf4_dequantize(self.nf4_weight, dtype, out)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters, by name, in which this layer would store a dense weight.

        Args:
            weight: `[out_features, in_features]`; the layer is left as it is.

        Raises:
            ValueError: another shape or dtype, or a NaN or Inf.
        """
        self._check_dense_shape(weight, self.weight_shape)
        return by_parameter(nf4_quantize(weight, self.block_size, self.double_quant).tensors)

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype, weight: Tensor | None = None) -> nn.Module:
        """The dense layer that this one stands for, in `dtype` and frozen.

        Args:
            dtype: of the weight and the bias.
            weight: `[out_features, in_features]`, in place of the dequantised one: a merged one.

        Returns:
            An nn.Linear; the layers of GPT-2 (`qlora_native.hf`) give transformers' Conv1D.
        """
        if weight is None:
            weight = self.dequantize(dtype)
        self._check_dense_shape(weight, self.weight_shape)
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return self._fill_dense(dense, weight.to(dtype), dtype)

    def requantized(self, weight: Tensor) -> "NF4Linear":
        """The same layer with another weight `[out_features, in_features]`, quantised alike."""
        self._check_dense_shape(weight, self.weight_shape)
        layer = copy.copy(self)
        layer._parameters = dict(self._parameters)
        layer._set_weight(nf4_quantize(weight, self.block_size, self.double_quant).tensors)
        return layer

    def _fill_dense(self, dense: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
        dense.weight = _frozen(weight)
        dense.bias = None if self.bias is None else _frozen(self.bias.to(dtype, copy=True))
        return dense.train(self.training)

    def _check_dense_shape(self, weight: Tensor, shape: torch.Size) -> None:
        if weight.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: the dense weight is {list(weight.shape)}, want "
                f"{list(shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x[..., in_features] -> y[..., out_features], in x's dtype or, if on, autocast's."""
        dtype = self.compute_dtype_for(x)
        x_in_dtype = x if x.dtype == dtype else x.to(dtype)
        y = ops.nf4_linear(x_in_dtype, self.tensors(), self.bias_in(dtype))
        return y if self.compute_dtype is None else y.to(x.dtype)

    def compute_dtype_for(self, x: Tensor) -> torch.dtype:
        """The dtype in which a product with x is done."""
        if self.compute_dtype is not None and x.is_floating_point():
            return self.compute_dtype
        return autocast_dtype(x) or x.dtype

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in `dtype`, if there is one."""
        bias = parameter_of(self, "bias")
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, compute_dtype={self.compute_dtype}"
        )

    def tensors(self) -> NF4Tensors:
        """The weight as the operations take it; looked up at each call, for any may be replaced."""
        return NF4Tensors(
            parameter_of(self, "weight"),
            parameter_of(self, "weight_absmax"),
            parameter_of(self, "weight_nested_absmax"),
            parameter_of(self, "weight_nested_offset"),
            self.out_features,
            self.in_features,
            self.block_size,
        )

    def _set_weight(self, tensors: NF4Tensors) -> None:
        for name, tensor in zip(WEIGHT_PARAMETERS, tensors[:4], strict=True):
            self.register_parameter(name, None if tensor is None else _frozen(tensor))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse a weight that is not bytes: copying would turn floats into codes in silence."""
        if problem := unless_bytes(state_dict, prefix, WEIGHT_PARAMETERS):
            error_msgs.append(
                f"NF4Linear: {problem}; a dense weight is quantised by NF4Linear.from_linear or "
                "quantize_model"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def by_parameter(tensors: NF4Tensors) -> dict[str, Tensor]:
    """The stored tensors by the names that an NF4Linear gives them."""
    named = zip(WEIGHT_PARAMETERS, tensors[:4], strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def unless_bytes(state_dict: dict[str, Any], prefix: str, names: Iterable[str]) -> str | None:
    """What is wrong with the first of these tensors that is not uint8, if any is."""
    for name in names:
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.dtype != torch.uint8:
            return f'"{prefix}{name}" is {tensor.dtype} {list(tensor.shape)}, want uint8'
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives x, or None where it is off.

    Like torch's autocast this leaves integers and float64 alone: the operation refuses them. The
    meta device has no autocast.
    """
    if x.dtype not in FLOAT_DTYPES or x.is_meta:
        return None
    device_type = "cpu" if x.is_cpu else x.device.type  # which makes a string at each call
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def parameter_of(module: nn.Module, name: str) -> Any:
    """`module.name`, a tenth of a microsecond where that is half a one.

    An attribute that is no registered parameter is asked for: FSDP1 and torch.nn.utils.parametrize
    put other things in a parameter's place.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
