"""Groups of adapters and DoRA on a GPU: numbers against the CPU, in graphs, and without a wait."""

import pytest
import torch
from torch import Tensor

from qlora_native import ops
from qlora_native.ops import LoRAFactors, LoRAGroup, NF4Tensors, dora_linear, lora_linear_groups
from support import CUDA_TEST_DEVICE, assert_near, over_dtypes, the_host_may_not_wait

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

SHAPES = [(200, 328), (37, 70)]  # (n, k): for the 16-bit kernels, and for torch's
over_shapes = pytest.mark.parametrize(("n", "k"), SHAPES)
over_dropout = pytest.mark.parametrize("p", [0.0, 0.4])
M = 33


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def weight_on(weight: NF4Tensors, device: torch.device) -> NF4Tensors:
    return NF4Tensors(*(moved(part, device) for part in weight[:4]), *weight[4:])


def factors_of(n: int, k: int, r: int, p: float = 0.0) -> LoRAFactors:
    a, b = torch.randn(r, k) / k**0.5, torch.randn(n, r)
    seed = torch.tensor([r]) if p else None
    return LoRAFactors(a.requires_grad_(), b.requires_grad_(), seed, 0.5, p)


def factors_on(factors: LoRAFactors, device: torch.device) -> LoRAFactors:
    a, b, seed, scaling, p = factors
    return LoRAFactors(moved(a, device), moved(b, device), moved(seed, device), scaling, p)


def groups_of(first: LoRAFactors, second: LoRAFactors) -> list[LoRAGroup]:
    """A factor twice, an empty group, rows of two groups, and rows of none."""
    rows = [(0, 5, first), (5, 5, second), (4, 20, second), (22, M, first)]
    return [LoRAGroup(*group) for group in rows]


def results(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.device))]


def assert_all_near(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        assert_near(got.cpu().float(), want.float(), 16 * torch.finfo(dtype).eps)


@over_dtypes
@over_shapes
@over_dropout
def test_groups_match_the_cpu(device, n, k, dtype, p):
    weight = ops.quantize(torch.randn(n, k) / k**0.5, 64, True)
    first, second = factors_of(n, k, 4, p), factors_of(n, k, 9)
    x, dy = torch.randn(M, k, dtype=dtype, requires_grad=True), torch.randn(M, n, dtype=dtype)
    found = []
    for place in (device, torch.device("cpu")):
        here = [factors_on(factors, place) for factors in (first, second)]
        x_here = moved(x, place)
        y = lora_linear_groups(x_here, weight_on(weight, place), None, groups_of(*here))
        found.append(results(y, [x_here, *here[0][:2], *here[1][:2]], dy))
    assert_all_near(*found, dtype)


@over_dtypes
@over_shapes
@over_dropout
def test_dora_matches_the_cpu(device, n, k, dtype, p):
    weight = ops.quantize(torch.randn(n, k) / k**0.5, 64, True)
    magnitude = (0.5 + torch.rand(n)).requires_grad_()
    bias = torch.randn(n, dtype=dtype, requires_grad=True)
    factors = factors_of(n, k, 4, p)
    x, dy = torch.randn(M, k, dtype=dtype, requires_grad=True), torch.randn(M, n, dtype=dtype)
    found = []
    for place in (device, torch.device("cpu")):
        weight_here = weight_on(weight, place)
        squared = ops.row_norms_squared(weight_here)
        a, b, seed, scaling, _ = factors_on(factors, place)
        leaves = [moved(x, place), a, b, moved(magnitude, place), moved(bias, place)]
        y = dora_linear(
            leaves[0], weight_here, leaves[4], a, b, leaves[3], scaling, squared, p, seed
        )
        found.append(results(y, leaves, dy))
    assert_all_near(*found, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_dropout
def test_both_replay_in_a_graph_and_never_wait(dtype, p):
    n, k = SHAPES[0]
    place = torch.device(CUDA_TEST_DEVICE)
    weight = weight_on(ops.quantize(torch.randn(n, k) / k**0.5, 64, True), place)
    squared = ops.row_norms_squared(weight)
    magnitude = squared.sqrt().requires_grad_()
    first, second = (factors_on(factors_of(n, k, r, p), place) for r in (4, 9))
    x = torch.randn(M, k, dtype=dtype, device=place, requires_grad=True)
    dy = torch.randn(M, n, dtype=dtype, device=place)
    a, b, seed, scaling, _ = first
    leaves = [x, a, b, *second[:2], magnitude]

    def step() -> list[Tensor]:
        y = lora_linear_groups(x, weight, None, groups_of(first, second))
        y = y + dora_linear(x, weight, None, a, b, magnitude, scaling, squared, p, seed)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with the_host_may_not_wait():
        expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().zero_()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert_near(got.detach(), want.detach(), 16 * torch.finfo(dtype).eps)
