"""FSDP2 on two processes: sharded 4-bit weights, and factors trained by PagedAdamW."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import ProcessRaisedException

from qlora_native import PagedAdamW, PagedAdamW8bit, add_lora, quantize_model
from support import Model, same_bits

RANKS = 2
STEPS = 3
TOKENS = torch.arange(21).view(3, 7)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = add_lora(quantize_model(Model()), r=4, target_modules=["up", "down"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def train(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The output of each step, and the factors after the last."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = PagedAdamW(trained.values(), lr=1e-2)
    outputs = []
    for _ in range(STEPS):
        y = model(TOKENS)
        outputs.append(y.detach())
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs, {name: whole(p) for name, p in trained.items()}


def whole(tensor: Tensor) -> Tensor:
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().clone()


def check_one_rank(rank: int, init_file: str) -> None:
    torch.set_num_threads(1)
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=RANKS)
    try:
        expected_outputs, expected_factors = train(make_model())

        model = make_model()
        stored = {name: p.detach().clone() for name, p in model.named_parameters()}
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        codes = model.blocks[0].up.base.weight
        assert codes.dtype == torch.uint8
        assert codes.to_local().numel() * RANKS == codes.numel(), "each rank holds its half"

        outputs, factors = train(model)
        for actual, expected in zip(outputs, expected_outputs, strict=True):
            assert same_bits(actual, expected)
        for name, expected in expected_factors.items():
            assert same_bits(factors[name], expected), name
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.uint8:
                assert torch.equal(whole(parameter), stored[name]), name

        optimizer = PagedAdamW8bit(
            [p for p in model.parameters() if p.requires_grad], min_8bit_size=1
        )
        model(TOKENS).sum().backward()
        with pytest.raises(NotImplementedError, match=r"DTensor; .*use PagedAdamW"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.slow
def test_two_ranks_train_to_the_same_bits_as_one_process(tmp_path):
    try:
        torch.multiprocessing.spawn(check_one_rank, (str(tmp_path / "rendezvous"),), nprocs=RANKS)
    except ProcessRaisedException as error:
        if "only Tensors of floating point dtype can require gradients" not in str(error):
            raise
        pytest.skip(f"FSDP2 of torch {torch.__version__} shards no integer parameters")
