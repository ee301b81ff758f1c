"""The small models of the tests on two ranks, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from qlora_native import (
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    add_lora,
    quantize_model,
)
from qlora_native.nn.wrapping import plain_name, unwrapped
from support import Model, same_bits

TOKENS = torch.arange(21).view(3, 7)
LR = 1e-2
IN_8_BITS = (PagedAdamW8bit, PagedLion8bit)
OPTIMIZERS = (PagedAdamW, PagedLion, *IN_8_BITS)
WHOLE_BLOCKS = 128  # a width at which two ranks' shards are whole blocks of 8-bit state


def make_model(width: int = 32, **options: Any) -> nn.Module:
    """A 4-bit model with LoRA whose B is not zero; on each rank and each time the same."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["up", "down"], **options}
    model = add_lora(quantize_model(Model(width)), **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """`fully_shard` on each block and on the model, over both ranks."""
    from torch.distributed.fsdp import fully_shard

    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_of(
    model: nn.Module, optimizer_class: type = PagedAdamW, **options: Any
) -> torch.optim.Optimizer:
    """All of an 8-bit optimiser's state is in 8 bits."""
    if optimizer_class in IN_8_BITS:
        options = {"min_8bit_size": 1, **options}
    return optimizer_class(trained(model).values(), **{"lr": LR, **options})


def loss_of(y: Tensor) -> Tensor:
    return y.float().square().mean()


def train(
    model: nn.Module, batches: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> list[Tensor]:
    """A step for each batch; the output of each."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    outputs = []
    for tokens in batches:
        y = model(tokens)
        outputs.append(y.detach())
        loss_of(y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def whole(tensor: Tensor) -> Tensor:
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().clone()


def assert_same_parameters(actual: nn.Module, expected: nn.Module) -> None:
    """Every parameter, gathered, bit for bit; what wrappers add to the names aside."""
    ours = {plain_name(name): p for name, p in unwrapped(actual).named_parameters()}
    theirs = dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert same_bits(whole(ours[name]), whole(parameter)), name


def refusal_of_bytes() -> str | None:
    """What FSDP2 says against sharding uint8 parameters, or None."""
    from torch.distributed.fsdp import fully_shard

    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    except RuntimeError as error:
        return str(error)
    return None


class CheckpointedModel(nn.Module):
    """A model whose blocks are computed again in backward."""

    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model = model
        self.use_reentrant = use_reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.model.embed(tokens)
        if self.use_reentrant:
            x.requires_grad_()  # or the first block would have no gradient
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.model.lm_head(x)


def train_on_all_batches(
    model: nn.Module,
    batches: Iterable[list[Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """What ranks do with a batch each, in one process: a step for the mean of the gradients."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    for of_ranks in batches:
        for tokens in of_ranks:
            (loss_of(model(tokens)) / len(of_ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
