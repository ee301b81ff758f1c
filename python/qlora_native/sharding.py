"""Sharded tensors (DTensor, as FSDP2 and tensor parallelism make them), in one place.

A DTensor is known by its `to_local`, so that a process that shards nothing never imports
torch.distributed.tensor.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
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


def as_shard_of(part: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """The sharded tensor of `shape` whose part on this rank is `part`, placed as `like` is.

    It shares the part's memory, also where that is not on the mesh's kind of device, as with
    FSDP2's offloading to the CPU.
    """
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    stride = torch.empty(shape, device="meta").stride()
    if part.device.type == mesh.device_type:
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=stride
        )
    stand_in = torch.empty_like(part, device="meta")
    sharded: Any = DTensor.from_local(
        stand_in.to(mesh.device_type), mesh, placements, run_check=False, shape=shape, stride=stride
    )
    sharded._local_tensor = part  # from_local would copy it to the mesh's device
    return sharded


def shard_index(tensor: Tensor) -> int:
    """Which part of a sharded tensor is this rank's: one number for each, and for its copies."""
    if not is_sharded(tensor):
        return 0
    coordinate, index = tensor.device_mesh.get_coordinate(), 0
    for dimension, placement in enumerate(tensor.placements):
        if not placement.is_replicate():  # also FSDP2's shards of what is sharded already
            index = index * tensor.device_mesh.size(dimension) + coordinate[dimension]
    return index


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


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on the CPU; of a sharded one every rank of its mesh must call."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        # An offloaded part is on the CPU, where the mesh's processes may not talk to each other.
        sharded: Any = tensor.to(tensor.device_mesh.device_type)
        tensor = sharded.full_tensor()
    return tensor.cpu().contiguous()


def copy_whole(whole: Tensor, into: Tensor) -> None:
    """Write a whole tensor into another that may be sharded; each rank takes its part."""
    if is_sharded(into):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = into.device_mesh
        copies = whole.to(into.device, into.dtype)
        everywhere = DTensor.from_local(copies, mesh, [Replicate()] * mesh.ndim, run_check=False)
        whole = everywhere.redistribute(mesh, into.placements)
    into.copy_(whole)


def on_first_rank(tensors: Iterable[Tensor], action: Callable[[], None]) -> None:
    """Run `action` where the first rank of the tensors' mesh is, or here if none is sharded.

    It has run when this returns on any rank, and an error of it is raised on all of them: a
    RuntimeError with its message on the others.

    Raises NotImplementedError for tensors on several meshes.
    """
    meshes = {tensor.device_mesh for tensor in tensors if is_sharded(tensor)}
    if len(meshes) > 1:
        names = ", ".join(sorted(map(str, meshes)))
        raise NotImplementedError(f"the tensors are sharded over several meshes: {names}")
    if not meshes:
        action()
        return
    import torch.distributed as dist

    mesh = meshes.pop()
    here = mesh.get_coordinate()
    error: Exception | None = None
    if not any(here):
        try:
            action()
        except Exception as raised:  # the others wait for news of it
            error = raised
    message = None if error is None else f"{type(error).__name__} on the first rank: {error}"
    for dimension in range(mesh.ndim):
        source = [0 if d == dimension else coordinate for d, coordinate in enumerate(here)]
        news = [message]
        dist.broadcast_object_list(
            news, int(mesh.mesh[tuple(source)]), mesh.get_group(dimension), device=mesh.device_type
        )
        message = news[0]
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(message)
