"""torch.compile over LoRA layers with several adapters: whole graphs, and how many."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from qlora_native import add_lora, delete_lora, quantize_model, set_lora
from qlora_native.nn.routing import BASE
from support import assert_near, same_bits

WIDTH = 64
ROUTINGS = ["a", "b", ["a", BASE, "b", "a"], "dora", ["dora", "a", "a", BASE], None]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    is_old = not hasattr(torch._dynamo.config, "recompile_limit")  # before torch 2.7
    with torch._dynamo.config.patch({"cache_size_limit" if is_old else "recompile_limit": 16}):
        yield
    torch._dynamo.reset()


def make_model() -> nn.Module:
    layers = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
    model = quantize_model(nn.Sequential(*layers))
    for name in ("a", "b", "dora"):
        add_lora(model, r=4, adapter_name=name, use_dora=name == "dora")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model


def results(model: nn.Module, function, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


def assert_alike(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """A graph may add the gradients of a factor that several groups have in another order."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, relative=1e-5)


@pytest.mark.parametrize("names", ROUTINGS[2:5], ids=str)
def test_a_whole_graph_computes_what_the_eager_layers_do(names):
    model = make_model()
    set_lora(model, names)
    x = torch.randn(4, 5, WIDTH)
    expected = results(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = results(model, compiled, x)
    assert same_bits(actual[0], expected[0])
    assert_alike(actual, expected)


def test_a_routing_is_compiled_once_however_often_it_comes_back():
    model = make_model()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 5, WIDTH)
    for turn in range(3):
        for names in ROUTINGS:
            before = counter.frame_count
            set_lora(model, names)
            assert same_bits(compiled(x), model(x))
            assert counter.frame_count - before == (1 if turn == 0 else 0), names


def test_another_number_of_tokens_is_compiled_once():
    model = make_model()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    set_lora(model, ["a", "b", "a", BASE])
    for tokens in (5, 6, 7, 8, 9):
        x = torch.randn(4, tokens, WIDTH)
        assert same_bits(compiled(x), model(x))
    assert counter.frame_count == 2  # for 5 tokens, then for any number


def test_a_batch_of_another_length_is_refused_when_it_is_compiled():
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    set_lora(model, ["a", "b", "a"])
    with pytest.raises(Exception, match="3 names are in force"):
        compiled(torch.randn(4, 5, WIDTH))


@pytest.mark.parametrize("names", ROUTINGS[1:3], ids=str)
def test_a_checkpoint_inside_what_is_compiled(names):
    model = make_model()
    set_lora(model, names)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    x = torch.randn(4, 5, WIDTH)
    expected = results(model, model, x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_alike(results(model, compiled, x), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize(
    ("names", "now"),
    [("several", "b"), ("several", None), ("several", ["a", "b", "b", "a"]), ("a", None)],
    ids=str,
)
def test_a_checkpoint_around_what_is_compiled(use_reentrant, names, now):
    model = make_model()
    for name in ("b", "dora") if names == "a" else ():
        delete_lora(model, name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def run(x: Tensor) -> Tensor:
        return checkpoint(compiled, x, use_reentrant=use_reentrant)

    x = torch.randn(4, 5, WIDTH)
    set_lora(model, now)
    results(model, run, x)  # so that there is a graph for either
    set_lora(model, "a")
    expected = results(model, model, x)
    for _ in range(2):
        assert_alike(results(model, run, x), expected)
        loss = run(x.clone().requires_grad_()).square().sum()
        set_lora(model, now)
        with pytest.raises(RuntimeError, match="under another routing: set_lora had put 'a'"):
            loss.backward()
        set_lora(model, "a")


def test_blocks_that_are_compiled_each_share_their_graphs():
    model = quantize_model(nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(6)))
    for name in ("a", "b"):
        add_lora(model, r=4, adapter_name=name)
    counter = CompileCounter()
    x = torch.randn(4, WIDTH)
    for block in model:
        forward = torch.compile(block, backend=counter, fullgraph=True)
        assert same_bits(forward(x), block(x))
    assert counter.frame_count == 1


def test_norms_of_dora_may_be_first_wanted_by_a_graph():
    model = make_model()
    set_lora(model, "dora")
    x = torch.randn(4, WIDTH)
    expected = model(x)
    model.load_state_dict(model.state_dict())  # drops the norms
    assert all(model[i]._norms._kept is None for i in (0, 2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x), expected)
