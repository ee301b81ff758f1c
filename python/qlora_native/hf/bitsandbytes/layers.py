"""Which layers of a bitsandbytes checkpoint are in 4 bits, by the names of its tensors."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from qlora_native.hf.bitsandbytes.format import (
    NESTED_PARTS,
    NESTED_QUANT_MAP,
    QUANT_STATE,
    check_is_nf4,
    is_our_dynamic_map,
)
from qlora_native.hf.bitsandbytes.quant_state import QuantState, read_quant_state


class Layer(NamedTuple):
    """A layer, and its tensors' names without its own."""

    name: str
    parts: tuple[str, ...]


def find_layers(names: Collection[str]) -> list[Layer]:
    """The layers in 4 bits, by name.

    Raises:
        ValueError: a tensor belongs to a 4-bit weight that the file has no quant_state of.
        NotImplementedError: a weight is FP4 or int8, or belongs to no linear layer.
    """
    check_is_nf4(names)
    suffix = f".{QUANT_STATE}"
    layers = [
        Layer(layer, tuple(part for part in NESTED_PARTS if f"{layer}.{part}" in names))
        for layer in sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))
    ]
    known = {f"{layer.name}.{part}" for layer in layers for part in layer.parts}
    scales = tuple(f".{part}" for part in NESTED_PARTS if part != "weight")
    for name in names:
        if name in known:
            continue
        if "quant_state.bitsandbytes__" in name:
            raise NotImplementedError(
                f"{name}: is of a parameter that is no linear layer's weight, want <layer>{suffix}"
            )
        if name.endswith(scales):
            raise ValueError(f"{name}: its weight has no quant_state in the checkpoint")
    return layers


class States(NamedTuple):
    """How the layers of a checkpoint are stored."""

    of: dict[str, QuantState]  # by layer
    block_size: int  # of all
    keep_nested: bool  # whether the scales of all are nested, and can stay so


def read_states(layers: Iterable[Layer], load: Callable[[str], Tensor]) -> States:
    """What the checkpoint says of its layers; `load` gives a tensor by name.

    Raises:
        ValueError: that is not what bitsandbytes writes of NF4 weights of one kind.
        NotImplementedError: a weight is of another kind of quantisation.
    """
    states, with_other_maps = {}, []
    for layer in layers:
        name = f"{layer.name}.{QUANT_STATE}"
        states[layer.name] = read_quant_state(name, load(name))
        if NESTED_QUANT_MAP in layer.parts:
            name = f"{layer.name}.{NESTED_QUANT_MAP}"
            if not is_our_dynamic_map(name, load(name)):
                with_other_maps.append(layer.name)
    block_size, is_nested = shared_settings(states)
    if with_other_maps:
        warnings.warn(
            f"the nested scales of {with_other_maps[0]} and {len(with_other_maps) - 1} more layers "
            "are by a map that was computed on another kind of processor, with other roundings; "
            "all scales are decoded, to the same weights, and take 32 bits instead of 8",
            stacklevel=2,
        )
    return States(states, block_size, is_nested and not with_other_maps)


def shared_settings(states: Mapping[str, QuantState]) -> tuple[int, bool]:
    """The block size of all layers, and whether all scales are nested.

    Raises:
        ValueError: the layers differ; a model is of one kind here, as config.json describes it.
    """
    first: dict[tuple[int, bool], str] = {}
    for name, state in states.items():
        first.setdefault((state.block_size, state.nested_offset is not None), name)
    if len(first) > 1:
        kinds = ", ".join(
            f"{name} has blocks of {block_size} and {'nested' if is_nested else 'plain'} scales"
            for (block_size, is_nested), name in first.items()
        )
        raise ValueError(f"the checkpoint's 4-bit layers differ: {kinds}; want all of one kind")
    if not first:
        raise ValueError("the checkpoint says that it is in 4 bits, and has no 4-bit weight")
    return next(iter(first))
