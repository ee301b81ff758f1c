"""Steps of sharded parameters: as those of whole ones, whatever the gradients' placements."""

import pytest
import torch
import torch.distributed as dist
from rank_models import (
    IN_8_BITS,
    OPTIMIZERS,
    TOKENS,
    WHOLE_BLOCKS,
    assert_same_parameters,
    make_model,
    optimizer_of,
    shard,
    train,
    trained,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from qlora_native import PagedAdamW, PagedLion
from support import same_bits


def mesh_of_ranks():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def placed(local, *placements):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh_of_ranks(), placements)


# ---- steps


def train_as_one_process(optimizer_class: type) -> None:
    single, model = make_model(WHOLE_BLOCKS), shard(make_model(WHOLE_BLOCKS))
    optimizers = [optimizer_of(m, optimizer_class) for m in (single, model)]
    for m, optimizer in zip((single, model), optimizers, strict=True):
        train(m, [TOKENS, TOKENS + 1, TOKENS + 2], optimizer)
    assert_same_parameters(model, single)
    for p, q in zip(trained(single).values(), trained(model).values(), strict=True):
        expected, state = optimizers[0].state[p], optimizers[1].state[q]
        assert expected.keys() == state.keys()
        for name, value in expected.items():
            assert same_bits(whole(state[name]), value), name
    here = optimizers[1].paging_report().bytes
    assert 0.49 < here / optimizers[0].paging_report().bytes < 0.52  # a half of each


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_shards_are_stepped_as_the_whole_is(sharding_ranks, optimizer_class):
    sharding_ranks.run(train_as_one_process, optimizer_class)


def refuse_straddling_blocks(optimizer_class: type) -> None:
    model = shard(make_model())
    before = {name: whole(p) for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, optimizer_class)
    model(TOKENS).sum().backward()
    message = (
        rf"{optimizer_class.__name__}: a parameter of shape \[4, 32\] .*blocks of 256 elements "
        "that straddle shards; use the 32-bit optimiser, or a larger min_8bit_size"
    )
    with pytest.raises(NotImplementedError, match=message):
        optimizer.step()
    assert not optimizer.state
    for name, parameter in model.named_parameters():
        assert same_bits(whole(parameter), before[name])


@pytest.mark.parametrize("optimizer_class", IN_8_BITS)
def test_blocks_of_8bit_state_that_straddle_shards_are_refused(sharding_ranks, optimizer_class):
    sharding_ranks.run(refuse_straddling_blocks, optimizer_class)


def refuse_columns(optimizer_class: type) -> None:
    from torch.distributed.tensor import Shard

    parameter = nn.Parameter(placed(torch.ones(512, 4), Shard(1)))
    parameter.grad = placed(torch.ones(512, 4), Shard(1))
    optimizer = optimizer_class([parameter], min_8bit_size=1)
    with pytest.raises(NotImplementedError, match="only be cut once, along dimension 0"):
        optimizer.step()
    assert (parameter.to_local() == 1).all()


@pytest.mark.parametrize("optimizer_class", IN_8_BITS)
def test_8bit_state_of_columns_is_refused(ranks, optimizer_class):
    ranks.run(refuse_columns, optimizer_class)


def round_stochastically(optimizer_class: type) -> None:
    """Of a parameter of ones, which all ranks step alike but for the rounding."""
    from torch.distributed.tensor import Replicate, Shard

    results = []
    for placement in (Replicate(), Shard(0)):
        parameter = nn.Parameter(placed(torch.ones(4096, dtype=torch.bfloat16), placement))
        torch.manual_seed(7)
        optimizer = optimizer_class([parameter], lr=4e-3, stochastic_rounding=True)
        for _ in range(2):
            parameter.grad = placed(torch.ones(4096, dtype=torch.bfloat16), placement)
            optimizer.step()
        parts = [torch.empty(4096, dtype=torch.bfloat16) for _ in range(2)]
        dist.all_gather(parts, parameter.detach().to_local())
        assert len(parts[0].unique()) > 1
        results.append(parts)
    copies, shards = results
    assert same_bits(*copies)
    assert not same_bits(*shards)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_copies_round_alike_and_shards_each_in_its_own_way(ranks, optimizer_class):
    ranks.run(round_stochastically, optimizer_class)


# ---- gradients


def step_with_pending_sum(optimizer_class: type) -> None:
    from torch.distributed.tensor import Partial, Replicate

    start = torch.randn(5, 3)
    parts = torch.randn(2, 5, 3)
    expected = nn.Parameter(start.clone())
    expected.grad = parts[0] + parts[1]
    parameter = nn.Parameter(placed(start.clone(), Replicate()))
    parameter.grad = placed(parts[dist.get_rank()], Partial())
    optimizer_class([expected, parameter], lr=0.1, weight_decay=0.1).step()
    assert same_bits(parameter.to_local(), expected)


@pytest.mark.parametrize("optimizer_class", [PagedAdamW, PagedLion])
def test_a_gradient_that_is_a_pending_sum_is_summed(ranks, optimizer_class):
    """As the gradients of a replicated norm are under sequence parallelism."""
    ranks.run(step_with_pending_sum, optimizer_class)


def train_tensor_parallel() -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))

    x = torch.randn(8, 6)
    results = []
    for optimizer_class in (PagedAdamW, torch.optim.AdamW):
        model = make()
        plan = {
            "0": SequenceParallel(sequence_dim=0),
            "1": ColwiseParallel(input_layouts=Shard(0)),
            "3": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh_of_ranks(), plan)
        optimizer = optimizer_class(model.parameters(), lr=0.1, eps=0.1)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([whole(p) for p in model.parameters()])
    for actual, expected in zip(*results, strict=True):
        # The two round differently, by some units in the last place a step.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_tensor_parallel_parameters_are_stepped_as_torch_steps_them(ranks):
    ranks.run(train_tensor_parallel)


def refuse_gradients_of_another_kind() -> None:
    from torch.distributed.tensor import Partial, Replicate

    plain = nn.Parameter(torch.ones(4))
    sharded = nn.Parameter(placed(torch.ones(4), Replicate()))
    for parameter, grad in ((plain, sharded), (sharded, plain)):
        fresh = nn.Parameter(parameter.detach().clone())
        fresh.grad = grad.detach().clone()
        with pytest.raises(ValueError, match=r"a gradient is a .*, its parameter is a .*want both"):
            PagedAdamW([fresh]).step()
    pending = nn.Parameter(placed(torch.ones(4), Partial()))
    pending.grad = placed(torch.ones(4), Partial())
    with pytest.raises(NotImplementedError, match="a DTensor with a sum pending"):
        PagedAdamW([pending]).step()


def test_a_gradient_placed_otherwise_than_its_parameter_is_refused(ranks):
    ranks.run(refuse_gradients_of_another_kind)
