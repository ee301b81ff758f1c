"""Adapters of models on two ranks: saved once, loaded into shards, and refused when too late."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rank_models import TOKENS, assert_same_parameters, make_model, shard, train, trained, whole
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.parallel import DistributedDataParallel

from qlora_native import LoRALinear, add_lora, merge_lora, quantize_model
from qlora_native.hf import load_lora, save_lora
from qlora_native.sharding import gathered
from support import Block, Model, same_bits, state_bits

WEIGHTS = "adapter_model.safetensors"


class OffloadedShard:
    """What `gathered` asks of a DTensor on the CPU whose mesh is of GPUs that talk by NCCL."""

    device_mesh = SimpleNamespace(device_type="cuda")

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def detach(self) -> OffloadedShard:
        return self

    def to(self, device: str) -> OffloadedShard:
        return OffloadedShard(device)

    def to_local(self) -> torch.Tensor:
        raise AssertionError("a part is not the whole")

    def full_tensor(self) -> torch.Tensor:
        if self.device != self.device_mesh.device_type:
            raise RuntimeError(f"No backend type associated with device type {self.device}")
        return torch.arange(3)


def test_an_offloaded_part_is_gathered_on_the_device_of_its_mesh():
    assert same_bits(gathered(OffloadedShard()), torch.arange(3))


def own_folder(folder: str) -> Path:
    return Path(folder) / str(dist.get_rank())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def save_sharded(folder: str, use_dora: bool) -> None:
    model = shard(make_model(use_dora=use_dora))
    single = make_model(use_dora=use_dora)
    train(model, [TOKENS])
    train(single, [TOKENS])
    own = own_folder(folder)
    save_lora(model, own)
    assert own.exists() == (dist.get_rank() == 0), "only the first rank writes"
    if dist.get_rank() == 0:
        save_lora(single, own / "expected")
        expected = files_of(own / "expected")
        assert files_of(own) == expected
    dist.barrier()

    other = shard(make_model(use_dora=use_dora))
    local = {name: parameter.to_local() for name, parameter in trained(other).items()}
    load_lora(other, Path(folder) / "0")
    assert_same_parameters(other, single)
    for name, parameter in trained(other).items():
        assert same_bits(parameter.to_local(), local[name]), "written where they lie"


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_sharded_adapter_is_written_once_and_loads_into_shards(
    sharding_ranks, tmp_path, use_dora
):
    sharding_ranks.run(save_sharded, str(tmp_path), use_dora)


def save_replicated_shards(folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model, single = shard(make_model(), mesh=mesh), make_model()
    train(model, [TOKENS])
    train(single, [TOKENS])
    assert_same_parameters(model, single)
    save_lora(model, own_folder(folder))
    assert own_folder(folder).exists() == (dist.get_rank() == 0)


def test_of_several_replicas_of_shards_the_first_rank_writes(sharding_ranks, tmp_path):
    sharding_ranks.run(save_replicated_shards, str(tmp_path))


def save_where_one_cannot(folder: str) -> None:
    model = shard(make_model())
    (Path(folder) / "file").write_text("not a folder")
    expected = FileExistsError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(expected, match="file"):
        save_lora(model, Path(folder) / "file")


def test_an_error_of_writing_is_raised_on_every_rank(sharding_ranks, tmp_path):
    sharding_ranks.run(save_where_one_cannot, str(tmp_path))


def save_replicated(folder: str) -> None:
    model, single = DistributedDataParallel(make_model()), make_model()
    train(model, [TOKENS])
    train(single, [TOKENS])
    own = own_folder(folder)
    save_lora(model, own)  # each rank has the whole adapter, and writes what it is told to
    save_lora(single, own / "expected")
    assert files_of(own) == files_of(own / "expected")
    shared = Path(folder) / "shared"
    for _ in range(20):
        save_lora(model, shared)
        assert set(os.listdir(shared)) >= {WEIGHTS, "adapter_config.json"}
        assert len(load_file(shared / WEIGHTS)) == len(trained(single)), "never half a file"
    dist.barrier()
    assert files_of(shared) == files_of(own / "expected")

    other = DistributedDataParallel(make_model())
    assert load_lora(other, shared) is other
    assert_same_parameters(other, single)


def test_of_replicas_each_rank_saves_what_one_process_would(ranks, tmp_path):
    ranks.run(save_replicated, str(tmp_path))


def test_wrapped_blocks_keep_their_names(tmp_path):
    """As accelerate's activation checkpointing wraps them, before FSDP2 shards them."""
    model = make_model()
    save_lora(model, tmp_path / "expected")
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    save_lora(model, tmp_path / "wrapped")
    assert files_of(tmp_path / "wrapped") == files_of(tmp_path / "expected")
    compiled = torch.compile(model, backend="eager")
    save_lora(compiled, tmp_path / "compiled")
    assert files_of(tmp_path / "compiled") == files_of(tmp_path / "expected")

    expected = model(TOKENS)
    for parameter in trained(model).values():
        nn.init.zeros_(parameter.data)
    load_lora(compiled, tmp_path / "expected")
    assert same_bits(model(TOKENS), expected)

    torch.manual_seed(0)
    fresh = quantize_model(Model())
    apply_activation_checkpointing(fresh, check_fn=lambda module: isinstance(module, Block))
    load_lora(fresh, tmp_path / "expected")
    assert same_bits(fresh(TOKENS), expected)


def refuse_changes_of_sharded(folder: str) -> None:
    torch.manual_seed(0)
    save_lora(make_model(), own_folder(folder))
    quantized = shard(quantize_model(Model()))
    equipped = shard(make_model())
    dense = shard(Model())
    before = [whole(p) for model in (quantized, equipped, dense) for p in model.parameters()]
    for operation, call in {
        "quantize_model": lambda: quantize_model(dense),
        "add_lora": lambda: add_lora(quantized, target_modules=["up"]),
        "load_lora": lambda: load_lora(quantized, own_folder(folder)),
        "merge_lora": lambda: merge_lora(equipped),
    }.items():
        with pytest.raises(ValueError, match=rf"{operation}: .* DTensor .*before fully_shard"):
            call()
    after = [whole(p) for model in (quantized, equipped, dense) for p in model.parameters()]
    assert all(map(same_bits, after, before))
    assert not any(isinstance(module, LoRALinear) for module in quantized.modules())


def test_layers_are_not_changed_once_they_are_sharded(sharding_ranks, tmp_path):
    sharding_ranks.run(refuse_changes_of_sharded, str(tmp_path))


def refuse_changes_of_replicated(folder: str) -> None:
    torch.manual_seed(0)
    save_lora(make_model(), own_folder(folder))
    quantized = quantize_model(Model())
    quantized.lm_head.requires_grad_()
    quantized = DistributedDataParallel(quantized)
    equipped = DistributedDataParallel(make_model())
    dense = DistributedDataParallel(Model())
    before = [state_bits(model) for model in (quantized, equipped, dense)]
    for operation, call in {
        "quantize_model": lambda: quantize_model(dense),
        "add_lora": lambda: add_lora(quantized, target_modules=["up"]),
        "load_lora": lambda: load_lora(quantized, own_folder(folder)),
        "merge_lora": lambda: merge_lora(equipped),
    }.items():
        with pytest.raises(ValueError, match=rf"{operation}: .*DistributedDataParallel.*before"):
            call()
    assert [state_bits(model) for model in (quantized, equipped, dense)] == before


def test_layers_are_not_changed_once_ddp_has_them(ranks, tmp_path):
    ranks.run(refuse_changes_of_replicated, str(tmp_path))
