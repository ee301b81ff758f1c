"""FSDP2 on two ranks: 4-bit weights in shards, and factors trained beside them."""

import copy

import pytest
import torch
import torch.distributed as dist
from rank_models import (
    TOKENS,
    CheckpointedModel,
    assert_same_parameters,
    loss_of,
    make_model,
    optimizer_of,
    shard,
    train,
    train_on_all_batches,
    trained,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qlora_native import add_lora, quantize_model
from qlora_native.nn import count_parameters
from support import FP32_ROUNDOFF, Model, same_bits

BATCHES = [TOKENS, TOKENS + 1, TOKENS + 2]


def make_options(names: tuple[str, ...]) -> dict:
    """Options of `fully_shard`, by name: they do not travel between processes."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    everything = {
        "keep": {"reshard_after_forward": False},
        "reshard": {"reshard_after_forward": True},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "replicas": {
            "mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
            if "replicas" in names
            else None
        },
        "columns": {"shard_placement_fn": shard_columns},
    }
    return {key: value for name in names for key, value in everything[name].items()}


def shard_columns(parameter: nn.Parameter):
    from torch.distributed.tensor import Shard

    is_even = parameter.dim() == 2 and parameter.shape[1] % 2 == 0
    return Shard(1) if is_even else Shard(0)


def train_on_the_same(width: int, lora: dict, names: tuple[str, ...]) -> None:
    single, model = make_model(width, **lora), make_model(width, **lora)
    stored = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard(model, **make_options(names))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert same_bits(whole(parameter), stored[name]), name
        if "replicas" not in names:
            held = torch.tensor(parameter.to_local().numel())
            dist.all_reduce(held)
            assert held == parameter.numel(), f"{name} is held once, by both ranks together"
    codes = model.blocks[0].up.base.weight
    assert codes.dtype == torch.uint8
    assert "replicas" in names or 0 < codes.to_local().numel() < codes.numel()
    assert count_parameters(model) == count_parameters(single)

    outputs = train(model, BATCHES)
    expected = train(single, BATCHES)
    assert all(map(same_bits, outputs, expected))
    assert_same_parameters(model, single)


@pytest.mark.parametrize(
    ("width", "lora", "names"),
    [
        (32, {}, ()),
        (32, {}, ("keep",)),
        (32, {}, ("offload",)),
        (32, {}, ("replicas",)),
        (32, {}, ("columns",)),
        (33, {"r": 5}, ("reshard",)),  # nothing is divided by two without a remainder
        (3, {"r": 1}, ()),  # tensors of fewer rows than ranks
        (32, {"use_dora": True}, ()),
        (32, {"target_modules": "all-linear", "use_rslora": True}, ("reshard",)),
    ],
)
def test_ranks_that_see_the_same_batch_train_as_one_process(sharding_ranks, width, lora, names):
    sharding_ranks.run(train_on_the_same, width, lora, names)


def train_checkpointed(use_reentrant: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    single, model = make_model(), make_model()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    called = CheckpointedModel(model, use_reentrant)
    fully_shard(called, mesh=mesh)
    outputs = train(called, BATCHES)
    expected = train(single, BATCHES)
    assert all(map(same_bits, outputs, expected))
    assert_same_parameters(model, single)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_blocks_may_be_computed_again_in_backward(sharding_ranks, use_reentrant):
    sharding_ranks.run(train_checkpointed, use_reentrant)


def train_on_different() -> None:
    single, model = make_model(), shard(make_model())
    batches = [[TOKENS + 5 * step + 11 * rank for rank in (0, 1)] for step in range(3)]
    train(model, [of_ranks[dist.get_rank()] for of_ranks in batches])
    train_on_all_batches(single, batches)
    assert_same_parameters(model, single)


def test_ranks_train_by_the_mean_of_their_gradients(sharding_ranks):
    sharding_ranks.run(train_on_different)


def train_in_bfloat16(reduce_dtype: torch.dtype | None, same_batch: bool) -> None:
    """Against one process that keeps fp32 factors and computes with bf16 copies of everything."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    single, model = make_model(), shard(make_model(), mp_policy=policy)
    stored = {n: p.detach().clone() for n, p in single.named_parameters() if not p.requires_grad}
    optimizer, expected = optimizer_of(model), optimizer_of(single)
    for step in range(3):
        batches = [TOKENS + 5 * step + (0 if same_batch else 11 * rank) for rank in (0, 1)]
        y = model(batches[dist.get_rank()])
        assert y.dtype == torch.bfloat16
        loss_of(y).backward()
        gradients = []
        for rank, tokens in enumerate(batches):
            copied = copy.deepcopy(single).to(torch.bfloat16)  # bytes stay bytes
            y_single = copied(tokens)
            loss_of(y_single).backward()
            gradients.append([p.grad for p in trained(copied).values()])
            if rank == dist.get_rank():
                assert same_bits(y, y_single)
        for parameter, one, other in zip(trained(single).values(), *gradients, strict=True):
            parameter.grad = (one.float() + other.float()) / 2
        for name, parameter in trained(model).items():
            assert parameter.dtype == torch.float32
            assert same_bits(whole(parameter.grad), trained(single)[name].grad), name
        for one in (optimizer, expected):
            one.step()
            one.zero_grad()
    assert_same_parameters(model, single)
    for name, parameter in model.named_parameters():
        if name in stored:
            assert same_bits(whole(parameter), stored[name]), name


@pytest.mark.parametrize(
    ("reduce_dtype", "same_batch"),
    [(None, True), (torch.float32, True), (torch.float32, False)],
    ids=["bf16-sums", "fp32-sums", "fp32-sums-of-different-batches"],
)
def test_mixed_precision_rounds_factors_and_leaves_bytes_alone(
    sharding_ranks, reduce_dtype, same_batch
):
    sharding_ranks.run(train_in_bfloat16, reduce_dtype, same_batch)


def clip() -> None:
    single, model = make_model(), shard(make_model())
    for one in (single, model):
        loss_of(one(TOKENS)).backward()
    parameters, expected = trained(model), trained(single)
    before = {name: p.grad.clone() for name, p in expected.items()}
    exact = sum(g.double().square().sum() for g in before.values()).sqrt().item()
    limit = exact / 3
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
    norm = norm.full_tensor().item()
    # A sum of squares in fp32, in whatever order, and its root.
    count = sum(g.numel() for g in before.values())
    assert abs(norm - exact) <= (count / 2 + 4) * FP32_ROUNDOFF * exact
    factor = torch.tensor(limit) / (norm + 1e-6)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            whole(parameter.grad), before[name] * factor, rtol=8 * FP32_ROUNDOFF, atol=0
        )


def test_gradients_are_clipped_by_the_norm_of_all_shards(sharding_ranks):
    sharding_ranks.run(clip)


def accumulate() -> None:
    single, model = make_model(), shard(make_model())
    optimizer = optimizer_of(model)
    batches = [[TOKENS + 3 * i + 11 * rank for i in range(2)] for rank in (0, 1)]
    own = batches[dist.get_rank()]
    model.set_requires_gradient_sync(False)
    loss_of(model(own[0])).backward()
    assert all(p.grad is None for p in trained(model).values()), "the sums are not sharded yet"
    model.set_requires_gradient_sync(True)
    loss_of(model(own[1])).backward()
    sums = []
    for of_rank in batches:
        for tokens in of_rank:
            loss_of(single(tokens)).backward()
        sums.append([p.grad for p in trained(single).values()])
        single.zero_grad()
    for parameter, one, other in zip(trained(single).values(), *sums, strict=True):
        parameter.grad = (one + other) / 2
    optimizer.step()
    optimizer_of(single).step()
    assert_same_parameters(model, single)


def test_gradients_accumulate_without_communication(sharding_ranks):
    sharding_ranks.run(accumulate)


# ---- on meta, filled from rank 0


def load_on_meta(width: int, from_rank_0: bool, empty_first: bool) -> None:
    single = make_model(width)
    with torch.device("meta"):
        model = quantize_model(Model(width))
        add_lora(model, r=4 if width > 4 else 1, target_modules=["up", "down"])
    shard(model)
    assert all(p.is_meta for p in model.parameters())
    if empty_first:
        model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
    has_state = dist.get_rank() == 0 or not from_rank_0
    set_model_state_dict(model, single.state_dict() if has_state else {}, options=options)
    assert all(p.device.type == "cpu" for p in model.parameters())
    for name, parameter in model.named_parameters():
        expected = dict(single.named_parameters())[name]
        assert parameter.requires_grad == expected.requires_grad
        assert parameter.dtype == expected.dtype
    assert same_bits(model(TOKENS), single(TOKENS))
    train(model, BATCHES)
    train(single, BATCHES)
    assert_same_parameters(model, single)


@pytest.mark.parametrize(
    ("width", "from_rank_0", "empty_first"),
    [(32, True, False), (32, True, True), (32, False, False), (33, True, False)],
)
def test_a_model_on_meta_is_sharded_and_then_filled(
    sharding_ranks, width, from_rank_0, empty_first
):
    sharding_ranks.run(load_on_meta, width, from_rank_0, empty_first)


def get_adapter_alone() -> None:
    single, model = make_model(), shard(make_model())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        assert state.keys() == trained(single).keys()
        for name, parameter in trained(single).items():
            assert same_bits(state[name], parameter.detach()), name


def test_the_state_dict_may_be_of_the_adapter_alone(sharding_ranks):
    sharding_ranks.run(get_adapter_alone)


# ---- outside of the forward that gathers


def use_shards_directly() -> None:
    model = shard(make_model())
    layer = model.blocks[0].up
    x = torch.randn(3, 32)
    with pytest.raises(RuntimeError, match="DTensor"):
        layer(x)
    with pytest.raises(RuntimeError, match="DTensor"):
        layer.base(x)
    with pytest.raises(NotImplementedError, match="nf4_dequantize"):
        layer.base.dequantize()
    expected = make_model().blocks[0].up
    model.blocks[0].unshard()
    assert same_bits(layer(x), expected(x))
    assert same_bits(layer.base.dequantize(), expected.base.dequantize())
    model.blocks[0].reshard()


def test_a_shard_is_not_taken_for_the_weight(sharding_ranks):
    sharding_ranks.run(use_shards_directly)
