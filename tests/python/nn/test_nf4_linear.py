"""NF4Linear's numbers: forward and gradients against the dequantised dense layer."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_native import NF4Linear
from support import (
    BATCHES,
    FLOAT_DTYPES,
    SWITCH,
    assert_near,
    check_against_dense,
    dispatcher,
    nf4_layer,
    over_dtypes,
    over_nesting,
    same_bits,
    state_bits,
)


@over_dtypes
def test_forward_and_gradients_match_the_dense_layer_for_every_batch_size_to_70(dtype):
    layer = nf4_layer(37, 70)
    for m in range(1, 71):
        check_against_dense(layer, torch.randn(m, 70, dtype=dtype), dtype)


@over_dtypes
@over_nesting
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(37, 45), (1, 1), (64, 128), (3, 333), (130, 7)])
def test_odd_sizes_match_the_dense_layer(n, k, bias, double_quant, dtype):
    layer = nf4_layer(n, k, bias, double_quant=double_quant, block_size=32)
    for m in BATCHES:
        check_against_dense(layer, torch.randn(m, k, dtype=dtype), dtype)


@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_block_sizes_match_the_dense_layer(block_size):
    layer = nf4_layer(48, 160, block_size=block_size)
    for m in BATCHES:
        check_against_dense(layer, torch.randn(m, 160), torch.float32)


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("compute_dtype", FLOAT_DTYPES, ids=str)
def test_compute_dtype_decides_the_product_and_x_the_result(compute_dtype, x_dtype):
    layer = nf4_layer(24, 40, compute_dtype=compute_dtype)
    for m in BATCHES:
        x = torch.randn(m, 40, dtype=x_dtype)
        check_against_dense(layer, x, compute_dtype)
        plain = copy.deepcopy(layer)
        plain.compute_dtype = None
        assert same_bits(layer(x), plain(x.to(compute_dtype)).to(x_dtype))


@pytest.mark.parametrize("m", BATCHES)
def test_autocast_decides_the_product_and_the_result(m):
    layer = nf4_layer(24, 40)
    x = torch.randn(m, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert same_bits(y, layer(x.bfloat16()))
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


def test_a_compute_dtype_wins_over_autocast():
    layer, x = nf4_layer(24, 40, compute_dtype=torch.float32), torch.randn(3, 40)
    outside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer(x), outside)


@pytest.mark.parametrize("m", BATCHES)
def test_x_of_any_rank_and_stride_gives_the_same_bits(m):
    layer = nf4_layer(24, 40)
    x = torch.randn(2 * m, 40)
    y = layer(x)
    assert same_bits(layer(x.view(2, m, 40)), y.view(2, m, 24))
    assert same_bits(layer(x.t().contiguous().t()), y)
    wide = torch.zeros(2 * m, 80)
    wide[:, ::2] = x
    assert same_bits(layer(wide[:, ::2]), y)
    assert same_bits(layer(x.view(2, m, 40).transpose(0, 1)), y.view(2, m, 24).transpose(0, 1))
    assert same_bits(layer(x[0]), layer(x[:1])[0])
    assert same_bits(layer(x[:1].expand(3, 40)), layer(x[:1].repeat(3, 1)))


def test_a_gradient_of_any_stride_is_taken():
    layer = nf4_layer(24, 40)
    for m in BATCHES:
        x = torch.randn(m, 40, requires_grad=True)
        dy = torch.randn(24, m).t()
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        (expected,) = torch.autograd.grad(layer(x), x, dy.contiguous())
        assert same_bits(dx, expected)
        (dx,) = torch.autograd.grad(layer(x).sum(), x)
        (expected,) = torch.autograd.grad(layer(x), x, torch.ones(m, 24))
        assert same_bits(dx, expected)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (0, 3, 40)], ids=str)
def test_no_tokens_give_no_tokens(shape):
    layer, x = nf4_layer(24, 40), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    y.sum().backward()
    assert x.grad.shape == shape


def test_one_thread_and_two_give_the_same_bits():
    layer, x = nf4_layer(300, 520), torch.randn(SWITCH, 520, requires_grad=True)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        results.append((y, dx))
    for y, dx in results[1:]:
        assert same_bits(y, results[0][0])
        assert same_bits(dx, results[0][1])


@over_dtypes
def test_training_evaluation_and_inference_mode_give_the_same_numbers_and_keep_the_bytes(dtype):
    layer = nf4_layer(37, 45)
    stored = state_bits(layer)
    for m in BATCHES:
        x = torch.randn(m, 45, dtype=dtype, requires_grad=True)
        trained = layer.train()(x)
        trained.sum().backward()
        evaluated = layer.eval()(x)
        evaluated.sum().backward()
        with torch.no_grad():
            silent = layer(x)
        with torch.inference_mode():
            inferred = layer(x)
        for y in (evaluated, silent, inferred, layer.train()(x)):
            assert same_bits(trained, y)
    assert state_bits(layer) == stored


def test_a_gradient_flows_after_an_evaluation():
    layer, x = nf4_layer(24, 40), torch.randn(3, 40, requires_grad=True)
    with torch.inference_mode():
        layer.eval()(x)
    layer.train()(x).sum().backward()
    assert same_bits(x.grad[0], x.grad[1])
    assert (x.grad != 0).all()


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "dispatcher"])
def test_second_derivatives_match_the_dense_layer(m, through_dispatcher):
    layer = nf4_layer(24, 40)
    w = layer.dequantize()
    layer.bias.requires_grad_()

    def second_derivatives(linear) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, m * 40).view(m, 40).requires_grad_()
        v = torch.linspace(1, 2, m * 40).view(m, 40)
        y = linear(x)
        dx, db = torch.autograd.grad(y.pow(3).sum(), (x, layer.bias), create_graph=True)
        return list(torch.autograd.grad((dx * v).sum() + db.pow(2).sum(), (x, layer.bias)))

    if through_dispatcher:
        with dispatcher():
            ours = second_derivatives(layer)
    else:
        ours = second_derivatives(layer)
    for actual, expected in zip(
        ours, second_derivatives(lambda x: F.linear(x, w, layer.bias)), strict=True
    ):
        assert_near(actual, expected)


def test_the_gradient_of_the_gradient_is_the_layer_itself():
    layer = nf4_layer(12, 20, bias=False)
    x, dy = torch.randn(3, 20, requires_grad=True), torch.randn(3, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    v = torch.randn(3, 20)
    (ddy,) = torch.autograd.grad(dx, dy, v)
    torch.testing.assert_close(ddy, layer(v))


def test_products_in_turn_do_not_disturb_each_other():
    # All share one workspace.
    small, large = nf4_layer(16, 32), nf4_layer(96, 128)
    x_small, x_large = torch.randn(9, 32), torch.randn(9, 128)
    expected = small(x_small), large(x_large)
    x = x_small.clone().requires_grad_()
    y = small(x)
    assert same_bits(large(x_large), expected[1])
    assert same_bits(y, expected[0])
    y.sum().backward()
    (expected_dx,) = torch.autograd.grad(small(x).sum(), x)
    assert same_bits(x.grad, expected_dx)


def test_a_default_device_does_not_reach_into_a_product():
    layer, x = nf4_layer(24, 40), torch.randn(9, 40)

    def under_another_default() -> torch.Tensor:
        with torch.device("meta"):
            assert nf4_layer(24, 40).weight.is_meta
            return layer(x)

    with ThreadPoolExecutor(1) as fresh_thread:  # one that has no workspace yet
        y = fresh_thread.submit(under_another_default).result()
    assert same_bits(y, layer(x))


def test_threads_of_python_do_not_disturb_each_other():
    layers = [nf4_layer(256, 512) for _ in range(4)]
    batches = [torch.randn(m, 512) for m in (1, 9, 20, 33)]
    expected = [layer(x) for layer, x in zip(layers, batches, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            results = pool.map(lambda layer, x: layer(x), layers, batches)
            for y, wanted in zip(results, expected, strict=True):
                assert same_bits(y, wanted)


# ---- errors


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 41), r"nf4_linear: x has shape \[3, 41\], w has k=40: want \[..., 40\]"),
        (torch.randn(40, 3), r"x has shape \[40, 3\], w has k=40"),
        (torch.tensor(1.0), r"x has shape \[\], w has k=40"),
        (torch.randn(3, 40, dtype=torch.float64), "x is torch.float64, want float32"),
        (torch.ones(3, 40, dtype=torch.int64), "x is torch.int64, want float32"),
        (torch.randn(3, 40, device="meta"), "x is on meta, the weight is on cpu"),
        (torch.randn(3, 40, dtype=torch.complex64), "x is torch.complex64, want float32"),
    ],
    ids=["k", "transposed", "scalar", "float64", "int64", "meta", "complex"],
)
def test_an_x_that_does_not_fit_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        nf4_layer(24, 40)(x)


@pytest.mark.parametrize("how", ["compute_dtype", "autocast"])
def test_integers_are_not_cast_to_the_compute_dtype(how):
    layer = nf4_layer(24, 40, compute_dtype=torch.bfloat16 if how == "compute_dtype" else None)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        pytest.raises(ValueError, match=r"x is torch.int64, want float32, bfloat16 or float16"),
    ):
        layer(torch.ones(3, 40, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features is 0, want at least 1"),
        ({"out_features": -1}, "out_features is -1, want at least 1"),
        ({"block_size": 100}, "block_size is 100, want one of"),
        ({"compute_dtype": torch.float64}, "compute_dtype is torch.float64, want one of"),
        ({"compute_dtype": torch.uint8}, "compute_dtype is torch.uint8, want one of"),
    ],
)
def test_constructor_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"NF4Linear: {message}"):
        NF4Linear(**{"in_features": 64, "out_features": 32, **arguments})


def test_from_linear_refuses_what_is_not_a_linear_layer():
    with pytest.raises(ValueError, match=r"linear is Conv1d, want an nn.Linear"):
        NF4Linear.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match=r"linear is NF4Linear, want an nn.Linear"):
        NF4Linear.from_linear(nf4_layer(8, 8))


def test_from_linear_refuses_a_nan():
    linear = nn.Linear(64, 8)
    linear.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf in block 3"):
        NF4Linear.from_linear(linear)


# ---- what it is


def test_it_is_no_nn_linear_and_has_only_frozen_bytes_as_weight():
    for double_quant in (True, False):
        layer = nf4_layer(24, 40, double_quant=double_quant)
        assert not isinstance(layer, nn.Linear)
        assert list(layer.buffers()) == []
        for name, parameter in layer.named_parameters():
            assert type(parameter) is nn.Parameter
            assert not parameter.requires_grad
            if name != "bias":
                assert name.startswith("weight")
                assert parameter.dtype == torch.uint8
                assert parameter.dim() >= 1  # FSDP2 shards no scalars
        assert layer.weight_shape == (24, 40)
        assert (layer.in_features, layer.out_features) == (40, 24)


def test_its_shapes_are_known_from_the_constructor():
    for n, k, block_size in ((24, 40, 64), (3, 5, 32), (64, 128, 4096)):
        for double_quant in (True, False):
            options = {"block_size": block_size, "double_quant": double_quant}
            made = nf4_layer(n, k, **options)
            new = NF4Linear(k, n, **options)
            assert {name: p.shape for name, p in new.named_parameters()} == {
                name: p.shape for name, p in made.named_parameters()
            }


def test_a_new_layer_is_zero():
    layer = NF4Linear(40, 24)
    assert (layer.dequantize() == 0).all()
    assert (layer(torch.randn(3, 40)) == 0).all()


def test_from_linear_copies_and_leaves_the_layer_as_it_is():
    linear = nn.Linear(40, 24).eval()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = NF4Linear.from_linear(linear)
    assert not layer.training
    assert linear.weight.requires_grad
    linear.bias.data.fill_(7.0)
    assert same_bits(layer.bias, bias)
    assert same_bits(linear.weight, weight)
    assert NF4Linear.from_linear(linear, device="meta").weight.is_meta


def test_dequantize_writes_into_out():
    layer, out = nf4_layer(24, 40), torch.empty(24, 40, dtype=torch.float16)
    assert layer.dequantize(torch.float16, out=out) is out
    assert same_bits(out, layer.dequantize(torch.float16))
    assert same_bits(layer.nf4_weight.dequantize(), layer.dequantize())


def test_its_repr_names_the_numbers():
    assert repr(nf4_layer(24, 40, block_size=32, compute_dtype=torch.bfloat16)) == (
        "NF4Linear(in_features=40, out_features=24, bias=True, block_size=32, "
        "double_quant=True, compute_dtype=torch.bfloat16)"
    )
