"""Which layers of a bitsandbytes checkpoint are in 4 bits, by the names of its tensors."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from qlora_native.hf.bitsandbytes.format import NESTED_PARTS, QUANT_STATE, check_is_nf4
from qlora_native.hf.bitsandbytes.quant_state import QuantState


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
