"""How the core reads tensors: plain ones through DLPack, where torch has it, others by asking."""

import pytest
import torch
from torch import nn

from qlora_native import _core, nf4_quantize
from qlora_native.ops import NF4Tensors
from support import same_bits


class Asked(torch.Tensor):
    """A subclass may answer for itself, so that its attributes are what counts."""


KINDS = {
    "plain": lambda tensor: tensor,
    "parameter": lambda tensor: nn.Parameter(tensor, requires_grad=False),
    "asked": lambda tensor: tensor.as_subclass(Asked),
}
over_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())

weight = nf4_quantize(torch.randn(24, 40)).tensors


def multiply(x, y=None, bias=None, weight=weight):
    """The core's y of x[..., 40]."""
    y = torch.zeros(*x.shape[:-1], 24, dtype=x.dtype) if y is None else y
    _core.nf4_linear(x, weight, bias, y, 1, 0)
    return y


@over_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 1, 5, 40), (0, 40)], ids=str)
def test_every_kind_of_tensor_gives_the_same_bits(kind, dtype, shape):
    x, bias = torch.randn(shape, dtype=dtype), torch.randn(24, dtype=dtype)
    parts = [kind(part) for part in weight[:4]]
    y = multiply(kind(x), bias=kind(bias), weight=NF4Tensors(*parts, *weight[4:]))
    expected = multiply(x.reshape(-1, 40), bias=bias).reshape(*shape[:-1], 24)
    assert same_bits(y, expected)


@over_kinds
def test_memory_that_starts_inside_a_storage_is_read_where_it_starts(kind):
    x = torch.randn(5, 40)
    assert same_bits(multiply(kind(x[2:4])), multiply(x[2:4].clone()))


@over_kinds
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 1).expand(3, 40),
        torch.randn(40, 3).t(),
        torch.randn(3, 80)[:, ::2],
        torch.randn(6, 40)[::2],
    ],
    ids=["expanded", "transposed", "every other column", "every other row"],
)
def test_what_is_not_contiguous_is_refused(kind, x):
    with pytest.raises(ValueError, match=r"nf4_linear: x of shape \[3, 40\] is not contiguous"):
        multiply(kind(x))


@over_kinds
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40, 1).t(),
        torch.randn(7, 40)[::7],
        torch.randn(3, 1, 40).transpose(0, 1),
        torch.randn(40, 3)[:, :0].t(),
    ],
    ids=["one row, transposed", "one row of a stride", "a dimension of size 1", "no row"],
)
def test_the_stride_of_a_dimension_of_size_1_means_nothing(kind, x):
    assert x.is_contiguous()
    assert same_bits(multiply(kind(x)), multiply(x.clone(memory_format=torch.contiguous_format)))


@over_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int8, torch.complex64], ids=str)
def test_a_dtype_without_a_name_in_the_core_is_refused_by_its_own(kind, dtype):
    with pytest.raises(ValueError, match=f"a tensor has dtype {dtype}, want float32, bfloat16"):
        multiply(kind(torch.ones(3, 40).to(dtype)), y=torch.zeros(3, 24))


@over_kinds
def test_a_dtype_that_an_operation_does_not_take_is_refused(kind):
    with pytest.raises(ValueError, match="nf4_linear: x is int64, want float32, bfloat16"):
        multiply(kind(torch.ones(3, 40, dtype=torch.int64)), y=torch.zeros(3, 24))


@over_kinds
def test_more_than_8_dimensions_are_refused(kind):
    with pytest.raises(ValueError, match="a tensor has more than 8 dimensions"):
        multiply(kind(torch.randn(1, 1, 1, 1, 1, 1, 1, 3, 40)))


@over_kinds
def test_memory_that_was_freed_is_refused(kind):
    x = torch.randn(3, 40)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[3, 40\] has no memory"):
        multiply(kind(x), y=torch.zeros(3, 24))


def test_a_tensor_without_memory_of_this_kind_is_refused():
    with pytest.raises(ValueError, match="a tensor is on device meta, want cpu or cuda"):
        multiply(torch.randn(3, 40, device="meta"), y=torch.zeros(3, 24))
    with pytest.raises((RuntimeError, NotImplementedError)):  # torch's: a sparse one has no pointer
        multiply(torch.ones(3, 40).to_sparse(), y=torch.zeros(3, 24))


@pytest.mark.parametrize("x", [3, "x", object(), [1.0]], ids=repr)
def test_what_is_no_tensor_is_a_type_error(x):
    with pytest.raises(TypeError, match="nf4_linear"):
        multiply(x, y=torch.zeros(3, 24))


def test_the_strategy_of_an_unknown_product_is_refused():
    with pytest.raises(ValueError, match="direction is sideways, want forward or grad_input"):
        _core.nf4_matmul_strategy("sideways", 1, 64, 64, "bfloat16", 64, 0)
    with pytest.raises(ValueError, match="dtype is int8, want float32, bfloat16 or float16"):
        _core.nf4_matmul_strategy("forward", 1, 64, 64, "int8", 64, 0)
