"""LoRALinear on a GPU: numbers, dropout, and what it keeps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_native import LoRALinear, NF4Linear, _core, ops
from qlora_native.ops.storage import execution
from support import (
    assert_near,
    assert_within,
    dense_weight,
    dispatcher,
    expected_lora_results,
    lora_layer,
    lora_results,
    make_base,
    over_bases,
    over_dtypes,
    same_bits,
    state_bits,
)

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

TOKENS = (1, 2, 3, 8, 9, 17, 33, 64, 65, 130, 600, 2100)
FEW_TOKENS = (1, 3, 17, 65, 200)

# (n, k): what the 16-bit kernels are made for, with whole tiles and with tails, and what goes to
# torch's.
SHAPES = [(256, 512), (200, 328), (136, 72), (8, 16), (37, 70), (130, 449)]

over_shapes = pytest.mark.parametrize(("n", "k"), SHAPES)


def layer_on(
    device: torch.device, kind: str, dtype: torch.dtype, n: int, k: int, **options
) -> LoRALinear:
    """Made and quantised on the CPU."""
    return lora_layer(make_base(kind, dtype, n, k), **options).to(device)


def batch_on(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def check_against_fp64(layer: LoRALinear, m: int, dtype: torch.dtype) -> None:
    device = layer.lora_a.device
    x = batch_on(device, m, layer.in_features, dtype=dtype)
    dy = batch_on(device, m, layer.out_features, dtype=dtype)
    actual = lora_results(layer, x, dy)
    assert actual["da"].dtype == actual["db"].dtype == layer.lora_a.dtype
    assert actual["y"].dtype == actual["dx"].dtype == dtype
    for name, expected in expected_lora_results(layer, x, dy).items():
        assert_within(actual[name], expected)


# ---- numbers


@over_bases
@over_dtypes
@over_shapes
def test_results_match_fp64_for_every_number_of_tokens(device, kind, n, k, dtype):
    layer = layer_on(device, kind, dtype, n, k, r=8, lora_alpha=12)
    for m in TOKENS:
        check_against_fp64(layer, m, dtype)


@over_dtypes
@pytest.mark.parametrize("factors_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factors_of_every_dtype_get_gradients_of_their_own(device, dtype, factors_dtype):
    layer = layer_on(device, "nf4", dtype, 136, 192, r=8)
    layer.lora_a.data, layer.lora_b.data = (
        p.data.to(factors_dtype) for p in (layer.lora_a, layer.lora_b)
    )
    for m in FEW_TOKENS:
        check_against_fp64(layer, m, dtype)


@over_dtypes
@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 15, 16, 17, 32, 64, 72, 128, 136])
def test_every_rank_works(device, r, dtype):
    layer = layer_on(device, "nf4", dtype, 136, 192, r=r)
    for m in FEW_TOKENS:
        check_against_fp64(layer, m, dtype)


@pytest.mark.parametrize("m", [1, 16, 512, 2100])
@pytest.mark.parametrize("r", [16, 64])
def test_a_layer_of_a_models_size_matches_fp64(m, r):
    layer = layer_on(torch.device("cuda"), "nf4", torch.bfloat16, 4096, 4096, r=r)
    check_against_fp64(layer, m, torch.bfloat16)


@over_bases
@over_dtypes
def test_at_the_start_it_is_its_base_bit_for_bit(device, kind, dtype):
    base = make_base(kind, dtype, 136, 192).to(device)
    layer = LoRALinear(base, r=8, lora_dropout=0.5)
    assert layer.lora_a.device == layer.lora_b.device == layer.base.weight.device
    for m in FEW_TOKENS:
        x = batch_on(device, m, 192, dtype=dtype)
        for mode in (True, False):
            assert same_bits(layer.train(mode)(x), base(x))


@over_dtypes
@over_bases
def test_the_cpu_and_the_gpu_agree(device, kind, dtype):
    on_cpu = lora_layer(make_base(kind, dtype, 136, 192), r=8)
    on_gpu = copy.deepcopy(on_cpu).to(device)
    for m in FEW_TOKENS:
        x, dy = (torch.randn(m, size).to(dtype) for size in (192, 136))
        expected = expected_lora_results(on_cpu, x, dy)
        actual = lora_results(on_gpu, x.to(device), dy.to(device))
        for name, value in actual.items():
            assert value.device == on_gpu.lora_a.device
            assert_within(value.cpu(), expected[name])


@over_dtypes
def test_without_a_bias_it_works_the_same(device, dtype):
    base = NF4Linear.from_linear(nn.Linear(192, 136, bias=False))
    layer = lora_layer(base, r=8).to(device)
    w = dense_weight(layer.base, torch.float32) + layer.scaling * layer.lora_b @ layer.lora_a
    roundings = 8 * torch.finfo(dtype).eps
    for m in FEW_TOKENS:
        x = batch_on(device, m, 192, dtype=dtype)
        assert_near(layer(x).float(), F.linear(x.float(), w), max(roundings, 1e-4))


@over_dtypes
@pytest.mark.parametrize("shape", [(0, 192), (2, 0, 192)], ids=str)
def test_no_tokens_give_gradients_of_zero(device, shape, dtype):
    layer = layer_on(device, "nf4", dtype, 136, 192, lora_dropout=0.5)
    x, dy = (batch_on(device, *shape[:-1], size, dtype=dtype) for size in (192, 136))
    actual = lora_results(layer, x, dy)
    assert actual["y"].shape == (*shape[:-1], 136)
    assert actual["dx"].shape == shape
    assert (actual["da"] == 0).all()
    assert (actual["db"] == 0).all()


@over_dtypes
@pytest.mark.parametrize("m", [1, 17, 65])
def test_each_gradient_is_the_same_when_x_needs_none(device, m, dtype):
    layer = layer_on(device, "nf4", dtype, 136, 192, r=8)
    x, dy = (batch_on(device, m, size, dtype=dtype) for size in (192, 136))
    full = lora_results(layer, x, dy)
    y = layer(x)
    da, db = torch.autograd.grad(y, (layer.lora_a, layer.lora_b), dy)
    for name, value in {"y": y, "da": da, "db": db}.items():
        assert same_bits(value, full[name])


# ---- the same bits


@over_bases
@over_dtypes
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (37, 70)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_results_are_the_same_from_run_to_run(device, kind, n, k, p, dtype):
    layer = layer_on(device, kind, dtype, n, k, r=16, lora_dropout=p)
    for m in FEW_TOKENS:
        x, dy = (batch_on(device, m, size, dtype=dtype) for size in (k, n))
        runs = []
        for _ in range(4):
            torch.manual_seed(3)
            runs.append(lora_results(layer, x, dy))
        for run in runs[1:]:
            for name, value in run.items():
                assert same_bits(value, runs[0][name]), name


@over_bases
@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_both_doors_give_the_same_bits(device, kind, p, dtype):
    layer = layer_on(device, kind, dtype, 136, 192, lora_dropout=p)
    for m in FEW_TOKENS:
        x, dy = (batch_on(device, m, size, dtype=dtype) for size in (192, 136))
        torch.manual_seed(5)
        direct = lora_results(layer, x, dy)
        torch.manual_seed(5)
        with dispatcher() as seen:
            dispatched = lora_results(layer, x, dy)
        assert seen == ["lora_linear", "lora_linear_backward"]
        for name in direct:
            assert same_bits(direct[name], dispatched[name])


@over_dtypes
@pytest.mark.parametrize("m", [1, 17, 65])
def test_x_of_any_rank_gives_the_same_bits(device, m, dtype):
    layer = layer_on(device, "nf4", dtype, 136, 192)
    x, dy = (batch_on(device, 2 * m, size, dtype=dtype) for size in (192, 136))
    flat = lora_results(layer, x, dy)
    cube = lora_results(layer, x.view(2, m, 192), dy.view(2, m, 136))
    for name in flat:
        assert same_bits(cube[name].flatten(), flat[name].flatten())
    one = lora_results(layer, x[0], dy[0])
    as_batch = lora_results(layer, x[:1], dy[:1])
    for name in flat:
        assert same_bits(one[name].flatten(), as_batch[name].flatten())


@over_bases
@over_dtypes
@pytest.mark.parametrize(("n", "k"), [(136, 192), (37, 70)])
def test_strides_and_addresses_do_not_matter(device, kind, n, k, dtype):
    layer = layer_on(device, kind, dtype, n, k)
    for m in FEW_TOKENS:
        x, dy = (batch_on(device, m, size, dtype=dtype) for size in (k, n))
        expected = expected_lora_results(layer, x, dy)

        def views(tensor: Tensor) -> list[Tensor]:
            rows, columns = tensor.shape
            inside = tensor.new_zeros(rows, columns + 3)[:, 1 : columns + 1]
            shifted = tensor.new_zeros(rows * columns + 1)[1:].view(rows, columns)
            return [
                tensor.t().contiguous().t(),
                torch._neg_view(-tensor),
                inside.copy_(tensor),
                shifted.copy_(tensor),
            ]

        for x_view, dy_view in zip(views(x), views(dy), strict=True):
            actual = lora_results(layer, x_view, dy_view)
            for name, value in actual.items():
                assert_within(value, expected[name])


@over_dtypes
def test_factors_need_not_be_aligned_nor_contiguous(device, dtype):
    layer = layer_on(device, "nf4", dtype, 136, 192, r=8)
    strided, shifted = copy.deepcopy(layer), copy.deepcopy(layer)
    for name in ("lora_a", "lora_b"):
        factor = getattr(layer, name).detach()
        getattr(strided, name).data = factor.t().contiguous().t()
        memory = factor.new_empty(factor.numel() + 1)
        getattr(shifted, name).data = memory[1:].view_as(factor).copy_(factor)
    for m in FEW_TOKENS:
        x, dy = (batch_on(device, m, size, dtype=dtype) for size in (192, 136))
        expected = expected_lora_results(layer, x, dy)
        for other in (strided, shifted):
            for name, value in lora_results(other, x, dy).items():
                assert_within(value, expected[name])


# ---- dropout


def mask_on(device: torch.device, shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """1 / (1 - p) where an element is kept, else 0, in fp32."""
    ones = torch.ones(shape, device=device)
    out = torch.empty_like(ones)
    _core.dropout(ones, p, torch.tensor([seed], device=device), out, *execution(ones))
    return out


@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, 2**63 - 2])
def test_the_gpu_drops_what_the_cpu_drops(device, p, seed, dtype):
    for shape in ((1, 1), (3, 7), (5, 1023), (257, 512)):
        x = torch.randn(shape).to(dtype)
        on_cpu, on_gpu = torch.empty_like(x), torch.empty_like(x, device=device)
        _core.dropout(x, p, torch.tensor([seed]), on_cpu, *execution(x))
        moved = x.to(device, copy=True)
        _core.dropout(moved, p, torch.tensor([seed], device=device), on_gpu, *execution(moved))
        assert same_bits(on_gpu.cpu(), on_cpu)
        _core.dropout(moved, p, torch.tensor([seed], device=device), moved, *execution(moved))
        assert same_bits(moved, on_gpu)  # in place
        memory = torch.empty(x.numel() + 1, dtype=dtype, device=device)
        shifted = memory[1:].view(shape).copy_(x)
        _core.dropout(shifted, p, torch.tensor([seed], device=device), shifted, *execution(moved))
        assert same_bits(shifted, on_gpu)  # from any address


@over_bases
@over_dtypes
@pytest.mark.parametrize(("n", "k"), [(136, 192), (37, 70)])
def test_results_match_fp64_with_the_same_mask(device, kind, n, k, dtype):
    layer = layer_on(device, kind, dtype, n, k, r=8, lora_dropout=0.4)
    base = layer.base
    weight = base.tensors() if isinstance(base, NF4Linear) else base.weight
    for m in FEW_TOKENS:
        x, dy = (batch_on(device, m, size, dtype=dtype) for size in (k, n))
        x.requires_grad_()
        seed = torch.tensor([m], device=device)
        bias = base.bias.to(dtype)
        factors = layer.lora_a, layer.lora_b
        y = ops.lora_linear(x, weight, bias, *factors, layer.scaling, 0.4, seed)
        dx, da, db = torch.autograd.grad(y, (x, *factors), dy)
        mask = mask_on(device, (m, k), 0.4, m)
        expected = expected_lora_results(layer, x, dy, mask)
        for name, value in {"y": y, "dx": dx, "da": da, "db": db}.items():
            assert_within(value, expected[name])


def test_torchs_generator_of_the_device_decides_the_mask(device):
    layer = layer_on(device, "nf4", torch.float32, 136, 192, lora_dropout=0.5)
    x = batch_on(device, 17, 192, dtype=torch.bfloat16)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert same_bits(layer(x), first)
    assert not same_bits(first, second)
    torch.manual_seed(4)
    assert not same_bits(layer(x), first)


def test_evaluation_drops_nothing_and_leaves_the_generator_alone(device):
    layer = layer_on(device, "nf4", torch.float32, 136, 192, lora_dropout=0.5).eval()
    x = batch_on(device, 17, 192, dtype=torch.bfloat16)
    torch.manual_seed(3)
    expected = torch.rand(5, device=device)
    torch.manual_seed(3)
    y = layer(x)
    assert same_bits(torch.rand(5, device=device), expected)
    layer.adapters["default"].lora_dropout = 0.0
    assert same_bits(layer.train()(x), y)


def test_a_seed_elsewhere_is_refused_by_name():
    device = torch.device("cuda")
    layer = layer_on(device, "nf4", torch.float32, 136, 192)
    arguments = (layer.base.tensors(), None, layer.lora_a, layer.lora_b, 1.0, 0.5)
    with pytest.raises(ValueError, match="seed"):
        ops.lora_linear(torch.randn(3, 192, device=device), *arguments, torch.tensor([5]))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_checkpointing_recomputes_the_same_masks(device, m, use_reentrant, autocast):
    model = nn.Sequential(
        lora_layer(make_base("nf4", n=48, k=72), lora_dropout=0.5),
        nn.GELU(),
        lora_layer(make_base("dense", n=40, k=48), lora_dropout=0.25),
    ).to(device)
    x = batch_on(device, m, 72, dtype=torch.float32).requires_grad_()
    dy = batch_on(device, m, 40, dtype=torch.float32)

    def gradients(function) -> list[Tensor]:
        torch.manual_seed(11)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = function(x)
        torch.rand(3, device=device)  # the generator moves on between forward and backward
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy.to(y.dtype))
        return [y, *(leaf.grad for leaf in leaves)]

    plain = gradients(model)
    recomputed = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    for a, b in zip(plain, recomputed, strict=True):
        assert same_bits(a, b)


# ---- dtypes and derivatives


@over_bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_numbers_of_the_cast_layer(device, kind, dtype):
    layer = layer_on(device, kind, torch.float32, 136, 192)
    cast = copy.deepcopy(layer)
    cast.base.to(dtype)
    for m in FEW_TOKENS:
        x = batch_on(device, m, 192, dtype=torch.float32)
        dy = batch_on(device, m, 136, dtype=dtype)
        with torch.autocast(device.type, dtype):
            actual = lora_results(layer, x, dy)
        expected = lora_results(cast, x.to(dtype), dy)
        assert actual["y"].dtype == dtype
        assert actual["dx"].dtype == torch.float32
        for name in actual:
            assert same_bits(actual[name], expected[name].to(actual[name].dtype))


def test_the_compute_dtype_of_the_base_is_that_of_the_update(device):
    layer = layer_on(device, "nf4", torch.float32, 136, 192)
    plain = copy.deepcopy(layer)
    layer.base.compute_dtype = torch.bfloat16
    for m in FEW_TOKENS:
        x = batch_on(device, m, 192, dtype=torch.float32)
        y = layer(x)
        assert y.dtype == torch.float32
        assert same_bits(y, plain(x.bfloat16()).float())


@over_bases
@pytest.mark.parametrize("shape", [(1, 72), (17, 72), (2, 3, 72), (72,)], ids=str)
@pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_match_the_dense_composition(device, kind, shape, through_dispatcher, p):
    layer = layer_on(device, kind, torch.float32, 40, 72, lora_dropout=p)
    w, bias, scaling = dense_weight(layer.base, torch.float32), layer.base.bias, layer.scaling
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=device)  # as the layer will draw it
    mask = mask_on(device, shape, p, int(seed))

    def composition(x: Tensor) -> Tensor:
        update = F.linear(F.linear(x * mask, layer.lora_a), layer.lora_b)
        return F.linear(x, w, bias) + scaling * update

    def second_derivatives(function) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, math.prod(shape), device=device).view(shape).requires_grad_()
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


# ---- what is kept


@over_bases
@over_dtypes
def test_a_call_changes_nothing_that_is_stored(device, kind, dtype):
    layer = layer_on(device, kind, dtype, 136, 192, lora_dropout=0.5)
    before = state_bits(layer)
    for m in FEW_TOKENS:
        x, dy = (batch_on(device, m, size, dtype=dtype) for size in (192, 136))
        lora_results(layer, x, dy)
        layer.eval()(x)
        layer.train()
    assert state_bits(layer) == before


@over_bases
@pytest.mark.parametrize("m", [2, 50, 1050])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_backward_keeps_x_and_x_times_a_and_nothing_else(device, kind, m, dropout):
    layer = layer_on(device, kind, torch.bfloat16, 96, 128, r=8, lora_dropout=dropout)
    x = batch_on(device, 2, m, 128, dtype=torch.bfloat16).requires_grad_()
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    seed = [(1,)] if dropout else []
    assert sorted(tuple(t.shape) for t in kept) == [*seed, (2, m, 128), (2 * m, 8)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept), "x itself, not a copy"
