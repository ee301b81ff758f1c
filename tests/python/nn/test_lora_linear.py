"""LoRALinear's numbers, what it saves, and what it refuses."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_native import LoRALinear, NF4Linear
from support import (
    BATCHES,
    SWITCH,
    Approximate,
    K,
    N,
    assert_near,
    assert_within,
    dense_weight,
    dispatcher,
    expected_lora_results,
    lora_layer,
    lora_results,
    make_base,
    nf4_layer,
    over_bases,
    over_dtypes,
    same_bits,
    state_bits,
)

# ---- the start


@over_bases
@over_dtypes
@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_at_the_start_it_is_its_base_bit_for_bit(kind, m, dropout, dtype):
    base = make_base(kind, dtype)
    layer = LoRALinear(base, r=8, lora_dropout=dropout)
    x = torch.randn(m, K, dtype=dtype)
    for mode in (True, False):
        assert same_bits(layer.train(mode)(x), base(x))


def test_a_starts_kaiming_uniform_and_b_at_zero():
    layer = LoRALinear(nn.Linear(400, 300), r=64)
    assert (layer.lora_b == 0).all()
    bound = 1 / math.sqrt(400)  # gain sqrt(1/3) for a = sqrt(5), times sqrt(3 / fan_in)
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    torch.manual_seed(0)
    first = LoRALinear(nn.Linear(8, 8, device="meta").to_empty(device="cpu"), r=2).lora_a
    torch.manual_seed(0)
    second = LoRALinear(nn.Linear(8, 8, device="meta").to_empty(device="cpu"), r=2).lora_a
    assert same_bits(first, second)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_factors_are_fp32_whatever_the_default_dtype(default):
    base = nf4_layer(24, 40)
    torch.set_default_dtype(default)
    try:
        layer = LoRALinear(base, r=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32


@over_bases
def test_only_the_factors_are_trained(kind):
    layer = LoRALinear(make_base(kind), r=2)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "adapters.default.lora_a",
        "adapters.default.lora_b",
    ]
    assert layer.lora_a.shape == (2, K)
    assert layer.lora_b.shape == (N, 2)
    assert (layer.in_features, layer.out_features) == (K, N)


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert LoRALinear(nn.Linear(64, 64), r=16, lora_alpha=8).scaling == 0.5
    assert LoRALinear(nn.Linear(64, 64), r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_it_takes_over_the_mode_of_its_base():
    assert not LoRALinear(nf4_layer(24, 40).eval(), r=2).training


# ---- numbers


@over_bases
@over_dtypes
@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_results_match_an_fp64_composition(kind, m, use_rslora, dtype):
    # fp32 factors beside a base and activations of every dtype.
    layer = lora_layer(make_base(kind, dtype), r=6, lora_alpha=9, use_rslora=use_rslora)
    x, dy = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    actual = lora_results(layer, x, dy)
    assert actual["da"].dtype == actual["db"].dtype == torch.float32
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    for name, expected in expected_lora_results(layer, x, dy).items():
        assert_within(actual[name], expected)


@over_bases
@over_dtypes
@pytest.mark.parametrize("m", BATCHES)
def test_factors_of_16_bits_get_gradients_of_16_bits(kind, m, dtype):
    layer = lora_layer(make_base(kind, dtype), r=6).to(dtype)
    x, dy = torch.randn(m, K, dtype=dtype), torch.randn(m, N, dtype=dtype)
    actual = lora_results(layer, x, dy)
    assert actual["da"].dtype == actual["db"].dtype == dtype
    for name, expected in expected_lora_results(layer, x, dy).items():
        assert_within(actual[name], expected)


@over_bases
@pytest.mark.parametrize("r", [1, 2, 3, N])
def test_every_rank_works(kind, r):
    layer = lora_layer(make_base(kind), r=r)
    for m in BATCHES:
        x, dy = torch.randn(m, K), torch.randn(m, N)
        actual = lora_results(layer, x, dy)
        for name, expected in expected_lora_results(layer, x, dy).items():
            assert_within(actual[name], expected)


@over_bases
@pytest.mark.parametrize("m", BATCHES)
def test_bf16_training_stays_close_to_fp32(kind, m):
    layer = lora_layer(make_base(kind), r=6)
    x, dy = torch.randn(m, K), torch.randn(m, N)
    exact = lora_results(layer, x, dy)
    in_16_bits = copy.deepcopy(layer)
    in_16_bits.base.to(torch.bfloat16)
    rough = lora_results(in_16_bits, x.bfloat16(), dy.bfloat16())
    for name in exact:
        error = (rough[name].float() - exact[name]).norm() / exact[name].norm()
        assert error < 4 * 2**-8, name  # a few roundings of 2^-9 on average each


@over_bases
@pytest.mark.parametrize("m", BATCHES)
def test_x_of_any_rank_and_stride_gives_the_same_bits(kind, m):
    layer = lora_layer(make_base(kind))
    x, dy = torch.randn(2 * m, K), torch.randn(2 * m, N)
    flat = lora_results(layer, x, dy)
    cube = lora_results(layer, x.view(2, m, K), dy.view(2, m, N))
    strided = lora_results(layer, x.t().contiguous().t(), dy.t().contiguous().t())
    for name in flat:
        assert same_bits(cube[name].flatten(), flat[name].flatten())
        assert same_bits(strided[name], flat[name])
    one = lora_results(layer, x[0], dy[0])
    as_batch = lora_results(layer, x[:1], dy[:1])
    for name in flat:
        assert same_bits(one[name].flatten(), as_batch[name].flatten())


@over_bases
def test_no_tokens_give_gradients_of_zero(kind):
    layer = lora_layer(make_base(kind), lora_dropout=0.5)
    actual = lora_results(layer, torch.randn(2, 0, K), torch.randn(2, 0, N))
    assert actual["y"].shape == (2, 0, N)
    assert actual["dx"].shape == (2, 0, K)
    assert (actual["da"] == 0).all()
    assert (actual["db"] == 0).all()


@over_bases
@pytest.mark.parametrize("m", [SWITCH, SWITCH + 1])
def test_each_gradient_is_the_same_when_the_others_are_not_wanted(kind, m):
    layer = lora_layer(make_base(kind))
    x, dy = torch.randn(m, K), torch.randn(m, N)
    full = lora_results(layer, x, dy)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = {"dx": x.clone(), "da": layer.lora_a, "db": layer.lora_b}
        for (name, leaf), is_wanted in zip(leaves.items(), wanted, strict=True):
            leaf.requires_grad_(is_wanted).grad = None
            leaves[name] = leaf
        y = layer(leaves["dx"])
        assert y.requires_grad == any(wanted)
        assert same_bits(y, full["y"])
        if y.requires_grad:
            y.backward(dy)
        for (name, leaf), is_wanted in zip(leaves.items(), wanted, strict=True):
            assert (leaf.grad is not None) == is_wanted
            if is_wanted:
                assert same_bits(leaf.grad, full[name])


@over_bases
@pytest.mark.parametrize("m", BATCHES)
def test_a_bias_that_is_trained_gets_its_gradient(kind, m):
    layer = lora_layer(make_base(kind))
    layer.base.bias.requires_grad_()
    dy = torch.randn(m, N)
    layer(torch.randn(m, K)).backward(dy)
    ones = Approximate(torch.ones(1, m))
    assert_within(layer.base.bias.grad[None], ones @ Approximate(dy))


@over_bases
def test_without_a_bias_it_works_the_same(kind):
    base = nf4_layer(N, K, bias=False) if kind == "nf4" else nn.Linear(K, N, bias=False)
    layer = lora_layer(base)
    w = dense_weight(base, torch.float32) + layer.scaling * layer.lora_b @ layer.lora_a
    for m in BATCHES:
        x = torch.randn(m, K)
        torch.testing.assert_close(layer(x), F.linear(x, w), rtol=1e-4, atol=1e-5)


@over_bases
@pytest.mark.parametrize("shape", [(1, K), (SWITCH + 3, K), (2, 3, K), (K,)], ids=str)
@pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "dispatcher"])
def test_second_derivatives_match_the_dense_composition(kind, shape, through_dispatcher):
    layer = lora_layer(make_base(kind))
    w, bias, scaling = dense_weight(layer.base, torch.float32), layer.base.bias, layer.scaling

    def composition(x: Tensor) -> Tensor:
        return F.linear(x, w, bias) + scaling * F.linear(F.linear(x, layer.lora_a), layer.lora_b)

    def second_derivatives(function) -> tuple[Tensor, ...]:
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
        leaves = (x, layer.lora_a, layer.lora_b)
        first = torch.autograd.grad(function(x).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    if through_dispatcher:
        with dispatcher():
            actual = second_derivatives(layer)
    else:
        actual = second_derivatives(layer)
    for ours, expected in zip(actual, second_derivatives(composition), strict=True):
        assert_near(ours, expected)


@over_bases
@pytest.mark.parametrize("m", BATCHES)
def test_autocast_gives_the_numbers_of_the_cast_layer(kind, m):
    layer = lora_layer(make_base(kind))
    x, dy = torch.randn(m, K), torch.randn(m, N).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = lora_results(layer, x, dy)
    cast = copy.deepcopy(layer)
    cast.base.to(torch.bfloat16)
    expected = lora_results(cast, x.bfloat16(), dy)
    assert actual["y"].dtype == torch.bfloat16
    assert actual["dx"].dtype == torch.float32
    for name in actual:
        assert same_bits(actual[name], expected[name].to(actual[name].dtype))
    with torch.autocast("cpu", torch.bfloat16):  # backward inside, and x in bf16 already
        for name, value in lora_results(layer, x.bfloat16(), dy).items():
            assert same_bits(value, expected[name])


def test_the_compute_dtype_of_the_base_is_that_of_the_update():
    layer = lora_layer(nf4_layer(N, K, compute_dtype=torch.bfloat16))
    plain = lora_layer(nf4_layer(N, K))
    plain.load_state_dict(layer.state_dict())
    for m in BATCHES:
        x = torch.randn(m, K)
        y = layer(x)
        assert y.dtype == torch.float32
        assert same_bits(y, plain(x.bfloat16()).float())


def test_one_thread_and_two_give_the_same_bits():
    layer = lora_layer(nf4_layer(300, 520), r=16, lora_dropout=0.3)
    x, dy = torch.randn(SWITCH, 520), torch.randn(SWITCH, 300)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append(lora_results(layer, x, dy))
    for result in results[1:]:
        for name, value in result.items():
            assert same_bits(value, results[0][name])


@over_bases
def test_a_call_changes_nothing_that_is_stored(kind):
    layer = lora_layer(make_base(kind), lora_dropout=0.5)
    before = state_bits(layer)
    for m in BATCHES:
        lora_results(layer, torch.randn(m, K), torch.randn(m, N))
        layer.eval()(torch.randn(m, K))
        layer.train()
    assert state_bits(layer) == before


def test_the_layer_may_be_used_twice_in_a_graph():
    layer = lora_layer(nf4_layer(40, 40))
    x = torch.randn(9, 40)
    layer(layer(x)).sum().backward()
    w = layer.base.dequantize()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    y = x
    for _ in range(2):
        y = F.linear(y, w + layer.scaling * b @ a, layer.base.bias)
    y.sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, a.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.lora_b.grad, b.grad, rtol=1e-4, atol=1e-3)


# ---- what backward keeps


@over_bases
@pytest.mark.parametrize("m", [2, 50])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "dispatcher"])
def test_backward_keeps_x_and_x_times_a_and_nothing_else(kind, m, dropout, through_dispatcher):
    layer = lora_layer(make_base(kind, n=96, k=128), r=4, lora_dropout=dropout)
    x = torch.randn(2, m, 128, requires_grad=True)
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        if through_dispatcher:
            with dispatcher():
                layer(x)
        else:
            layer(x)
    shapes = sorted(tuple(t.shape) for t in kept)
    seed = [(1,)] if dropout else []
    assert shapes == [*seed, (2, m, 128), (2 * m, 4)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept), "x itself, not a copy"


def test_a_16_bit_call_keeps_no_cast_factors():
    layer = lora_layer(nf4_layer(96, 128), r=4)
    x = torch.randn(50, 128, dtype=torch.bfloat16, requires_grad=True)
    sizes: list[int] = []
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(sizes) == [50 * 4 * 2, 50 * 128 * 2]


# ---- copies


@over_bases
def test_copies_pickles_and_state_dicts_keep_the_bits(kind):
    layer = lora_layer(make_base(kind), r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=True)
    other = LoRALinear(make_base(kind), r=3, lora_alpha=5, lora_dropout=0.25, use_rslora=True)
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert state_bits(copied) == state_bits(layer)
        assert repr(copied) == repr(layer)
        assert same_bits(copied.eval()(torch.ones(2, K)), layer.eval()(torch.ones(2, K)))
    with pytest.raises(RuntimeError, match=r"size mismatch for adapters\.default\.lora_a"):
        LoRALinear(make_base(kind), r=4).load_state_dict(layer.state_dict())


def test_on_meta_it_has_shapes():
    layer = LoRALinear(NF4Linear(K, N, device="meta"), r=2, lora_dropout=0.5)
    assert layer.lora_a.is_meta
    assert layer(torch.randn(3, K, device="meta")).shape == (3, N)
    dense = LoRALinear(nn.Linear(K, N, device="meta"), r=2)
    assert dense(torch.randn(2, 3, K, device="meta")).shape == (2, 3, N)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"r is 0, want an integer from 1 to 37 for a layer \[37, 70\]"),
        ({"r": 38}, "r is 38, want an integer from 1 to 37"),
        ({"r": 4.0}, "r is 4.0, want an integer"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, want 0 <= p < 1"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1, want 0 <= p < 1"),
        ({"lora_dropout": math.nan}, "lora_dropout is nan"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf, want a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan, want a finite number"),
        ({"base": nn.Conv1d(3, 3, 1)}, "base is Conv1d, want an NF4Linear or an nn.Linear"),
        ({"base": nn.Bilinear(3, 3, 1)}, "base is Bilinear, want an NF4Linear or an nn.Linear"),
    ],
)
def test_constructor_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"LoRALinear: {message}"):
        LoRALinear(**{"base": nf4_layer(N, K), **arguments})


def test_a_base_whose_forward_is_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"base is Scaled, whose forward is not nn.Linear's"):
        LoRALinear(Scaled(8, 8), r=2)


def test_a_dense_base_that_is_trained_is_refused():
    layer = LoRALinear(nn.Linear(K, N), r=2)
    layer.base.weight.requires_grad_()
    with pytest.raises(ValueError, match="the base weight requires a gradient"):
        layer(torch.randn(3, K))


def test_a_dense_base_of_another_dtype_is_refused():
    layer = LoRALinear(nn.Linear(K, N).bfloat16(), r=2)
    with pytest.raises(ValueError, match=r"x is torch.float32, base.weight is torch.bfloat16"):
        layer(torch.randn(3, K))


@over_bases
@pytest.mark.parametrize("m", [1, 30])
def test_an_x_that_does_not_fit_is_refused(kind, m):
    layer = LoRALinear(make_base(kind), r=2)
    with pytest.raises(ValueError, match=rf"lora_linear: x has shape \[{m}, 71\], w has k=70"):
        layer(torch.randn(m, 71))
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        layer(torch.randn(m, K, dtype=torch.float64))
    with pytest.raises(ValueError, match="x is on meta, the weight is on cpu"):
        layer(torch.randn(m, K, device="meta"))


@pytest.mark.parametrize("m", [1, 30])
def test_factors_that_do_not_fit_are_refused(m):
    x = torch.randn(m, K)
    layer = lora_layer(nf4_layer(N, K))
    layer.lora_a.data = layer.lora_a.data.double()
    with pytest.raises(ValueError, match=r"lora_a is torch.float64 and lora_b torch.float32"):
        layer(x)
    layer = lora_layer(nf4_layer(N, K))
    layer.lora_b.data = layer.lora_b.data.bfloat16()
    with pytest.raises(ValueError, match=r"lora_a is torch.float32 and lora_b torch.bfloat16"):
        layer(x)
    layer = lora_layer(nf4_layer(N, K))
    layer.lora_a.data = layer.lora_a.data[:, 1:]
    with pytest.raises(ValueError, match=r"lora_a has shape \[4, 69\] and lora_b \[37, 4\]"):
        layer(x)
    layer = lora_layer(nf4_layer(N, K))
    layer.adapters["default"].lora_b = nn.Parameter(layer.lora_b.detach().to("meta"))
    with pytest.raises(ValueError, match="lora_a is on cpu and lora_b on meta, x is on cpu"):
        layer(x)


def test_autocast_keeps_no_copy_of_a_dense_base():
    layer = lora_layer(nn.Linear(K, N))
    saved = []
    x = torch.randn(40, K, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    extra = [t for t in saved if t is not None and t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in extra) == sorted([(40, K), (40, layer.r)])
    y.float().sum().backward()
    assert x.grad is not None


@over_bases
@pytest.mark.parametrize("m", BATCHES)
def test_a_pending_sign_is_part_of_x_and_of_its_gradient(kind, m):
    # As z.conj().imag has: contiguous, and its memory is the negative of what it means.
    layer = lora_layer(make_base(kind))
    x, dy = torch.randn(m, K), torch.randn(m, N)
    expected = lora_results(layer, x, dy)
    x, dy = torch._neg_view(-x), torch._neg_view(-dy)
    actual = lora_results(layer, x, dy)
    for name in expected:
        assert same_bits(actual[name], expected[name])
    base = layer.base
    assert same_bits(base(x), base(x.clone()))
