"""NF4AsLinear: an NF4Linear that PEFT's tuners can take for an nn.Linear, and read as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qlora_native.nf4_weight import NF4Weight
from qlora_native.nn import NF4Linear
from qlora_native.nn.nf4_linear import parameter_of

# Assignments, which reach no operation.
_REPLACES = (Tensor.data.__set__, Tensor.grad.__set__)
_TRAINS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)


class ReadOnlyWeightError(NotImplementedError):
    """Something would have written to a 4-bit weight as if it were dense."""


class DequantizedWeight(Tensor):
    """The dense weight [out_features, in_features] of an NF4 layer, to be read and not written.

    It has no memory of its own: shape, dtype and device are known, and an operation that needs the
    numbers dequantises them for itself. What it would write raises `ReadOnlyWeightError`; in a
    plain temporary tensor the change would be lost without a word. Its views are of this type too,
    and hold the numbers.
    """

    source: NF4Weight | Tensor

    @staticmethod
    def __new__(cls, source: NF4Weight | Tensor, dtype: torch.dtype) -> "DequantizedWeight":
        """The weight `source` in `dtype`, or a part of one that has been dequantised."""
        layout = {}
        if isinstance(source, Tensor):
            layout = {"strides": source.stride(), "storage_offset": source.storage_offset()}
        weight = Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=dtype, device=source.device, **layout
        )
        weight.source = source
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse to have its data replaced or to be trained; the rest is `__torch_dispatch__`'s."""
        if func in _REPLACES:
            raise _read_only("replaced", args[0])
        if func in _TRAINS and (len(args) < 2 or args[1]):
            raise _read_only("trained", args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute with the dense weight."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:  # `.data` is one, and may be asked for its shape
            return cls(args[0].source, args[0].dtype)
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(given, cls) and argument.alias_info and argument.alias_info.is_write:
                raise _read_only(f"changed by {func}", given)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        result = func(*args, **kwargs)
        returned = func._schema.returns
        if any(each.alias_info and not each.alias_info.is_write for each in returned):
            return tree_map_only(Tensor, lambda view: cls(view, view.dtype), result)
        return result

    def dense(self) -> Tensor:
        """The numbers, as a plain tensor."""
        if isinstance(self.source, Tensor):
            return self.source
        return self.source.dequantize(self.dtype)

    def __repr__(self) -> str:
        return f"DequantizedWeight({list(self.shape)}, {self.dtype}, device='{self.device}')"


class NF4AsLinear(NF4Linear, nn.Linear):
    """An NF4Linear with the face of an nn.Linear: `weight` reads as the dense weight.

    PEFT's tuners look for an nn.Linear and ask its `weight` for shape, dtype, device and sometimes
    numbers. A layer becomes one by `show`, which changes its class and nothing else: the parameters
    (what `parameters`, `state_dict`, `.to` and FSDP2 see), the module's identity and its forward
    are those of the NF4Linear. `hide` turns it back.
    """

    dense_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight in `dense_dtype`, which is the dtype of a dense layer of the model.

        While FSDP2 has it sharded, it is FSDP2's own parameter: that asks for it by this name, and
        a DTensor does not mix with the plain tensors of a tuner that would compute with it.
        """
        codes: Tensor = parameter_of(self, "weight")
        if hasattr(codes, "to_local"):
            return codes
        return DequantizedWeight(self.nf4_weight, self.dense_dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a dense weight in the place of the codes."""
        self._check_codes(name, param)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        """Let PEFT assign a layer its own weight, as it does when it takes its layers out."""
        if name == "weight":
            source = getattr(value, "source", None)
            if isinstance(source, NF4Weight) and source.codes is parameter_of(self, "weight"):
                return
            self._check_codes(name, value)
        super().__setattr__(name, value)

    def _check_codes(self, name: str, value: Tensor | None) -> None:
        if name == "weight" and (value is None or value.dtype != torch.uint8):
            raise _read_only("replaced", DequantizedWeight(self.nf4_weight, self.dense_dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4AsLinear":
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        return super()._apply(fn, recurse)


def show(layer: NF4Linear, dtype: torch.dtype) -> None:
    """Give `layer` the face of an nn.Linear whose weight is in `dtype`."""
    layer.__class__ = NF4AsLinear
    layer.dense_dtype = dtype


def hide(layer: NF4AsLinear) -> None:
    """Make it an NF4Linear again."""
    layer.__dict__.pop("dense_dtype", None)
    layer.__class__ = NF4Linear


def _read_only(what: str, view: DequantizedWeight) -> ReadOnlyWeightError:
    return ReadOnlyWeightError(
        f"the weight of an NF4 layer {list(view.shape)} would be {what}; it is stored in 4 bits "
        "and can be read alone"
    )
