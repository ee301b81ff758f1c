"""nf4_quantize, nf4_dequantize and NF4Weight, against the format written out in torch."""

import contextlib
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from qlora_native import NF4Weight, nf4_dequantize, nf4_quantize, ops
from support import (
    BLOCK_SIZES,
    NF4_LEVELS,
    differs_only_near_thresholds,
    dispatcher,
    over_dtypes,
    over_nesting,
    same_bits,
)

SHAPES = [(64, 128), (33, 65), (7, 3), (257, 300), (5,), (1, 1), (3, 4, 50)]


def signed_dynamic_map() -> Tensor:
    """The 256 values that nested scales are stored as."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        boundaries = torch.linspace(0.1, 1, 2**i + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        values += [10.0 ** (i - 6) * means, -(10.0 ** (i - 6)) * means]
    return torch.cat(values).sort().values


def nearest(entries: Tensor, x: Tensor) -> Tensor:
    """The index of the entry nearest to x; a tie goes down."""
    return torch.bucketize(x, (entries[:-1] + entries[1:]) / 2)


def encode(entries: Tensor, x: Tensor, block_size: int, zero_code: int) -> tuple[Tensor, Tensor]:
    """Codes of flat x, and the absmax of each block: x * (1 / absmax), both in fp32."""
    count = x.numel()
    blocks = nn.functional.pad(x, (0, -count % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    codes = nearest(entries, blocks * (1 / absmax)[:, None])
    codes[absmax == 0] = zero_code
    return codes.flatten()[:count].to(torch.uint8), absmax


def mean_of_scales(absmax: Tensor) -> float:
    """Fp64 sums of 256 in index order, then of those; rounded once to fp32."""
    partial_sums = [sum(run.tolist()) for run in absmax.split(256)]
    return torch.tensor(sum(partial_sums) / len(absmax), dtype=torch.float32).item()


def expected_codes(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, two to a byte and an odd count padded with the code of zero, and fp32 absmax."""
    codes, absmax = encode(NF4_LEVELS, w.flatten().float(), block_size, zero_code=7)
    codes = nn.functional.pad(codes, (0, codes.numel() % 2), value=7)
    return codes[0::2] << 4 | codes[1::2], absmax


def as_float(stored: Tensor) -> Tensor:
    return stored.flatten().view(torch.float32)


@over_dtypes
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_stored_byte_is_what_the_format_says(shape, block_size, dtype):
    w = torch.randn(shape).to(dtype)
    w.view(-1)[: w.numel() // 3] *= 0.01
    codes, absmax = expected_codes(w, block_size)

    plain = nf4_quantize(w, block_size, double_quant=False)
    assert torch.equal(plain.codes.flatten(), codes)
    assert torch.equal(as_float(plain.tensors.absmax), absmax)

    nested = nf4_quantize(w, block_size)
    assert torch.equal(nested.codes, plain.codes)
    offset = mean_of_scales(absmax)
    assert as_float(nested.tensors.nested_offset).item() == offset
    scale_map = signed_dynamic_map()
    scale_codes, nested_absmax = encode(scale_map, absmax - offset, 256, zero_code=127)
    assert torch.equal(nested.tensors.absmax, scale_codes)
    assert torch.equal(as_float(nested.tensors.nested_absmax), nested_absmax)

    decoded = scale_map[scale_codes.long()] * nested_absmax.repeat_interleave(256)[: len(absmax)]
    assert torch.equal(nested.absmax, decoded + offset)
    assert torch.equal(plain.absmax, absmax)


@over_dtypes
@over_nesting
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_value_is_level_times_absmax_rounded_once(shape, double_quant, dtype):
    weight = nf4_quantize(torch.randn(shape), 32, double_quant)
    packed = weight.codes.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: math.prod(shape)]
    scales = weight.absmax.repeat_interleave(32)[: math.prod(shape)]
    expected = (NF4_LEVELS[codes.long()] * scales).to(dtype).view(shape)
    assert same_bits(weight.dequantize(dtype), expected)
    assert same_bits(nf4_dequantize(weight, dtype), expected)


# Mean error on randn [1024, 1024] and its standard deviation over seeds, as bitsandbytes measures
# them, and the mean relative error.
ERRORS = {
    32: (0.067746, 0.000069, 0.189726),
    64: (0.072798, 0.000074, 0.203339),
    128: (0.076831, 0.000091, 0.215237),
    256: (0.080337, 0.000102, 0.226105),
    512: (0.083547, 0.000143, 0.236079),
    1024: (0.086610, 0.000187, 0.245370),
    2048: (0.089592, 0.000251, 0.254163),
    4096: (0.092547, 0.000360, 0.262473),
}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_mean_error_on_normal_weights_is_the_known_one(block_size):
    w = torch.randn(1024, 1024)
    mean, sigma, relative = ERRORS[block_size]
    difference = (nf4_quantize(w, block_size, double_quant=False).dequantize() - w).abs()
    assert abs(difference.mean().item() - mean) < 7 * sigma
    assert (
        difference / (w.abs() + 1e-8)
    ).mean().item() < relative * 1.01  # its spread is about 0.1 %
    nested = (nf4_quantize(w, block_size).dequantize() - w).abs()
    assert nested.mean() < 0.11
    assert (nested / (w.abs() + 1e-8)).mean() < 0.28


@pytest.mark.parametrize(
    ("shape", "block_size", "double_quant", "nbytes"),
    [
        ((64, 128), 64, True, 4096 + 128 + 4 + 4),
        ((64, 128), 64, False, 4096 + 128 * 4),
        ((256, 256), 32, True, 32768 + 2048 + 8 * 4 + 4),
        ((3, 5), 64, True, 8 + 1 + 4 + 4),
        ((3, 5), 64, False, 8 + 4),
        ((33, 65), 32, True, 1073 + 68 + 4 + 4),
    ],
)
def test_nbytes_counts_every_byte(shape, block_size, double_quant, nbytes):
    weight = nf4_quantize(torch.randn(shape), block_size, double_quant)
    assert weight.nbytes == nbytes


def test_a_large_nested_weight_takes_4_127_bits_each():
    weight = nf4_quantize(torch.randn(1024, 1024))
    assert 8 * weight.nbytes / 2**20 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


@over_nesting
def test_one_thread_and_two_write_the_same_bits(double_quant):
    w = torch.randn(700, 517)
    weights = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        weight = nf4_quantize(w, 32, double_quant)
        weights.append((weight, weight.dequantize(torch.bfloat16)))
    for weight, dense in weights[1:]:
        for part, first in zip(weight.tensors[:4], weights[0][0].tensors[:4], strict=True):
            assert (part is None and first is None) or torch.equal(part, first)
        assert same_bits(dense, weights[0][1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@over_dtypes
def test_a_nan_or_inf_is_refused_and_the_first_bad_block_named(dtype, bad):
    w = torch.randn(256, 512).to(dtype)
    w.view(-1)[131_000] = bad
    w.view(-1)[70_000] = bad
    block = 70_000 // 64
    expected = (
        rf"nf4_quantize: w has a NaN or Inf in block {block}, "
        rf"elements {64 * block} to {64 * block + 63} of the flattened weight"
    )
    with pytest.raises(ValueError, match=expected):
        nf4_quantize(w)


def test_the_named_range_of_a_short_last_block_ends_with_the_weight():
    w = torch.zeros(5, 15)
    w[4, 14] = math.nan
    with pytest.raises(ValueError, match="block 1, elements 64 to 74"):
        nf4_quantize(w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"nf4_quantize: w is {dtype}, want float32, bfloat16"):
        nf4_quantize(torch.zeros(4, 64).to(dtype))


@pytest.mark.parametrize("block_size", [0, -64, 16, 48, 65, 8192])
def test_another_block_size_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}, want one of"):
        nf4_quantize(torch.randn(4, 64), block_size)


def test_a_scalar_is_refused():
    with pytest.raises(ValueError, match="w has no dimensions"):
        nf4_quantize(torch.tensor(1.0))


@over_nesting
@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0), (3, 0, 5)], ids=str)
def test_a_weight_without_elements_is_quantised_to_nothing(shape, double_quant):
    weight = nf4_quantize(torch.zeros(shape), double_quant=double_quant)
    assert weight.codes.numel() == 0
    assert weight.absmax.shape == (0,)
    assert weight.dequantize().shape == shape


def test_a_weight_that_is_not_contiguous_is_taken_in_its_own_order():
    base = torch.randn(130, 66)
    for w in (base.t(), base[::2, 1::3], base.unflatten(1, (6, 11)).transpose(1, 2)):
        assert not w.is_contiguous()
        weight, copied = nf4_quantize(w), nf4_quantize(w.contiguous())
        assert torch.equal(weight.codes, copied.codes)
        assert torch.equal(weight.absmax, copied.absmax)
        assert weight.shape == w.shape


def test_the_blocks_of_a_weight_of_three_dimensions_are_those_of_the_flat_one():
    w = torch.randn(3, 10, 36)
    weight = nf4_quantize(w)
    assert torch.equal(weight.codes.flatten(), nf4_quantize(w.flatten()).codes.flatten())
    assert weight.shape == w.shape
    assert same_bits(weight.dequantize(), nf4_quantize(w.view(30, 36)).dequantize().view(w.shape))


def test_zeros_come_back_as_positive_zeros():
    w = torch.randn(16, 64)
    w[3] = 0.0
    for double_quant in (True, False):
        weight = nf4_quantize(w, double_quant=double_quant)
        assert (weight.codes[3] == 0x77).all()
        assert same_bits(weight.dequantize()[3], torch.zeros(64))


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e30, 3e38])
def test_the_smallest_and_largest_weights_keep_their_signs_and_extremes(scale):
    w = torch.tensor([1.0, -1.0, 0.0, 0.5]).repeat(16) * scale
    dense = nf4_quantize(w, double_quant=False).dequantize()
    assert torch.equal(dense[:2], w[:2])
    assert (dense[2::4] == 0).all()
    assert dense.isfinite().all()


def test_the_result_needs_no_gradient_and_quantising_leaves_the_weight_alone():
    w = torch.randn(8, 64, requires_grad=True)
    before = w.detach().clone()
    weight = nf4_quantize(w)
    assert not weight.dequantize().requires_grad
    assert same_bits(w.detach(), before)


def test_inference_mode_gives_the_same_bits():
    w = torch.randn(32, 64)
    with torch.inference_mode():
        weight = nf4_quantize(w)
        dense, out = weight.dequantize(), torch.empty(32, 64)
        weight.dequantize(out=out)
    assert torch.equal(weight.codes, nf4_quantize(w).codes)
    assert same_bits(dense, nf4_quantize(w).dequantize())
    assert same_bits(dense, out)


# ---- out=


@over_dtypes
def test_out_is_written_and_returned(dtype):
    weight = nf4_quantize(torch.randn(24, 64))
    out = torch.full((24, 64), math.nan, dtype=dtype)
    assert weight.dequantize(dtype, out=out) is out
    assert same_bits(out, weight.dequantize(dtype))


@pytest.mark.parametrize(
    "out",
    [torch.empty(24, 64, dtype=torch.bfloat16), torch.empty(64, 24), torch.empty(24 * 64)],
    ids=["dtype", "transposed", "flat"],
)
def test_an_out_that_does_not_fit_is_refused(out):
    weight = nf4_quantize(torch.randn(24, 64))
    with pytest.raises(ValueError, match=r"out is .*, want torch.float32 \[24, 64\] on cpu"):
        weight.dequantize(out=out)


def test_an_out_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"on meta, want .* on cpu"):
        nf4_quantize(torch.randn(24, 64)).dequantize(out=torch.empty(24, 64, device="meta"))


def test_an_out_that_is_not_contiguous_is_refused():
    out = torch.zeros(64, 24).t()
    with pytest.raises(ValueError, match=r"nf4_dequantize: out of shape .* is not contiguous"):
        nf4_quantize(torch.randn(24, 64)).dequantize(out=out)
    assert (out == 0).all()


def test_an_out_that_requires_a_gradient_is_refused_while_gradients_are_recorded():
    weight, out = nf4_quantize(torch.randn(24, 64)), torch.empty(24, 64, requires_grad=True)
    with pytest.raises(ValueError, match="out requires a gradient"):
        weight.dequantize(out=out)
    with torch.no_grad():
        weight.dequantize(out=out)
    assert same_bits(out.detach(), weight.dequantize())


def test_autograd_notices_that_out_was_overwritten():
    weight, out = nf4_quantize(torch.randn(24, 64)), torch.randn(24, 64)
    x = torch.randn(24, 64, requires_grad=True)
    y = (x * out).sum()
    weight.dequantize(out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int32])
def test_dequantising_to_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"nf4_dequantize: dtype is {dtype}, want float32"):
        nf4_quantize(torch.randn(4, 64)).dequantize(dtype)


# ---- NF4Weight


@over_nesting
def test_a_weight_tells_what_it_is(double_quant):
    weight = nf4_quantize(torch.randn(8, 64), 32, double_quant)
    assert weight.shape == (8, 64)
    assert weight.block_size == 32
    assert weight.double_quant is double_quant
    assert weight.device == torch.device("cpu")
    assert weight.codes.dtype == torch.uint8
    assert weight.codes.shape == (8, 32)
    assert weight.absmax.dtype == torch.float32
    assert weight.absmax.shape == (16,)
    assert repr(weight) == (
        f"NF4Weight(shape=[8, 64], block_size=32, double_quant={double_quant}, device='cpu')"
    )


@over_nesting
def test_a_weight_survives_pickle_and_a_move(double_quant):
    weight = nf4_quantize(torch.randn(8, 64), double_quant=double_quant)
    for copied in (pickle.loads(pickle.dumps(weight)), weight.to("cpu")):
        assert isinstance(copied, NF4Weight)
        assert same_bits(copied.dequantize(), weight.dequantize())
    on_meta = weight.to("meta")
    assert on_meta.dequantize().is_meta
    assert on_meta.dequantize().shape == (8, 64)
    assert on_meta.absmax.is_meta


def test_a_tensor_whose_storage_was_freed_is_refused():
    w = torch.randn(4, 64)
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[4, 64\] has no memory"):
        nf4_quantize(w)


def test_codes_may_differ_from_another_quantisers_only_beside_a_threshold():
    threshold = (NF4_LEVELS[9] + NF4_LEVELS[10]) / 2  # a tie: ours is the lower code
    next_one = torch.nextafter(threshold, torch.tensor(1.0))
    w = torch.stack([torch.tensor(1.0), threshold, next_one, threshold * (1 + 2.0**-20)])[None]
    ours = nf4_quantize(w, 32, double_quant=False)
    right = [15, 9, 10, 10]
    allowed = [{15}, {9, 10}, {9, 10}, {10}]
    for element, code in itertools.product(range(4), range(16)):
        codes = [*right[:element], code, *right[element + 1 :]]
        pairs = [16 * codes[0] + codes[1], 16 * codes[2] + codes[3]]
        other = torch.tensor(pairs, dtype=torch.uint8)
        is_allowed = differs_only_near_thresholds(w, ours, other)
        assert is_allowed == (code in allowed[element]), (element, code)


@over_nesting
def test_quantising_into_given_memory(double_quant):
    """A slice of larger tensors, as for one of many experts."""
    w = torch.randn(33, 64)
    made = ops.quantize(w, 64, double_quant)
    many = [None if part is None else part.new_zeros(3, *part.shape) for part in made[:4]]
    out = ops.storage.NF4Tensors(*(None if part is None else part[1] for part in many), *made[4:])
    for door in (contextlib.nullcontext(), dispatcher()):
        with door:
            assert ops.quantize(w, 64, double_quant, out) is out
        for part, expected in zip(many, made[:4], strict=True):
            if part is not None:
                assert same_bits(part[1], expected)
                assert not part[0].any()
                assert not part[2].any()
                part.zero_()
