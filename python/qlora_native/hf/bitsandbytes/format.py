"""The tensors that bitsandbytes stores of an NF4 layer, to and from this library's.

Under a layer's name, with blocks = ceil(n * k / blocksize):

    weight                    codes [ceil(n * k / 2), 1] in uint8, or these bytes as another dtype
    weight.absmax             fp32 [blocks]; nested: uint8 [blocks], codes of the dynamic map
    weight.quant_map          fp32 [16], the NF4 levels
    weight.nested_absmax      nested: fp32 [ceil(blocks / 256)]
    weight.nested_quant_map   nested: fp32 [256], the dynamic map
    weight.quant_state.bitsandbytes__nf4   uint8, what `quant_state` describes

Codes and scales are this library's, byte for byte. The two maps are the same for every weight, and
here they are checked, for this library has no others. The dynamic map is computed by bitsandbytes
with torch where the weight is quantised, and torch rounds some of its entries in another way on a
processor without AVX2. Scales by such a map are decoded by it, and are plain here.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_native import ops
from qlora_native.hf.bitsandbytes.quant_state import QuantState, read_quant_state
from qlora_native.ops.storage import NESTED_BLOCK, NF4Tensors, empty_nf4_tensors

WEIGHT = "weight"
ABSMAX = "weight.absmax"
QUANT_MAP = "weight.quant_map"
NESTED_ABSMAX = "weight.nested_absmax"
NESTED_QUANT_MAP = "weight.nested_quant_map"
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
PLAIN_PARTS = (WEIGHT, ABSMAX, QUANT_MAP, QUANT_STATE)
NESTED_PARTS = (WEIGHT, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_STATE)

FP4_STATE = "quant_state.bitsandbytes__fp4"
INT8_SCALES = "SCB"

# Twice what torch's linspace has been seen to differ by, in units in the last place.
_MAP_ULPS = 4

# bitsandbytes' `quant_storage`: FSDP wants all parameters to have one dtype, so that the codes'
# bytes may be stored as numbers of it.
STORAGE_DTYPES = (
    torch.uint8,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int8,
    torch.float64,
)


class StoredWeight(NamedTuple):
    """A weight, and how bitsandbytes keeps it."""

    tensors: NF4Tensors
    dtype: torch.dtype  # that bitsandbytes dequantises to
    storage: torch.dtype  # that the codes' bytes are stored as


def read_weight(layer: str, parts: Mapping[str, Tensor], keep_nested: bool = True) -> StoredWeight:
    """The weight of a layer; the codes share the memory of the part that they come from.

    Args:
        layer: its name, for messages.
        parts: its tensors by the names above.
        keep_nested: leave nested scales as they are, if they are by this library's dynamic map;
            False: decode them, which gives the same weights.

    Raises:
        ValueError: a part is missing, or is not what the format wants.
        NotImplementedError: the weight is FP4 or int8.
    """
    check_is_nf4(f"{layer}.{part}" for part in parts)
    if QUANT_STATE not in parts:
        raise ValueError(f"{layer}.{QUANT_STATE}: is missing, beside {sorted(parts)}")
    state = read_quant_state(f"{layer}.{QUANT_STATE}", parts[QUANT_STATE])
    is_nested = state.nested_offset is not None
    wanted = NESTED_PARTS if is_nested else PLAIN_PARTS
    if set(parts) != set(wanted):
        raise ValueError(
            f"{layer}: has {sorted(parts)}, want {sorted(wanted)}: its quant_state says that the "
            f"scales are {'nested' if is_nested else 'plain'}"
        )
    storage = parts[WEIGHT].dtype
    if storage not in STORAGE_DTYPES:
        raise ValueError(f"{layer}.{WEIGHT}: is {storage}, want one of {STORAGE_DTYPES}")
    code_bytes, rest = divmod((state.n * state.k + 1) // 2, storage.itemsize)
    if rest:
        raise ValueError(
            f"{layer}.{WEIGHT}: is {storage}, of which no whole number holds the codes of "
            f"{state.n} × {state.k} weights"
        )
    nested_blocks = -(-state.blocks // NESTED_BLOCK)
    wants = {
        WEIGHT: (storage, [code_bytes, 1]),
        ABSMAX: (torch.uint8 if is_nested else torch.float32, [state.blocks]),
        QUANT_MAP: (torch.float32, [16]),
        NESTED_ABSMAX: (torch.float32, [nested_blocks]),
        NESTED_QUANT_MAP: (torch.float32, [256]),
    }
    for name, (dtype, shape) in wants.items():
        part = parts.get(name)
        if part is not None and (part.dtype != dtype or list(part.shape) != shape):
            raise ValueError(
                f"{layer}.{name}: is {part.dtype} {list(part.shape)}, want {dtype} {shape}: its "
                f"quant_state says {state.n} × {state.k} weights in blocks of {state.block_size}"
            )
    _check_map(f"{layer}.{QUANT_MAP}", parts[QUANT_MAP], nf4_levels(), "the NF4 levels")
    _check_finite(f"{layer}.{ABSMAX}", parts[ABSMAX])
    if is_nested:
        name = f"{layer}.{NESTED_QUANT_MAP}"
        _check_finite(f"{layer}.{NESTED_ABSMAX}", parts[NESTED_ABSMAX])
        if not is_our_dynamic_map(name, parts[NESTED_QUANT_MAP]) or not keep_nested:
            parts = {**parts, ABSMAX: _decoded_scales(parts, state)}
            state = state._replace(nested_offset=None)
    return StoredWeight(_our_tensors(parts, state), state.dtype, storage)


def write_weight(weight: StoredWeight) -> dict[str, Tensor]:
    """The parts of a weight, as `read_weight` takes them and in bitsandbytes' order.

    Also of tensors on the meta device, all but the offset of nested scales.

    Raises:
        ValueError: `weight.storage` is none of STORAGE_DTYPES, or its numbers do not hold the codes
            exactly.
    """
    tensors, dtype, storage = weight
    if storage not in STORAGE_DTYPES:
        raise ValueError(f"quant_storage is {storage}, want one of {STORAGE_DTYPES}")
    if tensors.codes.numel() % storage.itemsize:
        raise ValueError(
            f"quant_storage is {storage}, of which no whole number holds the codes of "
            f"{tensors.n} × {tensors.k} weights; torch.uint8 does"
        )
    is_nested = tensors.nested_absmax is not None
    device = tensors.codes.device
    parts = {
        WEIGHT: tensors.codes.reshape(-1).view(storage)[:, None],
        ABSMAX: tensors.absmax if is_nested else _as_float32(tensors.absmax),
        QUANT_MAP: nf4_levels().to(device, copy=True),
    }
    offset = None
    if tensors.nested_absmax is not None and tensors.nested_offset is not None:
        parts[NESTED_ABSMAX] = _as_float32(tensors.nested_absmax)
        parts[NESTED_QUANT_MAP] = dynamic_map().to(device, copy=True)
        offset = _as_float32(tensors.nested_offset).item()
    parts[QUANT_STATE] = QuantState(
        tensors.block_size, dtype, tensors.n, tensors.k, offset
    ).to_tensor()
    return parts


def check_is_nf4(names: Iterable[str]) -> None:
    """Refuse weights of another kind of quantisation by the names of their parts."""
    for name in names:
        if name.endswith(FP4_STATE):
            raise NotImplementedError(f"{name}: is of an FP4 weight, want NF4")
        if name.rpartition(".")[2] == INT8_SCALES:
            raise NotImplementedError(f"{name}: is of an LLM.int8() weight, want NF4")


def is_our_dynamic_map(name: str, stored: Tensor) -> bool:
    """Whether a nested_quant_map has this library's bits; False: it is rounded in another way.

    Raises:
        ValueError: it is another map; `name` is its.
    """
    stored = stored.cpu()
    if stored.dtype != torch.float32 or list(stored.shape) != [256]:
        raise ValueError(f"{name}: is {stored.dtype} {list(stored.shape)}, want float32 [256]")
    distance = (stored.view(torch.int32).long() - dynamic_map().view(torch.int32).long()).abs()
    if distance.max() > _MAP_ULPS:
        _check_map(name, stored, dynamic_map(), "the signed dynamic map")
    return not bool(distance.any())


@cache
def nf4_levels() -> Tensor:
    """fp32 [16], as the core decodes the codes 0 to 15."""
    tensors = empty_nf4_tensors(1, 16, 32, double_quant=False, device="cpu")
    tensors.codes.copy_(torch.arange(0x01, 0x100, 0x22, dtype=torch.uint8, device="cpu"))
    _as_float32(tensors.absmax, copy=False).fill_(1.0)
    return ops.dequantize(tensors, torch.float32).flatten()


@cache
def dynamic_map() -> Tensor:
    """fp32 [256], as the core decodes the scale codes 0 to 255."""
    tensors = empty_nf4_tensors(1, 256 * 32, 32, double_quant=True, device="cpu")
    tensors.absmax.copy_(torch.arange(256, dtype=torch.uint8, device="cpu"))
    assert tensors.nested_absmax is not None
    assert tensors.nested_offset is not None
    _as_float32(tensors.nested_absmax, copy=False).fill_(1.0)
    _as_float32(tensors.nested_offset, copy=False).fill_(0.0)
    return ops.dequantize_absmax(tensors)


def _decoded_scales(parts: Mapping[str, Tensor], state: QuantState) -> Tensor:
    """fp32 [blocks]: map[code] * nested_absmax + offset, as bitsandbytes rounds it."""
    scales = parts[NESTED_QUANT_MAP][parts[ABSMAX].long()]
    groups = parts[NESTED_ABSMAX].repeat_interleave(NESTED_BLOCK)[: state.blocks]
    return scales.mul_(groups).add_(
        torch.tensor(state.nested_offset, dtype=torch.float32, device="cpu")
    )


def _our_tensors(parts: Mapping[str, Tensor], state: QuantState) -> NF4Tensors:
    n, k, block_size = state.n, state.k, state.block_size
    is_nested = state.nested_offset is not None
    shapes = empty_nf4_tensors(n, k, block_size, is_nested, device="meta")
    absmax = parts[ABSMAX].contiguous().view(torch.uint8).view(shapes.absmax.shape)
    nested_absmax = nested_offset = None
    if state.nested_offset is not None and shapes.nested_absmax is not None:
        nested_absmax = parts[NESTED_ABSMAX].contiguous().view(torch.uint8)
        nested_absmax = nested_absmax.view(shapes.nested_absmax.shape)
        offset = torch.tensor([state.nested_offset], dtype=torch.float32, device="cpu")
        nested_offset = offset.view(torch.uint8).to(absmax.device)
    codes = parts[WEIGHT].contiguous().view(torch.uint8).view(shapes.codes.shape)
    return NF4Tensors(codes, absmax, nested_absmax, nested_offset, n, k, block_size)


def _as_float32(scales: Tensor, copy: bool = True) -> Tensor:
    """The numbers that rows of 4 bytes are; copied, unless the bytes are known to be aligned."""
    return (scales.clone() if copy else scales).view(torch.float32).flatten()


def _check_map(name: str, stored: Tensor, wanted: Tensor, what: str) -> None:
    stored = stored.cpu()
    differs = (stored.view(torch.int32) != wanted.view(torch.int32)).nonzero().flatten()
    if len(differs):
        i = int(differs[0])
        raise ValueError(
            f"{name}: is not {what}: entry {i} is {stored[i].item()}, want {wanted[i].item()}"
        )


def _check_finite(name: str, scales: Tensor) -> None:
    if scales.is_floating_point() and not bool(scales.isfinite().all()):
        raise ValueError(f"{name}: has a NaN or Inf, want finite scales")
