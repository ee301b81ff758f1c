"""What autograd keeps of each operation, counted in bytes: x and t, and what DoRA needs."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_native import ops
from qlora_native.ops import (
    LoRAFactors,
    LoRAGroup,
    NF4Tensors,
    dora_linear,
    lora_linear,
    lora_linear_groups,
    row_norms_squared,
)
from support import dispatcher

N, K, M, R = 96, 128, 40, 4

over_doors = pytest.mark.parametrize("through_dispatcher", [False, True], ids=["direct", "op"])
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def saved_bytes(function: Callable[[], object], held: list[Tensor], through: bool) -> int:
    """Of the storages that autograd keeps of a call, each counted once, but for those of `held`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    door = dispatcher() if through else nullcontext()
    with saved_tensors_hooks(pack, lambda tensor: tensor), door:
        graphs = function()  # kept, or memory of one call would be used again for the next
    assert graphs is not None
    for tensor in held:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def base() -> NF4Tensors:
    return ops.quantize(torch.randn(N, K), 64, True)


def stored(weight: NF4Tensors) -> list[Tensor]:
    return [part for part in weight[:4] if part is not None]


def factors(r: int = R, p: float = 0.0) -> LoRAFactors:
    seed = torch.tensor([5]) if p else None
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((r, K), (N, r)))
    return LoRAFactors(a, b, seed, 0.5, p)


@over_doors
@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_lora_keeps_x_and_t(dtype, p, through_dispatcher):
    weight, (a, b, seed, scaling, _) = base(), factors(p=p)
    x = torch.randn(M, K, dtype=dtype)

    def call() -> Tensor:
        return lora_linear(x, weight, None, a, b, scaling, p, seed)

    seeds = [] if seed is None else [seed]
    held = [*stored(weight), a, b, *seeds]
    assert saved_bytes(call, held, through_dispatcher) == x.nbytes + M * R * dtype.itemsize


@over_doors
@over_dtypes
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_groups_keep_x_and_every_t(dtype, p, through_dispatcher):
    weight, first, second = base(), factors(p=p), factors(7)
    groups = [LoRAGroup(0, 10, first), LoRAGroup(10, 30, second), LoRAGroup(30, M, first)]
    x = torch.randn(M, K, dtype=dtype)
    seeds = [] if first.seed is None else [first.seed]
    held = [*stored(weight), *first[:2], *second[:2], *seeds]
    t_bytes = (20 * R + 20 * 7) * dtype.itemsize

    def call() -> Tensor:
        return lora_linear_groups(x, weight, None, groups)

    assert saved_bytes(call, held, through_dispatcher) == x.nbytes + t_bytes


@over_doors
@over_dtypes
@pytest.mark.parametrize("trains_magnitude", [True, False], ids=["magnitude", "frozen magnitude"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dora_keeps_the_norms_too_and_for_the_magnitude_the_rows(
    dtype, p, trains_magnitude, through_dispatcher
):
    weight, (a, b, seed, scaling, _) = base(), factors(p=p)
    squared = row_norms_squared(weight)
    magnitude = squared.sqrt().requires_grad_(trains_magnitude)
    x = torch.randn(M, K, dtype=dtype)

    def call() -> Tensor:
        return dora_linear(x, weight, None, a, b, magnitude, scaling, squared, p, seed)

    seeds = [] if seed is None else [seed]
    held = [*stored(weight), a, b, magnitude, *seeds]
    rows = M * N * dtype.itemsize if trains_magnitude else 0
    expected = x.nbytes + M * R * dtype.itemsize + N * 4 + rows
    assert saved_bytes(call, held, through_dispatcher) == expected


@over_doors
def test_layers_that_share_x_keep_it_once(through_dispatcher):
    weights = [base() for _ in range(3)]  # q, k and v
    updates = [factors() for _ in range(3)]
    groups = [LoRAGroup(0, 10, factors()), LoRAGroup(10, M, factors())]
    x = torch.randn(M, K, dtype=torch.bfloat16)

    def call() -> list[Tensor]:
        outputs = [
            lora_linear(x, weight, None, a, b, scaling)
            for weight, (a, b, _, scaling, _) in zip(weights, updates, strict=True)
        ]
        return [*outputs, lora_linear_groups(x, weights[0], None, groups)]

    held = [part for weight in weights for part in stored(weight)]
    held += [factor for update in updates for factor in update[:2]]
    held += [factor for group in groups for factor in group.factors[:2]]
    assert saved_bytes(call, held, through_dispatcher) == x.nbytes + 4 * M * R * x.itemsize
