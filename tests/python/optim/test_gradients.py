"""What parameters and gradients may be: dtypes, strides, and what is refused."""

import math

import pytest
import torch
from optimizers import (
    IN_32_BITS,
    clones,
    in_8_bits,
    make_parameters,
    nothing_changes,
    over_all,
    same_run,
    set_gradients,
)
from torch import nn

from qlora_native import PagedLion
from support import FLOAT_DTYPES, same_bits


@over_all
def test_parameters_of_all_dtypes_share_one_list(optimizer_class):
    shapes = [(40, 7), (3,), (5000,)]
    parameters = [p for dtype in FLOAT_DTYPES for p in make_parameters(dtype, shapes)]
    alone = clones(parameters)
    together = optimizer_class(parameters, lr=1e-2)
    separate = [optimizer_class([p], lr=1e-2) for p in alone]
    for step in range(5):
        set_gradients(step, parameters, alone)
        together.step()
        for optimizer in separate:
            optimizer.step()
    assert all(map(same_bits, parameters, alone))
    assert {together.state[p]["step"].dtype for p in parameters} == {torch.float32}


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 and later have it")
@over_all
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOAT_DTYPES, ids=str)
def test_a_gradient_may_have_another_dtype(optimizer_class, dtype, grad_dtype):
    ours, same = (make_parameters(dtype, [(5000,), (30,)]) for _ in range(2))
    a, b = optimizer_class(ours), optimizer_class(same)
    for _ in range(2):
        for p, q in zip(ours, same, strict=True):
            gradient = torch.randn(p.shape).to(grad_dtype)
            p.grad_dtype = q.grad_dtype = None  # any may be put there
            p.grad, q.grad = gradient, gradient.float()
        a.step()
        b.step()
    assert same_run(a, b)


@over_all
def test_a_parameter_that_is_not_contiguous_is_stepped_in_place(optimizer_class):
    options = in_8_bits(optimizer_class)
    storage = torch.randn(2, 40, 50)
    strided = [
        nn.Parameter(storage[0].t()),
        nn.Parameter(storage[1, ::2, ::3]),
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    ]
    dense = [nn.Parameter(p.detach().contiguous().clone()) for p in strided]
    assert not any(p.is_contiguous() for p in strided)
    untouched = storage[1, 1::2].clone()
    a, b = (optimizer_class(ps, lr=1e-2, **options) for ps in (strided, dense))
    for step in range(5):
        set_gradients(step, strided, dense)
        strided[0].grad = strided[0].grad.t().contiguous().t()
        a.step()
        b.step()
    for p, q in zip(strided, dense, strict=True):
        assert same_bits(p.detach().contiguous(), q)
        assert not p.is_contiguous()
    assert same_bits(storage[0].t(), strided[0].detach())
    assert same_bits(storage[1, 1::2], untouched)


@over_all
def test_gradients_that_are_views_are_stepped(optimizer_class):
    """Expanded, negated, and of a part of a larger tensor that need not be aligned."""
    parameters = make_parameters(shapes=[(5000,), (30, 20), (5000,)])
    same = clones(parameters)
    flat = torch.randn(10_001)
    gradients = [
        torch.tensor(0.5).expand(5000),
        torch._neg_view(torch.randn(30, 20)),
        flat[1:5001],
    ]
    a, b = optimizer_class(parameters), optimizer_class(same)
    for p, q, gradient in zip(parameters, same, gradients, strict=True):
        p.grad, q.grad = gradient, gradient.clone()
        q.grad = q.grad.resolve_neg().contiguous()
    a.step()
    b.step()
    assert same_run(a, b)


# ---- NaN and Inf


@over_all
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_gradient_spoils_its_element_and_no_other_block(optimizer_class, bad):
    parameters = make_parameters(shapes=[(5000,), (5000,)])
    clean = clones(parameters)
    a, b = optimizer_class(parameters), optimizer_class(clean)
    for step in range(3):
        set_gradients(step, parameters, clean)
        if step == 1:
            parameters[0].grad[700] = bad
        a.step()
        b.step()
    differs = (parameters[0] != clean[0]).nonzero().flatten().tolist()
    if optimizer_class is PagedLion and math.isinf(bad):
        assert parameters[0][700].isfinite()  # the sign of Inf is 1; the moment shows it
        assert a.state[parameters[0]]["exp_avg"][700].isinf()
    elif optimizer_class in IN_32_BITS:
        assert differs == [700]
        assert parameters[0][700].isnan()
    else:
        assert parameters[0][512:768].isnan().any()
    assert set(differs) <= set(range(512, 768))  # its block of 256 elements
    assert same_bits(parameters[1], clean[1])
    for name, value in a.state[parameters[1]].items():
        assert same_bits(value, b.state[clean[1]][name])


# ---- what is refused


def make_sparse(optimizer, last):
    last.grad = torch.ones_like(last).to_sparse()
    return "a gradient is sparse"


def resize(optimizer, last):
    last.data = last.data[:-1].clone()
    if last in optimizer.state:
        return r"parameter 2 was \[70\] on cpu when its state was made, and is \[69\] on cpu now"
    return r"a gradient has shape \[70\], its parameter \[69\]"


def set_number(optimizer, last):
    optimizer.param_groups[-1]["lr"] = -1.0
    return "lr is -1.0"


def add_double(optimizer, last):
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    optimizer.add_param_group({"params": [double]})
    return "a parameter is torch.float64 and its gradient torch.float64"


def make_double_gradient(optimizer, last):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch lets no gradient have another dtype")
    last.grad_dtype = None
    last.grad = torch.ones(70, dtype=torch.float64)
    return "a parameter is torch.float32 and its gradient torch.float64"


def set_found_inf(optimizer, last):
    optimizer.found_inf = torch.zeros(2)
    return r"found_inf of shape \[2\] has 2 elements, want 1"


FAULTS = (make_sparse, resize, set_number, add_double, make_double_gradient, set_found_inf)


@over_all
@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_step_that_fails_changes_nothing(optimizer_class, stepped_before, fault):
    # The last parameter is at fault: those before it, of other groups and kinds of state, are too
    # late to be saved unless all are checked first.
    parameters = make_parameters(shapes=[(5000,), (30,), (70,)])
    optimizer = optimizer_class([{"params": [p]} for p in parameters], lr=0.1)
    set_gradients(0, parameters)
    if stepped_before:
        optimizer.step()
    message = fault(optimizer, parameters[-1])
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


@over_all
@pytest.mark.parametrize("stepped_before", [False, True])
def test_a_parameter_that_was_moved_is_refused(optimizer_class, stepped_before):
    """To "meta", for want of another device: there is no such step there."""
    parameters = make_parameters(shapes=[(5000,), (30,)])
    optimizer = optimizer_class(parameters)
    set_gradients(0, parameters)
    if stepped_before:
        optimizer.step()
    elsewhere = nn.Parameter(torch.ones(30, device="meta"))
    torch.utils.swap_tensors(parameters[1], elsewhere)
    abstract = parameters[1]
    abstract.grad = torch.ones(30, device="meta")
    message = "a parameter is on meta, where there is no such step; want cpu or cuda"
    before = [t.clone() for t in (parameters[0].detach(), *optimizer.state[parameters[0]].values())]
    with pytest.raises(NotImplementedError, match=message):
        optimizer.step()
    after = [parameters[0].detach(), *optimizer.state[parameters[0]].values()]
    assert all(map(same_bits, after, before))
    torch.utils.swap_tensors(parameters[1], elsewhere)
    optimizer.step()
    assert optimizer.state[parameters[1]]["step"] == 1 + stepped_before


@over_all
def test_a_tensor_made_of_others_is_refused(optimizer_class):
    from torch.testing._internal.two_tensor import TwoTensor

    p = nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)))
    p.grad = TwoTensor(torch.ones(4), torch.ones(4))
    with pytest.raises(NotImplementedError, match="a TwoTensor, a tensor made of other"):
        optimizer_class([p]).step()
    assert (p.a == 1).all()
