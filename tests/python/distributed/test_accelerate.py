"""accelerate on two ranks: prepare, checkpoints of every kind, and the adapter at the end."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_models import (
    OPTIMIZERS,
    TOKENS,
    WHOLE_BLOCKS,
    assert_same_parameters,
    loss_of,
    make_model,
    optimizer_of,
    train_on_all_batches,
)
from safetensors.torch import load_file

from qlora_native import PagedAdamW
from qlora_native.hf import save_lora
from support import same_bits

pytest.importorskip("accelerate")

BATCHES = [[TOKENS + 5 * step + 11 * rank for rank in (0, 1)] for step in range(4)]


def make_accelerator(kind: str, **options):
    """An Accelerator on this rank's CPU, which it is told is a GPU where it should shard."""
    from accelerate import Accelerator, state
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    if kind == "ddp":
        return Accelerator(cpu=True, **options)
    state.PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=kind == "from-rank-0",
        activation_checkpointing=kind == "checkpointing",
        state_dict_type="FULL_STATE_DICT" if kind == "full" else "SHARDED_STATE_DICT",
    )
    return Accelerator(fsdp_plugin=plugin, **options)


def step(accelerator, model, optimizer, tokens: torch.Tensor) -> None:
    accelerator.backward(loss_of(model(tokens)))
    optimizer.step()
    optimizer.zero_grad()


def train_and_resume(folder: str, kind: str, optimizer_class: type = PagedAdamW) -> None:
    from accelerate import state

    single = make_model(WHOLE_BLOCKS)
    expected_optimizer = optimizer_of(single, optimizer_class)
    accelerator = make_accelerator(kind)
    model = make_model(WHOLE_BLOCKS)
    if kind == "from-rank-0" and dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    model, optimizer = accelerator.prepare(model, optimizer_of(model, optimizer_class))
    assert ("FSDP" in type(model).__name__) == (kind != "ddp")
    own = [of_ranks[dist.get_rank()] for of_ranks in BATCHES]

    for tokens in own[:2]:
        step(accelerator, model, optimizer, tokens)
    accelerator.save_state(f"{folder}/checkpoint")
    accelerator.wait_for_everyone()
    for tokens in own[2:]:
        step(accelerator, model, optimizer, tokens)
    train_on_all_batches(single, BATCHES, expected_optimizer)
    assert_same_parameters(model, single)

    accelerator.load_state(f"{folder}/checkpoint")
    for tokens in own[2:]:
        step(accelerator, model, optimizer, tokens)
    assert_same_parameters(model, single)

    unwrapped = accelerator.unwrap_model(model)
    save_lora(unwrapped, Path(folder) / "adapter")
    if accelerator.is_main_process:
        save_lora(single, Path(folder) / "expected")
        ours, theirs = (
            load_file(Path(folder) / name / "adapter_model.safetensors")
            for name in ("adapter", "expected")
        )
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["ddp", "sharded", "full", "from-rank-0", "checkpointing"])
def test_a_prepared_model_trains_resumes_and_saves(request, ranks, tmp_path, kind):
    if kind != "ddp":
        request.getfixturevalue("sharding_ranks")
    ranks.run(train_and_resume, str(tmp_path), kind)


@pytest.mark.parametrize("kind", ["ddp", "sharded", "full"])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS[1:])
def test_each_optimiser_steps_the_parameters_that_take_the_place_of_its_own(
    request, ranks, tmp_path, kind, optimizer_class
):
    """Sharding makes others after the optimiser was made."""
    if kind != "ddp":
        request.getfixturevalue("sharding_ranks")
    ranks.run(train_and_resume, str(tmp_path), kind, optimizer_class)
