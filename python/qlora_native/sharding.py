"""Sharded tensors (DTensor, as FSDP2 and tensor parallelism make them), in one place.

A DTensor is known by its `to_local`, so that a process that shards nothing never imports
torch.distributed.tensor.
"""

from typing import Any

from torch import Tensor

from qlora_native.ops.storage import PLAIN_TYPES


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part or a copy."""
    return type(tensor) not in PLAIN_TYPES and hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, and any other tensor itself; it shares its memory."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.to_local()
    # A collective may still be writing it (AsyncCollectiveTensor).
    return part.wait() if hasattr(part, "trigger_wait") else part


def as_placed(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the placement of `like`, both sharded over one mesh, or both not sharded.

    Where the placements differ this is a collective: every rank of the mesh must call.
    """
    if not is_sharded(tensor) or tensor.placements == like.placements:
        return tensor
    placed: Tensor = tensor.redistribute(like.device_mesh, like.placements)
    return placed


def describe(tensor: Tensor) -> str:
    """What an error says of where a tensor is."""
    if not is_sharded(tensor):
        return "is a plain tensor"
    places, mesh = tensor.placements, tensor.device_mesh
    return f"is a DTensor placed {places} on {mesh}"
