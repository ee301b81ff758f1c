"""The codec on a GPU gives the CPU's bits, on the caller's stream."""

import re

import pytest
import torch

from qlora_native import NF4Weight, nf4_dequantize, nf4_quantize
from qlora_native.ops.storage import NF4Tensors
from support import BLOCK_SIZES, delay_the_gpu, over_dtypes, same_bits, the_host_may_not_wait

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

# Odd counts, and no multiple of a block.
SHAPES = [(1, 1), (3, 11), (51, 167), (64, 4096), (257, 1023)]


def make_input(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, with blocks of zeros, of subnormals, of huge numbers, and of equal ones."""
    generator = torch.Generator().manual_seed(shape[0] * 10007 + shape[1])
    w = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    flat = w.view(-1)
    flat[64:192] = 0
    flat[256:320] *= 2.0**-20 if dtype == torch.float16 else 2.0**-125
    flat[384:448] *= 2.0**18 if dtype == torch.float16 else 2.0**125
    flat[512:576] = 0.25
    return w


def assert_same_bytes(actual: NF4Weight, expected: NF4Weight) -> None:
    for name, on_gpu, on_cpu in zip(
        NF4Tensors._fields, actual.tensors, expected.tensors, strict=True
    ):
        if isinstance(on_cpu, torch.Tensor):
            assert on_gpu.is_cuda
            assert torch.equal(on_gpu.cpu(), on_cpu), name
        else:
            assert on_gpu == on_cpu, name


def random_weight(n: int, k: int, block_size: int, double_quant: bool) -> NF4Weight:
    """Any codes and scales: a test of decoding owes nothing to the quantiser."""
    weight = nf4_quantize(torch.randn(n, k), block_size, double_quant)
    parts = weight.tensors
    parts.codes.random_(0, 256)
    if double_quant:
        parts.absmax.random_(0, 256)
    return weight


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@over_dtypes
def test_quantize_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    for shape in SHAPES:
        w = make_input(shape, dtype)
        expected = nf4_quantize(w, block_size, double_quant)
        assert_same_bytes(nf4_quantize(w.cuda(), block_size, double_quant), expected)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_quantize_gives_the_bits_of_the_cpu_on_a_large_weight(block_size: int) -> None:
    w = make_input((4096, 4097), torch.bfloat16)  # at block 32, 2049 sums of 256 scales
    assert_same_bytes(nf4_quantize(w.cuda(), block_size), nf4_quantize(w, block_size))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@over_dtypes
def test_dequantize_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    for n, k in SHAPES:
        weight = random_weight(n, k, block_size, double_quant)
        expected = nf4_dequantize(weight, dtype)
        actual = nf4_dequantize(weight.to("cuda"), dtype)
        assert actual.is_cuda
        assert same_bits(actual.cpu(), expected.cpu()), (n, k)


@pytest.mark.parametrize("double_quant", [False, True])
def test_absmax_gives_the_bits_of_the_cpu(double_quant: bool) -> None:
    for n, k in SHAPES:
        weight = random_weight(n, k, 32, double_quant)
        assert same_bits(weight.to("cuda").absmax.cpu(), weight.absmax.cpu())


@pytest.mark.parametrize("scale", [0.0, 2.0**-149, 2.0**-133, 2.0**-24, 65519.0, 65520.0, 3e38])
@over_dtypes
def test_dequantize_rounds_scales_of_every_size_as_the_cpu(
    dtype: torch.dtype, scale: float
) -> None:
    weight = random_weight(8, 1024, 32, double_quant=False)
    weight.tensors.absmax.view(torch.float32).fill_(scale)
    expected = nf4_dequantize(weight, dtype)
    assert same_bits(nf4_dequantize(weight.to("cuda"), dtype).cpu(), expected.cpu())


@over_dtypes
def test_an_empty_weight_is_allowed(dtype: torch.dtype) -> None:
    weight = nf4_quantize(torch.empty(0, 64, dtype=dtype, device="cuda"))
    assert nf4_dequantize(weight, dtype).shape == (0, 64)


@pytest.mark.parametrize("offset", [1, 2, 3])
@over_dtypes
def test_tensors_need_not_be_aligned(dtype: torch.dtype, offset: int) -> None:
    w = make_input((51, 167), dtype)
    shifted_w = torch.empty(w.numel() + offset, dtype=dtype, device="cuda")[offset:].view_as(w)
    shifted_w.copy_(w)
    weight = nf4_quantize(w)
    assert_same_bytes(nf4_quantize(shifted_w), weight)

    on_gpu = weight.to("cuda")
    codes = on_gpu.tensors.codes
    shifted_codes = torch.empty(codes.numel() + offset, dtype=torch.uint8, device="cuda")[offset:]
    shifted_codes = shifted_codes.view_as(codes).copy_(codes)
    shifted = NF4Weight(on_gpu.tensors._replace(codes=shifted_codes), on_gpu.shape)
    nf4_dequantize(shifted, dtype, out=shifted_w)
    assert same_bits(shifted_w.cpu(), nf4_dequantize(weight, dtype).cpu())


def test_scales_that_are_not_aligned_are_refused_by_name() -> None:
    weight = nf4_quantize(torch.randn(4, 64, device="cuda"))
    offset = weight.tensors.nested_offset
    assert offset is not None
    shifted = torch.empty(5, dtype=torch.uint8, device="cuda")[1:].copy_(offset)
    with pytest.raises(ValueError, match="nested_offset holds fp32 scales"):
        nf4_dequantize(NF4Weight(weight.tensors._replace(nested_offset=shifted), weight.shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@over_dtypes
def test_a_nan_or_inf_is_an_error_that_names_the_first_block(
    dtype: torch.dtype, block_size: int, bad: float
) -> None:
    w = torch.randn(51, 167).to(dtype)
    w.view(-1)[[7777, 8516]] = bad
    with pytest.raises(ValueError, match=f"block {7777 // block_size}, elements") as on_cpu:
        nf4_quantize(w, block_size)
    with pytest.raises(ValueError, match=re.escape(str(on_cpu.value))):
        nf4_quantize(w.cuda(), block_size)


def test_work_runs_on_the_current_stream() -> None:
    source = make_input((512, 512), torch.bfloat16)
    expected = nf4_quantize(source)
    expected_dense = nf4_dequantize(expected, torch.bfloat16)
    w = torch.zeros(512, 512, dtype=torch.bfloat16, device="cuda")
    late_source = source.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delay_the_gpu()
        w.copy_(late_source)  # what another stream would not wait for
        actual = nf4_quantize(w)
        dense = nf4_dequantize(actual, torch.bfloat16)
    stream.synchronize()
    assert_same_bytes(actual, expected)
    assert same_bits(dense.cpu(), expected_dense.cpu())


def test_dequantize_does_not_wait_for_the_gpu() -> None:
    weight = nf4_quantize(torch.randn(256, 256, device="cuda"))
    out = torch.empty(256, 256, dtype=torch.bfloat16, device="cuda")
    nf4_dequantize(weight, torch.bfloat16, out=out)  # loads the kernel
    with the_host_may_not_wait():
        nf4_dequantize(weight, torch.bfloat16, out=out)


def test_dequantize_can_be_captured_in_a_graph() -> None:
    weights = [nf4_quantize(torch.randn(64, 256, device="cuda")) for _ in range(2)]
    out = torch.empty(64, 256, dtype=torch.bfloat16, device="cuda")
    nf4_dequantize(weights[0], torch.bfloat16, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nf4_dequantize(weights[0], torch.bfloat16, out=out)
    weights[0].tensors.codes.copy_(weights[1].tensors.codes)
    graph.replay()
    expected = nf4_dequantize(weights[0].to("cpu"), torch.bfloat16)
    assert same_bits(out.cpu(), expected.cpu())


def test_quantize_refuses_to_be_captured() -> None:
    w = torch.randn(64, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(NotImplementedError, match="records a CUDA graph"),
    ):
        nf4_quantize(w)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_runs_on_the_device_of_the_tensors() -> None:
    w = make_input((51, 167), torch.bfloat16)
    with torch.cuda.device(0):
        weight = nf4_quantize(w.to("cuda:1"))
        dense = nf4_dequantize(weight, torch.bfloat16)
        assert torch.cuda.current_device() == 0
    assert dense.device.index == 1
    assert_same_bytes(weight, nf4_quantize(w))


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free GPU memory")
    count = 2**31 + 4096 * 64 + 1
    w = torch.randn(count, dtype=torch.bfloat16, device="cuda").view(1, count)
    weight = nf4_quantize(w, double_quant=False)
    tail = count - (4096 * 64 + 1)  # where a block begins
    expected = nf4_quantize(w[:, tail:].cpu(), double_quant=False)
    assert torch.equal(weight.tensors.codes[tail // 2 :].cpu(), expected.tensors.codes)
    assert torch.equal(weight.absmax[tail // 64 :].cpu(), expected.absmax)
    dense = nf4_dequantize(weight, torch.bfloat16)
    assert same_bits(dense[:, tail:].cpu(), nf4_dequantize(expected, torch.bfloat16).cpu())
