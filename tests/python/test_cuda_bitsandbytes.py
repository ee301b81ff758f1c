"""Beside bitsandbytes on a GPU: the same bytes, the same values of them, and their products.

Of the deviations of its CPU backend that test_bitsandbytes.py lists, its CUDA one has the fourth
alone: it sums the mean of the scales in another order. And it is compiled with --use_fast_math: an
fp32 or fp16 weight may get the code on the other side of a threshold that w/absmax all but hits;
`differs_only_near_thresholds` says how near that is.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native import NF4Linear, NF4Weight, nf4_quantize
from qlora_native.ops.storage import NF4Tensors
from support import (
    BLOCK_SIZES,
    CUDA_TEST_DEVICE,
    Approximate,
    assert_within,
    differs_only_near_thresholds,
    import_bitsandbytes,
    over_dtypes,
    over_nesting,
    same_bits,
)

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

N, K = 192, 256
over_block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes; skipped where it cannot be imported, or has no library for this GPU."""
    with import_bitsandbytes():
        module = pytest.importorskip("bitsandbytes")
    try:
        module.functional.quantize_4bit(torch.ones(64, device=CUDA_TEST_DEVICE), quant_type="nf4")
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes does not run on {CUDA_TEST_DEVICE} here: {error}")
    # It compiles its portable functions with torch.compile, which these small tensors do not repay.
    with torch.compiler.set_stance("force_eager"):
        yield module


def quantize_with(bnb, w: Tensor, block_size: int, nested: bool):
    try:
        codes, state = bnb.functional.quantize_4bit(
            w, blocksize=block_size, quant_type="nf4", compress_statistics=nested
        )
    except ValueError as error:  # as 0.45 did for blocks of 32
        pytest.skip(f"bitsandbytes: {error}")
    return codes.flatten(), state


def tensors_of(codes: Tensor, state, n: int, k: int) -> NF4Tensors:
    """Its bytes as ours."""
    if state.nested:
        scales = (
            state.absmax,
            state.state2.absmax.view(torch.uint8),
            state.offset.reshape(1).view(torch.uint8),
        )
    else:
        scales = (state.absmax.view(torch.uint8).view(-1, 4), None, None)
    return NF4Tensors(codes, *scales, n, k, state.blocksize)


@over_dtypes
@over_block_sizes
@pytest.mark.parametrize("shape", [(N, K), (64, 4096), (1000, 512)], ids=str)
def test_codes_and_scales_are_equal(bnb, shape, block_size, dtype):
    w = (torch.randn(shape) * torch.logspace(-3, 1, shape[-1])).to(dtype).cuda()
    codes, state = quantize_with(bnb, w, block_size, nested=False)
    ours = nf4_quantize(w, block_size, double_quant=False)
    assert torch.equal(ours.absmax, state.absmax)
    assert differs_only_near_thresholds(w, ours, codes)


@over_dtypes
@over_block_sizes
def test_nested_scales_are_equal_given_one_mean(bnb, block_size, dtype):
    w = torch.randn(1024, 1024).to(dtype).cuda()
    absmax = nf4_quantize(w, block_size, double_quant=False).absmax
    ours = nf4_quantize(w, block_size).tensors
    assert ours.nested_offset is not None
    assert ours.nested_absmax is not None
    codes, state = bnb.functional.quantize_blockwise(
        absmax - ours.nested_offset.view(torch.float32), blocksize=256
    )
    assert torch.equal(ours.nested_absmax.flatten().view(torch.float32), state.absmax)
    assert torch.equal(ours.absmax, codes)


@over_dtypes
@over_nesting
@over_block_sizes
def test_its_bytes_decode_to_its_values(bnb, device, block_size, double_quant, dtype):
    w = torch.randn(N, 4096).to(dtype).to(device)
    codes, state = quantize_with(bnb, w, block_size, double_quant)
    theirs = bnb.functional.dequantize_4bit(codes[:, None], state)
    ours = NF4Weight(tensors_of(codes, state, *w.shape), w.shape).dequantize(dtype)
    assert same_bits(ours, theirs)


def layers_of(bnb, device: torch.device, dtype: torch.dtype, nested: bool):
    """(its Linear4bit, our NF4Linear of the same bytes)."""
    dense = nn.Linear(K, N, dtype=dtype)
    theirs = bnb.nn.Linear4bit(
        K, N, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4"
    )
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.detach(),
        requires_grad=False,
        compress_statistics=nested,
        quant_type="nf4",
        blocksize=64,
    )
    theirs.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    theirs.to(device)
    ours = NF4Linear(K, N, block_size=64, double_quant=nested, device=device)
    codes = theirs.weight.data.flatten()
    parts = tensors_of(codes, theirs.weight.quant_state, N, K)
    for name, part in zip(("", "_absmax", "_nested_absmax", "_nested_offset"), parts, strict=False):
        if part is not None:
            parameter = getattr(ours, f"weight{name}")
            parameter.data.copy_(part.reshape(parameter.shape))
    ours.bias.data.copy_(theirs.bias)
    return theirs, ours


@over_dtypes
@over_nesting
@pytest.mark.parametrize("m", [1, 2, 9, 70, 600])
def test_its_layer_and_ours_agree(bnb, device, m, double_quant, dtype):
    theirs, ours = layers_of(bnb, device, dtype, double_quant)
    x = torch.randn(m, K, device=device).to(dtype).requires_grad_()
    dy = torch.randn(m, N, device=device).to(dtype)
    y, their_y = ours(x), theirs(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    (their_dx,) = torch.autograd.grad(their_y, x, dy)
    w = Approximate(ours.dequantize(dtype))
    expected = Approximate(x) @ w.t() + Approximate(ours.bias.to(dtype))
    assert_within(y, expected.rounded_to(dtype))
    assert_within(dx, (Approximate(dy) @ w).rounded_to(dtype))
    # Theirs rounds where it likes, say before the bias is added, or each product.
    for value, theirs_value in ((y, their_y), (dx, their_dx)):
        difference = (value.float() - theirs_value.float()).norm()
        assert difference <= 4 * torch.finfo(dtype).eps * value.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_nesting
def test_its_product_of_one_token_and_ours_agree(bnb, device, double_quant, dtype):
    theirs, ours = layers_of(bnb, device, dtype, double_quant)
    with torch.inference_mode():
        x = torch.randn(1, K, device=device).to(dtype)
        y, their_y = ours(x), theirs(x)
        exact = F.linear(x.double(), ours.dequantize(dtype).double(), ours.bias.double())
    scale = exact.norm()
    assert (y.double() - exact).norm() <= torch.finfo(dtype).eps * scale
    assert (their_y.double() - exact).norm() <= 8 * torch.finfo(dtype).eps * scale
