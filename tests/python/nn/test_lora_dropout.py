"""LoRALinear's dropout: one mask for forward and backward, governed by torch's generator."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_native import LoRALinear, NF4Linear
from support import (
    BATCHES,
    K,
    N,
    assert_near,
    assert_within,
    dense_weight,
    expected_lora_results,
    lora_layer,
    lora_results,
    make_base,
    nf4_layer,
    over_bases,
    over_dtypes,
    same_bits,
)


def dropping_layer(k: int, p: float) -> LoRALinear:
    """y = dropout(x): W is zero, A and B are the identity, the scale is 1."""
    layer = LoRALinear(NF4Linear(k, k, bias=False), r=k, lora_alpha=k, lora_dropout=p)
    nn.init.eye_(layer.lora_a)
    nn.init.eye_(layer.lora_b)
    return layer


def mask_of_next_call(layer: LoRALinear, shape: tuple[int, ...]) -> Tensor:
    """What a call of `layer` on an x of this shape will multiply x with, the generator unmoved."""
    state = torch.get_rng_state()
    dropping = dropping_layer(shape[-1], layer.lora_dropout)
    torch.set_rng_state(state)
    mask = dropping(torch.ones(shape)).detach()
    torch.set_rng_state(state)
    return mask


def seeded_lora_layer(*arguments, seed: int = 1, **options) -> LoRALinear:
    layer = lora_layer(*arguments, **options)
    torch.manual_seed(seed)
    return layer


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_an_element_is_dropped_or_scaled_up(m, p):
    x = torch.randn(m, 64)
    y = dropping_layer(64, p)(x)
    is_kept = y != 0
    scale = torch.tensor(1 / (1 - p), dtype=torch.float32)
    assert same_bits(y[is_kept], (x * scale)[is_kept])
    assert is_kept.any()
    assert not is_kept.all()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.95])
def test_the_share_of_dropped_elements_is_p_in_every_row_and_column(p):
    rows, columns = 700, 128
    dropped = (dropping_layer(columns, p)(torch.ones(rows, columns)) == 0).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(dropped.mean() - p) < 5 * sigma / math.sqrt(rows * columns)
    assert (dropped.mean(0) - p).abs().max() < 5 * sigma / math.sqrt(rows)
    assert (dropped.mean(1) - p).abs().max() < 5 * sigma / math.sqrt(columns)
    # Neighbours are independent, along both dimensions.
    for a, b in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
        correlation = ((a - p) * (b - p)).mean() / sigma**2
        assert abs(correlation) < 5 / math.sqrt(rows * columns)


def test_the_seed_of_torch_decides_the_mask():
    layer = dropping_layer(64, 0.5)
    x = torch.ones(20, 64)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    again = layer(x)
    assert same_bits(first, again)
    assert 0.4 < (first == second).float().mean() < 0.6  # independent masks of p = 0.5
    torch.manual_seed(4)
    assert not same_bits(layer(x), first)


def test_two_layers_in_a_row_draw_different_masks():
    first, second = dropping_layer(64, 0.5), dropping_layer(64, 0.5)
    x = torch.ones(20, 64)
    assert not same_bits(first(x), second(x))


@over_bases
def test_evaluation_drops_nothing_and_leaves_the_generator_alone(kind):
    layer = lora_layer(make_base(kind), lora_dropout=0.5).eval()
    plain = lora_layer(make_base(kind)).eval()
    plain.load_state_dict(layer.state_dict())
    state = torch.get_rng_state()
    for m in BATCHES:
        x = torch.randn(m, K, generator=torch.Generator().manual_seed(m))
        assert same_bits(layer(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)


@over_bases
@over_dtypes
@pytest.mark.parametrize("m", BATCHES)
def test_results_match_an_fp64_composition_with_the_same_mask(kind, m, dtype):
    layer = seeded_lora_layer(make_base(kind, dtype), r=6, lora_dropout=0.4)
    x, dy = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    mask = mask_of_next_call(layer, (m, K))
    actual = lora_results(layer, x, dy)
    for name, expected in expected_lora_results(layer, x, dy, mask).items():
        assert_within(actual[name], expected)


@over_bases
@pytest.mark.parametrize("m", BATCHES)
def test_backward_is_the_transpose_of_forward_under_one_seed(kind, m):
    # y - base(x) is linear in x while the mask stands: <dy, J v> = <Jᵀ dy, v>.
    layer = seeded_lora_layer(make_base(kind), r=6, lora_dropout=0.5)
    x, v, dy = torch.randn(m, K), torch.randn(m, K), torch.randn(m, N)
    torch.manual_seed(7)
    dx = lora_results(layer, x, dy)["dx"] - dy @ dense_weight(layer.base, torch.float32)
    torch.manual_seed(7)
    forward_of_v = layer(v) - layer.base(v)
    torch.testing.assert_close(
        (dy * forward_of_v).sum(), (dx * v).sum(), rtol=1e-4, atol=1e-3 * forward_of_v.norm().item()
    )


@over_bases
@pytest.mark.parametrize("shape", [(3, K), (9, K), (2, 5, K), (K,)], ids=str)
def test_second_derivatives_match_the_composition_with_the_same_mask(kind, shape):
    layer = seeded_lora_layer(make_base(kind), lora_dropout=0.5)
    base, scaling = layer.base, layer.scaling
    mask = mask_of_next_call(layer, shape)

    def composition(x: Tensor) -> Tensor:
        return base(x) + scaling * (x * mask) @ layer.lora_a.t() @ layer.lora_b.t()

    def second_derivatives(function) -> tuple[Tensor, ...]:
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
        leaves = (x, layer.lora_a, layer.lora_b)
        first = torch.autograd.grad(function(x).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    for ours, expected in zip(
        second_derivatives(layer), second_derivatives(composition), strict=True
    ):
        assert_near(ours, expected)


def test_a_first_derivative_with_a_graph_is_the_one_without():
    layer = seeded_lora_layer(nf4_layer(N, K), lora_dropout=0.5)
    for m in BATCHES:
        x = torch.randn(m, K, requires_grad=True)
        leaves = (x, layer.lora_a, layer.lora_b)
        y = layer(x)
        dy = torch.randn_like(y)
        plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        with_graph = torch.autograd.grad(y, leaves, dy, create_graph=True)
        for a, b in zip(plain, with_graph, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_checkpointing_recomputes_the_same_masks(m, use_reentrant, autocast):
    model = nn.Sequential(
        lora_layer(nf4_layer(48, K), lora_dropout=0.5),
        nn.GELU(),
        lora_layer(nn.Linear(48, N), lora_dropout=0.25),
    )
    x = torch.randn(m, K, requires_grad=True)
    dy = torch.randn(m, N)

    def gradients(function) -> list[Tensor]:
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        torch.rand(3)  # the generator moves on between forward and backward
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy.to(y.dtype))
        return [y, *(leaf.grad for leaf in leaves)]

    plain = gradients(model)
    recomputed = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for a, b in zip(plain, recomputed, strict=True):
        assert same_bits(a, b)
