"""PagedAdamW against torch.optim.AdamW and against fp64."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from qlora_native import PagedAdamW, PagedAdamW8bit
from support import FLOAT_DTYPES, over_dtypes, same_bits

SHAPES = [(33, 65), (300,), (1,), (), (2, 3, 4), (0, 5), (20_000,)]

over_both = pytest.mark.parametrize("optimizer_class", [PagedAdamW, PagedAdamW8bit])


def make_parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def clones(parameters: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in parameters]


def set_gradients(seed: int, *lists: list[nn.Parameter]) -> None:
    """The same random gradients, of sizes that vary from step to step, for each list."""
    generator = torch.Generator().manual_seed(seed)
    for group in zip(*lists, strict=True):
        g = torch.randn(group[0].shape, generator=generator, dtype=torch.float64)
        g *= 10.0 ** (-(seed % 5))
        for p in group:
            p.grad = g.to(group[0].dtype).to(p.dtype)


OPTIONS = {
    "defaults": {},
    "large rate": {"lr": 0.1, "weight_decay": 0.1},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"betas": (0.0, 0.99)},
    "no memory": {"betas": (0.9, 0.0), "eps": 1e-2},
    "long memory": {"betas": (0.99, 0.99999), "lr": 1e-2},
    "large eps": {"eps": 1e-2, "lr": 1e-2},
    "no eps": {"eps": 0.0},
    "maximize": {"maximize": True, "lr": 1e-2},
    "no rate": {"lr": 0.0},
}


@pytest.mark.slow
def test_a_thousand_steps_follow_torch_to_fp32_rounding():
    # Both round in fp32: each may be as far from the result in fp64 as the other. Every group has
    # settings of its own.
    ours = make_parameters(shapes=[(513,)] * len(OPTIONS))
    theirs, exact = clones(ours), clones(ours, torch.float64)

    def groups(parameters: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": [p], **options}
            for p, options in zip(parameters, OPTIONS.values(), strict=True)
        ]

    optimizers = [
        PagedAdamW(groups(ours)),
        torch.optim.AdamW(groups(theirs)),
        torch.optim.AdamW(groups(exact)),
    ]
    for step in range(1000):
        set_gradients(step, ours, theirs, exact)
        for optimizer in optimizers:
            optimizer.step()
    for name, p, q, e in zip(OPTIONS, ours, theirs, exact, strict=True):
        our_error, their_error = (p.double() - e).abs().max(), (q.double() - e).abs().max()
        rounding = 2.0**-24 * e.abs().max()
        assert our_error <= 2 * their_error + 4 * rounding, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_step_follows_torch_closely(options):
    ours = make_parameters()
    theirs = clones(ours)
    a, b = PagedAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(20):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            p.data.copy_(q)


@over_dtypes
def test_parameters_of_every_dtype_are_stepped_in_fp32_and_rounded_once(dtype):
    parameters = make_parameters(dtype)
    exact = clones(parameters, torch.float32)
    optimizer = PagedAdamW(parameters, lr=1e-2)
    reference = torch.optim.AdamW(exact, lr=1e-2)
    for step in range(10):
        set_gradients(step, parameters, exact)
        optimizer.step()
        reference.step()
        for p, e in zip(parameters, exact, strict=True):
            torch.testing.assert_close(
                p.float(), e.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6
            )
            e.data.copy_(p)  # else the roundings of the 16-bit parameter add up
        for p in parameters:
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_parameters_of_all_dtypes_share_one_list():
    parameters = [p for dtype in FLOAT_DTYPES for p in make_parameters(dtype, [(40, 7), (3,)])]
    alone = clones(parameters)
    together = PagedAdamW(parameters, lr=1e-2)
    separate = [PagedAdamW([p], lr=1e-2) for p in alone]
    for step in range(5):
        set_gradients(step, parameters, alone)
        together.step()
        for optimizer in separate:
            optimizer.step()
    for p, q in zip(parameters, alone, strict=True):
        assert same_bits(p, q)


@over_both
def test_one_thread_and_two_give_the_same_bits(optimizer_class):
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        parameters = make_parameters(shapes=[(100_003,), (33, 65), (300, 400)])
        optimizer = optimizer_class(parameters, lr=1e-2)
        for step in range(3):
            set_gradients(step, parameters)
            optimizer.step()
        results.append(parameters)
    for parameters in results[1:]:
        for p, q in zip(parameters, results[0], strict=True):
            assert same_bits(p, q)


@over_both
def test_a_parameter_that_is_not_contiguous_is_stepped_in_place(optimizer_class):
    options = {"min_8bit_size": 1} if optimizer_class is PagedAdamW8bit else {}
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


def test_groups_have_settings_of_their_own():
    parameters = make_parameters(shapes=[(50,), (50,), (60,)])
    theirs = clones(parameters)

    def groups(ps: list[nn.Parameter]) -> list[dict]:
        return [
            {"params": ps[:1], "lr": 0.1, "weight_decay": 0.5},
            {"params": ps[1:2], "betas": (0.5, 0.5), "maximize": True},
        ]

    a, b = PagedAdamW(groups(parameters), eps=1e-3), torch.optim.AdamW(groups(theirs), eps=1e-3)
    for step in range(5):
        if step == 2:
            a.add_param_group({"params": parameters[2:], "lr": 1.0})
            b.add_param_group({"params": theirs[2:], "lr": 1.0})
        set_gradients(step, parameters, theirs)
        a.step()
        b.step()
    for p, q in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@over_both
def test_a_parameter_without_a_gradient_is_left_alone_and_counts_its_own_steps(optimizer_class):
    parameters = make_parameters(shapes=[(5000,), (5000,), (30,)])
    alone = clones(parameters)
    together = optimizer_class(parameters, lr=1e-2)
    separate = [optimizer_class([p], lr=1e-2) for p in alone]
    for step in range(6):
        set_gradients(step, parameters, alone)
        for i, (p, q) in enumerate(zip(parameters, alone, strict=True)):
            if i == 2 or (i == 1 and step < 3):
                p.grad = None
            else:
                q.grad = p.grad
                separate[i].step()
        together.step()
    assert parameters[2] not in together.state
    assert [together.state[p]["step"].item() for p in parameters[:2]] == [6, 3]
    for p, q in zip(parameters, alone, strict=True):
        assert same_bits(p, q)


@over_both
def test_a_scheduler_and_a_tensor_rate_are_followed(optimizer_class):
    plain = make_parameters(shapes=[(5000,), (300,)])
    scheduled, tensors = clones(plain), clones(plain)
    by_hand = optimizer_class(plain, lr=1e-2)
    by_scheduler = optimizer_class(scheduled, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(by_scheduler, 0.5)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    by_tensor = optimizer_class(tensors, lr=rate)
    for step in range(5):
        set_gradients(step, plain, scheduled, tensors)
        by_hand.param_groups[0]["lr"] = 1e-2 * 0.5**step
        rate.fill_(1e-2 * 0.5**step)
        for optimizer in (by_hand, by_scheduler, by_tensor):
            optimizer.step()
        scheduler.step()
    for p, q, r in zip(plain, scheduled, tensors, strict=True):
        assert same_bits(p, q)
        assert same_bits(p, r)


@over_both
def test_a_closure_is_run_with_gradients_and_its_loss_returned(optimizer_class):
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optimizer_class([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert optimizer.step(closure).item() < 5.0
    assert optimizer.step() is None


@over_both
def test_it_minimises(optimizer_class):
    target = torch.linspace(-2, 2, 5000)
    p = nn.Parameter(torch.zeros(5000))
    optimizer = optimizer_class([p], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (p - target).square().mean().backward()
        optimizer.step()
    assert (p - target).abs().max() < 0.05


@over_both
def test_autograd_notices_that_a_parameter_was_stepped(optimizer_class):
    for p in (nn.Parameter(torch.randn(5000)), nn.Parameter(torch.randn(60, 100).t())):
        y = (p * p).sum()
        p.grad = torch.ones_like(p)
        optimizer_class([p]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@over_both
def test_a_step_leaves_the_gradients_and_frozen_parameters_alone(optimizer_class):
    p, frozen = nn.Parameter(torch.randn(5000)), nn.Parameter(torch.ones(9), requires_grad=False)
    codes = nn.Parameter(torch.ones(9, dtype=torch.uint8), requires_grad=False)
    p.grad = torch.randn(5000)
    before = p.grad.clone()
    optimizer_class([p, frozen, codes]).step()
    assert same_bits(p.grad, before)
    assert (frozen == 1).all()
    assert (codes == 1).all()


@over_both
def test_a_copy_goes_on_as_the_original(optimizer_class):
    model = nn.Linear(100, 50)
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    set_gradients(0, list(model.parameters()))
    optimizer.step()
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert isinstance(copied, optimizer_class)
    for step in range(1, 4):
        set_gradients(step, list(model.parameters()), list(copied_model.parameters()))
        optimizer.step()
        copied.step()
    for p, q in zip(model.parameters(), copied_model.parameters(), strict=True):
        assert same_bits(p, q)


# ---- what goes wrong


@over_both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr is -0.001, want a finite number of at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0|lr is tensor"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"eps": math.nan}, "eps is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] is 1.0, want 0 <= beta < 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": (0.9, math.nan)}, r"betas\[1\] is nan"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\), want two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas is \(0.9, 0.99, 0.999\), want"),
    ],
    ids=str,
)
def test_invalid_numbers_are_refused(optimizer_class, options, message):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{optimizer_class.__name__}: {message}"):
        optimizer_class([p], **options)
    optimizer = optimizer_class([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for p in parameters for v in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*parameters, *states)]


@over_both
@pytest.mark.parametrize("setting", ["eps", "weight_decay", "betas[1]"])
def test_a_number_on_a_gpu_is_refused_but_for_the_rate(optimizer_class, setting):
    p = torch.nn.Parameter(torch.ones(3))
    with FakeTensorMode():
        number = torch.tensor(0.1, device="cuda:1")
    optimizer_class([p], lr=number)
    options = {"betas": (0.9, number)} if setting == "betas[1]" else {setting: number}
    message = re.escape(f"{setting} is a tensor on cuda:1, want a number: only lr is read on a")
    with pytest.raises(ValueError, match=message):
        optimizer_class([p], **options)


@over_both
@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize("how", ["sparse", "shape", "number", "dtype"])
def test_a_step_that_fails_changes_nothing(optimizer_class, stepped_before, how):
    # The last parameter is at fault: those before it, of other groups and kinds of state, are too
    # late to be saved unless all are checked first.
    parameters = make_parameters(shapes=[(5000,), (30,), (70,)])
    groups = [{"params": parameters[:1]}, {"params": parameters[1:2]}, {"params": parameters[2:]}]
    optimizer = optimizer_class(groups, lr=0.1)
    set_gradients(0, parameters)
    if stepped_before:
        optimizer.step()
    last = parameters[-1]
    if how == "sparse":
        last.grad = torch.ones_like(last).to_sparse()
    elif how == "shape":
        last.data = last.data[:-1].clone()
    elif how == "number":
        optimizer.param_groups[-1]["lr"] = math.nan
    else:
        double = nn.Parameter(torch.ones(3, dtype=torch.float64))
        double.grad = torch.ones_like(double)
        optimizer.add_param_group({"params": [double]})
    before = snapshot(optimizer)
    message = {
        "sparse": "a gradient is sparse",
        "shape": r"a gradient has shape \[70\], its parameter \[69\]",
        "number": "lr is nan",
        "dtype": "a parameter is torch.float64 and its gradient torch.float64",
    }[how]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    after = snapshot(optimizer)
    assert len(after) == len(before)
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


@over_both
def test_a_nan_gradient_spoils_its_element_as_in_torch_and_no_other_block(optimizer_class):
    parameters = make_parameters(shapes=[(5000,)])
    theirs = clones(parameters)
    a, b = optimizer_class(parameters), torch.optim.AdamW(theirs)
    for step in range(3):
        set_gradients(step, parameters, theirs)
        if step == 1:
            parameters[0].grad[700] = theirs[0].grad[700] = math.nan
        a.step()
        b.step()
    p, q = parameters[0].detach(), theirs[0].detach()
    assert q.isnan().nonzero().tolist() == [[700]]
    if optimizer_class is PagedAdamW:
        assert p.isnan().nonzero().tolist() == [[700]]
    else:
        spoilt = p.isnan().nonzero().flatten()
        assert 700 in spoilt
        assert spoilt.min() >= 512  # its block of 256 elements
        assert spoilt.max() < 768


@over_both
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_gradient_is_seen_in_the_parameter(optimizer_class, bad):
    # m / sqrt(v) is inf / inf: the parameter becomes NaN, as in torch, not a plausible number.
    p = nn.Parameter(torch.ones(5000))
    optimizer = optimizer_class([p])
    p.grad = torch.ones(5000)
    p.grad[3] = bad
    optimizer.step()
    assert p[3].isnan()
    assert p[256:].isfinite().all()
