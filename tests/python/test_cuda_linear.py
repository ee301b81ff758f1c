"""NF4Linear on a GPU: the numbers of every way a product may take there."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_native import NF4Linear, _core
from qlora_native.ops import base_product
from qlora_native.ops.storage import BLOCK_SIZES
from support import (
    FLOAT_DTYPES,
    Approximate,
    assert_near,
    assert_within,
    check_against_dense,
    dispatcher,
    nf4_layer,
    over_dtypes,
    over_nesting,
    same_bits,
    state_bits,
)

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

# From one token to more than any kernel of the core takes, about the edges of tiles.
TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 600, 2100)
FEW_TOKENS = (1, 3, 8, 17, 65, 200)

# (n, k): whole tiles; tails of every kind, rows of an odd length, rows shorter than a block.
SHAPES = [(256, 512), (200, 320), (136, 1032), (257, 200), (96, 65), (37, 70), (130, 449), (1, 1)]

over_shapes = pytest.mark.parametrize(("n", "k"), SHAPES)
# The kernels that the plan names, and the workspace whatever it names.
over_choices = pytest.mark.parametrize("choice", ["planned", "workspace"])


@pytest.fixture
def choose(monkeypatch):
    def set_choice(choice: str) -> None:
        if choice == "workspace":
            monkeypatch.setattr(base_product, "prefers_native", lambda *_: False)

    return set_choice


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def layer_on(device: torch.device, n: int, k: int, bias: bool = True, **options) -> NF4Linear:
    """Quantised on the CPU, so that a test of products owes nothing to the GPU's quantiser."""
    return nf4_layer(n, k, bias, **options).to(device)


def forward_and_gradient(layer: NF4Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


# ---- against fp64


@over_dtypes
@over_shapes
@over_choices
def test_products_match_fp64_for_every_number_of_tokens(device, choose, choice, n, k, dtype):
    choose(choice)
    layer = layer_on(device, n, k)
    for m in TOKENS:
        check_against_dense(layer, randn(m, k, dtype=dtype, device=device), dtype)


@over_dtypes
@over_nesting
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_and_nesting_match_fp64(device, block_size, bias, double_quant, dtype):
    # Rows of whole blocks, of whole tiles across blocks, and of neither.
    for n, k in ((64, block_size), (72, 192), (40, 100)):
        layer = layer_on(device, n, k, bias, block_size=block_size, double_quant=double_quant)
        for m in FEW_TOKENS:
            check_against_dense(layer, randn(m, k, dtype=dtype, device=device), dtype)


@pytest.mark.parametrize("m", [1, 16, 64, 300, 2100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_of_a_models_size_matches_fp64(m, dtype):
    layer = layer_on(torch.device("cuda"), 4096, 4096, bias=False)
    check_against_dense(layer, randn(m, 4096, dtype=dtype, device="cuda"), dtype)


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_the_plan_names_its_strategies_as_tokens_grow(direction, n, k):
    plan = [
        _core.nf4_matmul_strategy(direction, m, n, k, "bfloat16", 64, 0)
        for m in (1, 8, 256, 1 << 15)
    ]
    assert plan == ["few_tokens", "few_tokens", "tiles", "workspace"]


@over_shapes
@over_dtypes
def test_every_product_has_a_plan(n, k, dtype):
    name = str(dtype).removeprefix("torch.")
    known = {"plain", "few_tokens", "tiles", "workspace"}
    for direction, m in itertools.product(("forward", "grad_input"), TOKENS):
        for block_size in BLOCK_SIZES:
            assert _core.nf4_matmul_strategy(direction, m, n, k, name, block_size, 0) in known


@over_dtypes
@over_shapes
def test_the_cpu_and_the_gpu_agree(device, n, k, dtype):
    on_cpu = nf4_layer(n, k)
    on_gpu = copy.deepcopy(on_cpu).to(device)
    w = on_cpu.dequantize(dtype)
    assert same_bits(on_gpu.dequantize(dtype).cpu(), w)
    for m in FEW_TOKENS:
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        expected_y = Approximate(x) @ Approximate(w).t() + Approximate(on_cpu.bias.to(dtype))
        expected_dx = Approximate(dy) @ Approximate(w)
        for layer, place in ((on_cpu, torch.device("cpu")), (on_gpu, device)):
            y, dx = forward_and_gradient(layer, x.to(place), dy.to(place))
            assert y.device == dx.device == layer.weight.device
            assert_within(y.cpu(), expected_y.rounded_to(dtype))
            assert_within(dx.cpu(), expected_dx.rounded_to(dtype))


def test_extreme_scales_match_fp64(device):
    # Rows whose scales are subnormal, huge, and zero; fp32 holds all of their products.
    layer = layer_on(device, 64, 256, bias=False, double_quant=False)
    scales = layer.weight_absmax.data.view(torch.float32).view(64, 4)
    for row, scale in enumerate((0.0, 2.0**-149, 2.0**-133, 2.0**-100, 2.0**100)):
        scales[row] = scale
    for dtype, m in itertools.product((torch.float32, torch.bfloat16), FEW_TOKENS):
        x = randn(m, 256, dtype=dtype, device=device)
        expected = Approximate(x) @ Approximate(layer.dequantize(dtype)).t()
        assert_within(layer(x), expected.rounded_to(dtype))


@over_dtypes
def test_a_nan_stays_in_its_row(device, dtype):
    layer = layer_on(device, 72, 320)
    for m in FEW_TOKENS:
        x = randn(m, 320, dtype=dtype, device=device)
        clean = layer(x)
        x[m // 2, 77] = torch.nan
        y = layer(x)
        assert y[m // 2].isnan().all()
        others = torch.arange(m, device=device) != m // 2
        assert same_bits(y[others], clean[others])


# ---- the same bits


@over_dtypes
@over_choices
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (130, 449)])
def test_results_are_the_same_from_run_to_run(device, choose, choice, n, k, dtype):
    choose(choice)
    layer = layer_on(device, n, k)
    for m in TOKENS:
        x, dy = (randn(m, size, dtype=dtype, device=device) for size in (k, n))
        first = forward_and_gradient(layer, x, dy)
        for _ in range(5):
            for a, b in zip(forward_and_gradient(layer, x, dy), first, strict=True):
                assert same_bits(a, b)


@over_dtypes
def test_training_evaluation_and_inference_mode_give_the_same_numbers_and_keep_the_bytes(
    device, dtype
):
    layer = layer_on(device, 136, 192)
    stored = state_bits(layer)
    for m in FEW_TOKENS:
        x = randn(m, 192, dtype=dtype, device=device).requires_grad_()
        trained = layer.train()(x)
        trained.sum().backward()
        evaluated = layer.eval()(x)
        with torch.no_grad():
            silent = layer(x)
        with torch.inference_mode():
            inferred = layer(x)
        for y in (evaluated, silent, inferred):
            assert same_bits(y, trained)
    assert state_bits(layer) == stored


@over_dtypes
@pytest.mark.parametrize(("n", "k"), [(72, 320), (37, 70)])
def test_both_doors_give_the_same_bits(device, n, k, dtype):
    layer = layer_on(device, n, k)
    for m in FEW_TOKENS:
        x, dy = (randn(m, size, dtype=dtype, device=device) for size in (k, n))
        direct = forward_and_gradient(layer, x, dy)
        with dispatcher() as seen:
            dispatched = forward_and_gradient(layer, x, dy)
        assert seen == ["nf4_linear", "nf4_linear_grad_input"]
        for a, b in zip(direct, dispatched, strict=True):
            assert same_bits(a, b)


# ---- shapes, strides and addresses


@over_dtypes
@pytest.mark.parametrize("shape", [(0, 192), (2, 0, 192), (0, 3, 192)], ids=str)
def test_no_tokens_give_no_tokens(device, shape, dtype):
    layer = layer_on(device, 136, 192)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 136)
    y.sum().backward()
    assert x.grad.shape == shape


@over_dtypes
@pytest.mark.parametrize("m", [1, 9, 70])
def test_x_of_any_rank_gives_the_same_bits(device, m, dtype):
    layer = layer_on(device, 136, 192)
    x = randn(2 * m, 192, dtype=dtype, device=device)
    y = layer(x)
    assert same_bits(layer(x.view(2, m, 192)), y.view(2, m, 136))
    assert same_bits(layer(x.view(1, 2, 1, m, 192)), y.view(1, 2, 1, m, 136))
    assert same_bits(layer(x[0]), layer(x[:1])[0])


def strided_views(x: Tensor) -> dict[str, Tensor]:
    """x[m, k] with other strides and addresses: the values are the same."""
    m, k = x.shape
    wide = x.new_zeros(m, 2 * k + 3)
    inside = wide[:, 1 : k + 1].copy_(x)  # rows that begin anywhere
    spread = x.new_zeros(m, 2 * k)[:, ::2].copy_(x)
    views = {
        "transposed": x.t().contiguous().t(),
        "inside": inside,
        "spread": spread,
        "reversed rows": x.flip(0).flip(0),
        "negative": torch._neg_view(-x),
    }
    for offset in (1, 2, 3, 5):  # contiguous, and not aligned to more than its elements
        memory = x.new_zeros(m * k + offset)
        views[f"offset {offset}"] = memory[offset:].view(m, k).copy_(x)
    for view in views.values():
        assert torch.equal(view, x)
    return views


@over_dtypes
@over_choices
@pytest.mark.parametrize(("n", "k"), [(136, 192), (37, 70)])
def test_strides_and_addresses_do_not_matter(device, choose, choice, n, k, dtype):
    choose(choice)
    layer = layer_on(device, n, k)
    w = Approximate(layer.dequantize(dtype))
    bias = Approximate(layer.bias.to(dtype))
    for m in FEW_TOKENS:
        x, dy = (randn(m, size, dtype=dtype, device=device) for size in (k, n))
        expected_y = (Approximate(x) @ w.t() + bias).rounded_to(dtype)
        expected_dx = (Approximate(dy) @ w).rounded_to(dtype)
        gradients = strided_views(dy)
        for name, view in strided_views(x).items():
            y, dx = forward_and_gradient(layer, view, gradients[name])
            assert_within(y, expected_y)
            assert_within(dx, expected_dx)


@over_dtypes
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_a_weight_and_bias_need_not_be_aligned(device, offset, dtype):
    layer = layer_on(device, 136, 192)
    shifted = copy.deepcopy(layer)
    for name in ("weight", "weight_absmax", "bias"):  # bytes, bytes, and numbers
        parameter = getattr(shifted, name)
        memory = parameter.new_empty(parameter.numel() + offset)
        parameter.data = memory[offset:].view_as(parameter).copy_(parameter)
    w = Approximate(layer.dequantize(dtype))
    bias = Approximate(layer.bias.to(dtype))
    for m in FEW_TOKENS:
        x, dy = (randn(m, size, dtype=dtype, device=device) for size in (192, 136))
        y, dx = forward_and_gradient(shifted, x, dy)
        assert_within(y, (Approximate(x) @ w.t() + bias).rounded_to(dtype))
        assert_within(dx, (Approximate(dy) @ w).rounded_to(dtype))


def test_products_in_turn_do_not_disturb_each_other(device, choose):
    choose("workspace")  # which all share
    small, large = layer_on(device, 16, 32), layer_on(device, 512, 1024)
    x_small = randn(9, 32, dtype=torch.bfloat16, device=device)
    x_large = randn(700, 1024, dtype=torch.bfloat16, device=device)
    expected = small(x_small), large(x_large)
    for _ in range(20):
        results = small(x_small), large(x_large), small(x_small)
        for y, wanted in zip(results, (*expected, expected[0]), strict=True):
            assert same_bits(y, wanted)


# ---- dtypes and derivatives


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("compute_dtype", FLOAT_DTYPES, ids=str)
def test_compute_dtype_decides_the_product_and_x_the_result(device, compute_dtype, x_dtype):
    layer = layer_on(device, 72, 192, compute_dtype=compute_dtype)
    for m in FEW_TOKENS:
        check_against_dense(layer, randn(m, 192, dtype=x_dtype, device=device), compute_dtype)


@pytest.mark.parametrize("m", FEW_TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_product_and_the_result(device, m, dtype):
    layer = layer_on(device, 72, 192)
    x = randn(m, 192, device=device).requires_grad_()
    with torch.autocast(device.type, dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert same_bits(y, layer(x.to(dtype)))
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("m", [1, 9, 70])
@pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "dispatcher"])
def test_second_derivatives_match_the_dense_layer(device, m, through_dispatcher):
    layer = layer_on(device, 72, 128)
    w = layer.dequantize()
    layer.bias.requires_grad_()

    def second_derivatives(linear) -> list[Tensor]:
        x = torch.linspace(-1, 1, m * 128, device=device).view(m, 128).requires_grad_()
        v = torch.linspace(1, 2, m * 128, device=device).view(m, 128)
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


@over_dtypes
@pytest.mark.parametrize("m", [1, 9, 70])
def test_the_gradient_of_the_gradient_is_the_layer_itself(device, m, dtype):
    layer = layer_on(device, 72, 128, bias=False)
    x, dy, v = (randn(m, size, dtype=dtype, device=device) for size in (128, 72, 128))
    x.requires_grad_()
    dy.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, v)
    assert same_bits(ddy, layer(v))


# ---- errors


@pytest.mark.parametrize("x_device", ["cpu", "meta"])
def test_an_x_elsewhere_is_refused_by_both_names(x_device):
    layer = layer_on(torch.device("cuda"), 72, 128)
    x = torch.randn(3, 128, device=x_device)
    with pytest.raises(ValueError, match=f"x is on {x_device}, the weight is on cuda:0"):
        layer(x)
    with pytest.raises(ValueError, match="x is on cuda:0, the weight is on cpu"):
        layer.cpu()(torch.randn(3, 128, device="cuda"))


def test_parts_of_a_weight_on_different_devices_are_refused_by_name():
    layer = layer_on(torch.device("cuda"), 72, 128)
    layer.weight_absmax.data = layer.weight_absmax.data.cpu()
    for m in FEW_TOKENS:
        with pytest.raises(ValueError, match="absmax"):
            layer(torch.randn(m, 128, device="cuda"))
