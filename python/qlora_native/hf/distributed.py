"""What transformers' own distribution of a model while it loads has to do with a 4-bit one."""

from typing import Any


def check_not_distributed_while_loading(config: Any) -> None:
    """Raise NotImplementedError if `from_pretrained` was given a `distributed_config`.

    Its loader hands each rank a part of every tensor of the file, before it is quantised, by plans
    that are made for dense layers.
    """
    given = getattr(config, "distributed_config", None)
    sizes = {name: getattr(given, name, None) for name in ("tp_size", "fsdp_size", "pp_size")}
    if any(size is not None and size > 1 for size in sizes.values()):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
        raise NotImplementedError(
            f"NF4Config: distributed_config has {asked}, but a 4-bit model is not cut up while it "
            "is loaded; load it without, then call torch.distributed.fsdp.fully_shard"
        )
