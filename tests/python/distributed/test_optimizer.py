"""PagedAdamW of sharded parameters: its gradients' placements, and its state."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from rank_models import (
    TOKENS,
    assert_same_parameters,
    make_model,
    optimizer_of,
    shard,
    train,
    trained,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from qlora_native import PagedAdamW, PagedAdamW8bit
from support import same_bits

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def mesh_of_ranks():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def placed(local, *placements):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh_of_ranks(), placements)


# ---- gradients


def step_with_pending_sum() -> None:
    from torch.distributed.tensor import Partial, Replicate

    start = torch.randn(5, 3)
    parts = torch.randn(2, 5, 3)
    expected = nn.Parameter(start.clone())
    expected.grad = parts[0] + parts[1]
    parameter = nn.Parameter(placed(start.clone(), Replicate()))
    parameter.grad = placed(parts[dist.get_rank()], Partial())
    PagedAdamW([expected, parameter], lr=0.1, eps=1.0).step()
    assert same_bits(parameter.to_local(), expected)


def test_a_gradient_that_is_a_pending_sum_is_summed(ranks):
    """As the gradients of a replicated norm are under sequence parallelism."""
    ranks.run(step_with_pending_sum)


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


# ---- state


def refuse_8bit_state() -> None:
    model = shard(make_model())
    before = {name: whole(p) for name, p in model.named_parameters()}
    optimizer = PagedAdamW8bit(trained(model).values(), min_8bit_size=1)
    model(TOKENS).sum().backward()
    with pytest.raises(NotImplementedError, match=r"DTensor; .*use PagedAdamW"):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert same_bits(whole(parameter), before[name])


def test_8bit_state_of_sharded_parameters_is_refused(sharding_ranks):
    sharding_ranks.run(refuse_8bit_state)


def refuse_state_of_another_kind() -> None:
    single = make_model()
    optimizer = optimizer_of(single)
    train(single, [TOKENS], optimizer)
    model = shard(make_model())
    sharded_optimizer = optimizer_of(model)
    train(model, [TOKENS], sharded_optimizer)
    for target, source in ((sharded_optimizer, optimizer), (optimizer, sharded_optimizer)):
        before = {id(p): dict(state) for p, state in target.state.items()}
        expected = r"exp_avg is a .*, the parameter is a .*set_optimizer"
        with pytest.raises(ValueError, match=expected):
            target.load_state_dict(source.state_dict())
        assert {id(p): dict(state) for p, state in target.state.items()} == before


def test_state_of_whole_parameters_is_refused_for_sharded_ones_and_back(sharding_ranks):
    sharding_ranks.run(refuse_state_of_another_kind)


def resume_from_full_state() -> None:
    model = shard(make_model())
    optimizer = optimizer_of(model)
    train(model, [TOKENS, TOKENS + 1], optimizer)
    model_state = get_model_state_dict(model, options=FULL)
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    assert bool(state) == (dist.get_rank() == 0)

    single = make_model()
    single_optimizer = optimizer_of(single)
    train(single, [TOKENS, TOKENS + 1], single_optimizer)
    if dist.get_rank() == 0:  # it holds what one process would
        expected = get_optimizer_state_dict(single, single_optimizer)
        for name, of_parameter in expected["state"].items():
            for key, value in of_parameter.items():
                assert same_bits(state["state"][name][key], value), (name, key)
        for name, value in single.state_dict().items():
            assert same_bits(model_state[name], value), name

    other = shard(make_model())
    other_optimizer = optimizer_of(other)
    set_model_state_dict(other, model_state, options=FROM_RANK_0)
    set_optimizer_state_dict(other, other_optimizer, state, options=FROM_RANK_0)
    train(other, [TOKENS + 2], other_optimizer)
    train(single, [TOKENS + 2], single_optimizer)
    assert_same_parameters(other, single)


def test_training_resumes_from_a_full_state_dict_of_rank_0(sharding_ranks):
    sharding_ranks.run(resume_from_full_state)


def resume_from_sharded_checkpoint(folder) -> None:
    model = shard(make_model())
    optimizer = optimizer_of(model)
    train(model, [TOKENS, TOKENS + 1], optimizer)
    saved = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    for parameter in saved["model"].values():
        assert hasattr(parameter, "to_local"), "each rank writes its part"
    checkpoint.save(saved, checkpoint_id=folder)

    other = shard(make_model())
    other_optimizer = optimizer_of(other)
    loaded = {
        "model": get_model_state_dict(other),
        "optimizer": get_optimizer_state_dict(other, other_optimizer),
    }
    checkpoint.load(loaded, checkpoint_id=folder)
    set_model_state_dict(other, loaded["model"])
    set_optimizer_state_dict(other, other_optimizer, loaded["optimizer"])
    for one, two in ((model, optimizer), (other, other_optimizer)):
        train(one, [TOKENS + 2], two)
    assert_same_parameters(other, model)

    single = make_model()  # a checkpoint of two ranks loads in one process as well
    single_optimizer = optimizer_of(single)
    loaded = {
        "model": get_model_state_dict(single),
        "optimizer": get_optimizer_state_dict(single, single_optimizer),
    }
    checkpoint.load(loaded, checkpoint_id=folder)
    set_model_state_dict(single, loaded["model"])
    set_optimizer_state_dict(single, single_optimizer, loaded["optimizer"])
    train(single, [TOKENS + 2], single_optimizer)
    assert_same_parameters(model, single)


def test_training_resumes_from_a_sharded_checkpoint(sharding_ranks, tmp_path):
    sharding_ranks.run(resume_from_sharded_checkpoint, str(tmp_path / "checkpoint"))
