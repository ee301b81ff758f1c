"""DistributedDataParallel on two ranks: 4-bit weights broadcast once, and the steps it takes."""

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
    train,
    train_on_all_batches,
    trained,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qlora_native import LoRALinear, NF4Linear, PagedAdamW, set_lora
from support import Approximate, assert_within, expected_lora_results, same_bits


def own_tokens(step: int, rank: int | None = None) -> torch.Tensor:
    return TOKENS + 5 * step + 11 * (dist.get_rank() if rank is None else rank)


def check_broadcast() -> None:
    rank = dist.get_rank()
    model, expected = make_model(), make_model()
    assert not list(model.buffers()), "DDP broadcasts buffers at every forward"
    if rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    replicated = DistributedDataParallel(model)
    assert_same_parameters(replicated, expected)

    codes = model.blocks[0].up.base.weight
    if rank == 1:
        codes.add_(1)
    replicated(TOKENS)
    assert same_bits(codes, expected.blocks[0].up.base.weight) == (rank == 0), (
        "the weight has been sent again"
    )


def test_4bit_weights_are_broadcast_once(ranks):
    ranks.run(check_broadcast)


def train_on_the_same(options: dict, checkpointing: str | None) -> None:
    single, model = make_model(), make_model()
    if checkpointing is not None:
        model = CheckpointedModel(model, use_reentrant=checkpointing == "reentrant")
    replicated = DistributedDataParallel(model, **options)
    batches = [TOKENS, TOKENS + 1, TOKENS + 2]
    expected = train(single, batches)
    outputs = train(replicated, batches)
    assert all(map(same_bits, outputs, expected))
    assert_same_parameters(model.model if checkpointing else model, single)


OPTIONS = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]
CASES = [
    pytest.param(options, checkpointing, id=f"{next(iter(options), 'default')}-{checkpointing}")
    for options in OPTIONS
    for checkpointing in (None, "reentrant", "not-reentrant")
    # which torch refuses, whatever the model
    if not (checkpointing == "reentrant" and options.get("find_unused_parameters"))
]


@pytest.mark.parametrize(("options", "checkpointing"), CASES)
def test_ranks_that_see_the_same_batch_train_as_one_process(ranks, options, checkpointing):
    ranks.run(train_on_the_same, options, checkpointing)


def train_on_different() -> None:
    """The mean of two gradients is exact but for one sum, which has no order: equal bits."""
    single, model = make_model(lora_dropout=0.0), make_model(lora_dropout=0.0)
    replicated = DistributedDataParallel(model)
    train(replicated, [own_tokens(step) for step in range(3)])
    train_on_all_batches(single, [[own_tokens(step, rank) for rank in (0, 1)] for step in range(3)])
    assert_same_parameters(model, single)


def test_ranks_train_by_the_mean_of_their_gradients(ranks):
    ranks.run(train_on_different)


def train_one_layer() -> None:
    """One step of a layer, against the interval of what one process may come to with all tokens.

    Sums over the tokens of both ranks have another order there than rank by rank, so each gradient
    is within the derived bound of its exact value. AdamW's first step, lr · g / (|g| + eps), grows
    with g: its value is between those of the bounds.
    """
    torch.manual_seed(0)
    lr, eps, tokens = 0.1, 1e-3, 24
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(70, 37)), r=4)
    nn.init.normal_(layer.lora_b, std=0.5)
    x, dy = torch.randn(tokens, 70), torch.randn(tokens, 37)
    start = {"da": layer.lora_a.detach().clone(), "db": layer.lora_b.detach().clone()}
    expected = expected_lora_results(layer, x, dy)
    replicated = DistributedDataParallel(layer)
    own = slice(dist.get_rank(), None, 2)
    optimizer = PagedAdamW(trained(layer).values(), lr=lr, eps=eps, weight_decay=0.0)
    (replicated(x[own]) * dy[own]).sum().backward()
    optimizer.step()
    for name, parameter in (("da", layer.lora_a), ("db", layer.lora_b)):
        gradient = expected[name] * 0.5  # DDP takes the mean over the ranks, not the sum
        low, high = (
            start[name] - lr * g / (g.abs() + eps)
            for g in (gradient.value + gradient.error, gradient.value - gradient.error)
        )
        middle = Approximate((low + high) / 2, (high - low) / 2)
        # The step itself: a handful of fp32 roundings of numbers that are no larger than these.
        rounding = 8 * 2.0**-24 * (start[name].abs().double() + lr)
        assert_within(parameter, Approximate(middle.value, middle.error + rounding))


def test_a_step_is_within_rounding_of_one_process_with_all_tokens(ranks):
    ranks.run(train_one_layer)


def accumulate() -> None:
    single, model = make_model(), make_model()
    replicated = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for step in range(2):
        with replicated.no_sync():
            loss_of(replicated(own_tokens(step))).backward()
        loss_of(replicated(own_tokens(step) + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Each rank adds up its own two gradients, then the mean is taken: that order, too.
    expected = optimizer_of(single)
    for step in range(2):
        sums = []
        for rank in (0, 1):
            for tokens in (own_tokens(step, rank), own_tokens(step, rank) + 1):
                loss_of(single(tokens)).backward()
            sums.append([p.grad for p in trained(single).values()])
            expected.zero_grad()
        for parameter, one, other in zip(trained(single).values(), *sums, strict=True):
            parameter.grad = one / 2 + other / 2
        expected.step()
        expected.zero_grad()
    assert_same_parameters(model, single)


def test_gradients_accumulate_without_communication(ranks):
    ranks.run(accumulate)


def train_two_adapters() -> None:
    from qlora_native import add_lora

    model = make_model(adapter_name="one")
    add_lora(model, r=2, target_modules=["up"], adapter_name="two")
    add_lora(model, r=3, target_modules=["down"], adapter_name="three")
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.requires_grad_()
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    replicated = DistributedDataParallel(model, find_unused_parameters=True)
    names = ["one", "two"][dist.get_rank()]
    set_lora(model, names)
    train(replicated, [TOKENS, TOKENS + 1])
    after = {name: p.detach().clone() for name, p in trained(model).items()}
    for name, parameter in after.items():
        assert same_bits(parameter, before[name]) == (".three." in name), name
    gathered: list = [None, None]
    dist.all_gather_object(gathered, after)
    assert all(same_bits(gathered[0][name], gathered[1][name]) for name in after)


def test_ranks_may_train_an_adapter_each(ranks):
    ranks.run(train_two_adapters)


def drop_out() -> None:
    """Each rank draws its own masks; the factors stay equal."""
    model = make_model(lora_dropout=0.5)
    replicated = DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    outputs = train(replicated, [TOKENS, TOKENS + 1])
    gathered: list = [None, None]
    dist.all_gather_object(gathered, (outputs[0], [p.detach() for p in trained(model).values()]))
    assert not torch.equal(gathered[0][0], gathered[1][0])
    assert all(map(same_bits, gathered[0][1], gathered[1][1]))


def test_ranks_drop_out_on_their_own(ranks):
    ranks.run(drop_out)
