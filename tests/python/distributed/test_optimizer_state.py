"""State of sharded parameters: whole and in shards, saved, cut and gathered."""

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from rank_models import (
    OPTIMIZERS,
    TOKENS,
    WHOLE_BLOCKS,
    assert_same_parameters,
    make_model,
    optimizer_of,
    shard,
    train,
    whole,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from support import same_bits

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

over_optimizers = pytest.mark.parametrize("optimizer_class", OPTIMIZERS)


def refuse_state_of_another_kind(optimizer_class: type) -> None:
    single = make_model(WHOLE_BLOCKS)
    optimizer = optimizer_of(single, optimizer_class)
    train(single, [TOKENS], optimizer)
    model = shard(make_model(WHOLE_BLOCKS))
    sharded_optimizer = optimizer_of(model, optimizer_class)
    train(model, [TOKENS], sharded_optimizer)
    for target, source in ((sharded_optimizer, optimizer), (optimizer, sharded_optimizer)):
        before = {id(p): {k: v.clone() for k, v in s.items()} for p, s in target.state.items()}
        expected = r"exp_avg is a .*, the parameter is a .*set_optimizer"
        with pytest.raises(ValueError, match=expected):
            target.load_state_dict(source.state_dict())
        assert {id(p) for p in target.state} == before.keys()
        for p, s in target.state.items():
            assert all(same_bits(whole(v), whole(before[id(p)][k])) for k, v in s.items())


@over_optimizers
def test_state_of_whole_parameters_is_refused_for_sharded_ones_and_back(
    sharding_ranks, optimizer_class
):
    sharding_ranks.run(refuse_state_of_another_kind, optimizer_class)


def resume_from_full_state(optimizer_class: type) -> None:
    model = shard(make_model(WHOLE_BLOCKS))
    optimizer = optimizer_of(model, optimizer_class)
    train(model, [TOKENS, TOKENS + 1], optimizer)
    model_state = get_model_state_dict(model, options=FULL)
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    assert bool(state) == (dist.get_rank() == 0)

    single = make_model(WHOLE_BLOCKS)
    single_optimizer = optimizer_of(single, optimizer_class)
    train(single, [TOKENS, TOKENS + 1], single_optimizer)
    if dist.get_rank() == 0:  # it holds what one process would
        expected = get_optimizer_state_dict(single, single_optimizer)
        for name, of_parameter in expected["state"].items():
            for key, value in of_parameter.items():
                assert same_bits(state["state"][name][key], value), (name, key)
        for name, value in single.state_dict().items():
            assert same_bits(model_state[name], value), name

    other = shard(make_model(WHOLE_BLOCKS))
    other_optimizer = optimizer_of(other, optimizer_class)
    set_model_state_dict(other, model_state, options=FROM_RANK_0)
    set_optimizer_state_dict(other, other_optimizer, state, options=FROM_RANK_0)
    train(other, [TOKENS + 2], other_optimizer)
    train(single, [TOKENS + 2], single_optimizer)
    assert_same_parameters(other, single)


@over_optimizers
def test_training_resumes_from_a_full_state_dict_of_rank_0(sharding_ranks, optimizer_class):
    sharding_ranks.run(resume_from_full_state, optimizer_class)


def resume_from_sharded_checkpoint(optimizer_class: type, folder: str) -> None:
    model = shard(make_model(WHOLE_BLOCKS))
    optimizer = optimizer_of(model, optimizer_class)
    train(model, [TOKENS, TOKENS + 1], optimizer)
    saved = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    for parameter in saved["model"].values():
        assert hasattr(parameter, "to_local"), "each rank writes its part"
    checkpoint.save(saved, checkpoint_id=folder)

    other = shard(make_model(WHOLE_BLOCKS))
    other_optimizer = optimizer_of(other, optimizer_class)
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

    single = make_model(WHOLE_BLOCKS)  # a checkpoint of two ranks loads in one process as well
    single_optimizer = optimizer_of(single, optimizer_class)
    loaded = {
        "model": get_model_state_dict(single),
        "optimizer": get_optimizer_state_dict(single, single_optimizer),
    }
    checkpoint.load(loaded, checkpoint_id=folder)
    set_model_state_dict(single, loaded["model"])
    set_optimizer_state_dict(single, single_optimizer, loaded["optimizer"])
    train(single, [TOKENS + 2], single_optimizer)
    assert_same_parameters(model, single)


@over_optimizers
def test_training_resumes_from_a_sharded_checkpoint(sharding_ranks, optimizer_class, tmp_path):
    sharding_ranks.run(
        resume_from_sharded_checkpoint, optimizer_class, str(tmp_path / "checkpoint")
    )
