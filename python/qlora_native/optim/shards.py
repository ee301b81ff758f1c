"""Which sharded parameters can have 8-bit state."""

from torch import Tensor

from qlora_native.optim.state_kind import BLOCK
from qlora_native.sharding import describe


def check_shards(name: str, param: Tensor) -> None:
    """Raise NotImplementedError unless 8-bit state can be cut as a sharded parameter is.

    Each rank's part must be whole blocks of 256 elements of the whole parameter, and equally many:
    then the scales are a tensor that is cut in the same places, and state can be gathered, saved
    and cut for another number of ranks.
    """
    which = (
        f"{name}: a parameter of shape {list(param.shape)} {describe(param)}, and its 8-bit state"
    )
    hint = "use the 32-bit optimiser, or a larger min_8bit_size"
    parts = 1
    for dimension, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0) or parts > 1:
            raise NotImplementedError(f"{which} can only be cut once, along dimension 0; {hint}")
        parts = param.device_mesh.size(dimension)
    if parts > 1 and (param.shape[0] % parts or param.numel() // parts % BLOCK):
        raise NotImplementedError(
            f"{which} would have blocks of {BLOCK} elements that straddle shards; {hint}"
        )
