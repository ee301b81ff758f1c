"""Layers in CUDA graphs: replays compute, draw new masks, and train."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cuda_layers import (
    GPU,
    K,
    N,
    assert_all_near,
    batch,
    make_layer,
    over_optimizers,
    over_tokens,
    results,
)
from qlora_native import LoRALinear, NF4Linear, add_lora, quantize_model
from support import Model, same_bits

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build


def warm_up(step: Callable[[], object]) -> None:
    """As torch asks before a capture: some calls on a stream aside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@over_tokens
@pytest.mark.parametrize("kind", ["nf4", "lora"])
def test_forward_and_backward_replay_in_a_graph(kind, m):
    layer = make_layer(kind).to(GPU)
    x, dy = batch(m, K).requires_grad_(), batch(m, N)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        new_x, new_dy = batch(m, K), batch(m, N)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        first = [tensor.detach().clone() for tensor in captured]
        assert_all_near(first, results(layer, new_x, new_dy))
        graph.replay()
        for a, b in zip(captured, first, strict=True):
            assert same_bits(a, b)


def test_each_replay_draws_a_new_mask_for_forward_and_backward_alike():
    # y = dropout(x), dx = dropout(dy): W is zero, A and B are the identity, the scale is 1.
    layer = LoRALinear(NF4Linear(64, 64, bias=False), r=64, lora_alpha=64, lora_dropout=0.5)
    nn.init.eye_(layer.lora_a)
    nn.init.eye_(layer.lora_b)
    layer.to(GPU)
    x = torch.ones(40, 64, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    dy = torch.ones_like(x)

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, x, dy)]

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, dx)
        assert ((y == 0) | (y == 2)).all()
        masks.append(y.detach() == 0)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert 0.4 < (masks[a] == masks[b]).float().mean() < 0.6


@over_tokens
@pytest.mark.parametrize("kind", ["nf4", "lora"])
def test_torch_makes_graphed_callables_of_layers(kind, m):
    layer = make_layer(kind).to(GPU)
    eager = copy.deepcopy(layer)
    graphed = torch.cuda.make_graphed_callables(layer, (batch(m, K).requires_grad_(),))
    for _ in range(2):
        x, dy = batch(m, K), batch(m, N)
        assert_all_near(results(graphed, x, dy), results(eager, x, dy))


@over_optimizers
def test_a_graph_of_forward_and_backward_trains(optimizer_class):
    model = add_lora(quantize_model(Model()), r=4, lora_dropout=0.1).to(GPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(trained, lr=1e-2)
    tokens = torch.arange(42, device=GPU).view(6, 7)

    def backward() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss

    warm_up(backward)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = backward()
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
