"""Models that torch has wrapped or sharded: names of layers in them, and what comes too late."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qlora_native.sharding import describe, is_sharded

# What torch.compile, checkpoint_wrapper and FSDP1 call the module that they put themselves around.
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel and torch.compile have wrapped as a whole, if so."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def plain_name(name: str) -> str:
    """A module's name as it was before parts of the model were wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def check_not_distributed(operation: str, model: nn.Module) -> None:
    """Raise ValueError if `model` is in the hands of DDP or FSDP2, which take its layers as final.

    A parameter that comes later has gradients that nobody averages: the ranks would drift apart.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{operation}: the model is wrapped in DistributedDataParallel, which would not "
                f"know of the change; call {operation} before"
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{operation}: {name} {describe(parameter)}, and the change would not be sharded; "
                f"call {operation} before fully_shard"
            )
