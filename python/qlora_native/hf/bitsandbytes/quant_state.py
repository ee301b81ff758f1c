"""What bitsandbytes says of an NF4 weight beside its tensors: a JSON object, stored as bytes.

{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256],
 "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.59375}

The keys come in this order; without nested scales the last three are missing.
"""

import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_native.ops.storage import BLOCK_SIZES, FLOAT_DTYPES, NESTED_BLOCK

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")


class QuantState(NamedTuple):
    """What the JSON object says."""

    block_size: int
    dtype: torch.dtype  # of the weight that was quantised, and of what bitsandbytes dequantises to
    n: int
    k: int
    nested_offset: float | None  # None: the scales are not nested

    @property
    def blocks(self) -> int:
        """How many scales there are."""
        return -(-self.n * self.k // self.block_size)

    def to_tensor(self) -> Tensor:
        """The object's bytes, as bitsandbytes writes them."""
        stored: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.n, self.k],
        }
        if self.nested_offset is not None:
            stored["nested_blocksize"] = NESTED_BLOCK
            stored["nested_dtype"] = "float32"
            stored["nested_offset"] = self.nested_offset
        return torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8, device="cpu")


def read_quant_state(name: str, tensor: Tensor) -> QuantState:
    """The object that is stored under `name`, checked.

    Raises:
        ValueError: it is not what bitsandbytes writes of an NF4 weight of two dimensions.
        NotImplementedError: it is of another kind of quantisation (FP4).
    """
    stored = _read_object(name, tensor)
    kind = stored.get("quant_type")
    if kind != "nf4":
        raise NotImplementedError(f"{name}: quant_type is {kind!r}, want 'nf4'")
    is_nested = any(key in stored for key in _NESTED_KEYS)
    wanted = _KEYS + (_NESTED_KEYS if is_nested else ())
    if set(stored) != set(wanted):
        raise ValueError(f"{name}: its keys are {sorted(stored)}, want {sorted(wanted)}")
    _check_is_one_of(name, stored, "blocksize", BLOCK_SIZES)
    _check_is_one_of(name, stored, "dtype", tuple(_DTYPES))
    shape = stored["shape"]
    is_list = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not is_list or len(shape) != 2:
        raise ValueError(f"{name}: shape is {shape!r}, want [out_features, in_features]")
    offset = None
    if is_nested:
        _check_is_one_of(name, stored, "nested_blocksize", (NESTED_BLOCK,))
        _check_is_one_of(name, stored, "nested_dtype", ("float32",))
        offset = stored["nested_offset"]
        if type(offset) not in (int, float) or not math.isfinite(_rounded(offset)):
            raise ValueError(f"{name}: nested_offset is {offset!r}, want a finite float32")
        offset = _rounded(offset)
    n, k = shape
    return QuantState(stored["blocksize"], _DTYPES[stored["dtype"]], n, k, offset)


def _read_object(name: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)}, want a row of uint8")
    try:
        stored = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{name}: holds a {type(stored).__name__}, want a JSON object")
    return stored


def _check_is_one_of(
    name: str, stored: dict[str, Any], key: str, wanted: tuple[int, ...] | tuple[str, ...]
) -> None:
    value = stored[key]
    # type: True == 1, and 64.0 == 64
    if not any(type(value) is type(one) and value == one for one in wanted):
        raise ValueError(
            f"{name}: {key} is {value!r}, want {' or '.join(str(one) for one in wanted)}"
        )


def _rounded(number: float) -> float:
    """To float32, which bitsandbytes reads it as."""
    try:
        return torch.tensor(float(number), dtype=torch.float32, device="cpu").item()
    except OverflowError:  # an integer beyond any float
        return math.inf
