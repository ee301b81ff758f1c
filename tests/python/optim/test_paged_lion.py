"""PagedLion against its formula in fp64, and against bitsandbytes' Lion."""

import math

import pytest
import torch
from optimizers import clones, make_parameters, set_gradients, take_steps
from torch import Tensor, nn

from qlora_native import PagedLion, PagedLion8bit
from support import FP32_ROUNDOFF, import_bitsandbytes, over_dtypes, same_bits

OPTIONS = {
    "defaults": {},
    "large rate": {"lr": 0.1, "weight_decay": 0.1},
    "decay": {"lr": 1e-2, "weight_decay": 1.0},
    "no momentum": {"betas": (0.0, 0.99)},
    "no memory": {"betas": (0.9, 0.0)},
    "long memory": {"betas": (0.99, 0.99999), "lr": 1e-2},
    "maximize": {"maximize": True, "lr": 1e-2},
    "no rate": {"lr": 0.0},
}


class ExactLion:
    """Chen et al. 2023, algorithm 2, on fp64 copies of parameters."""

    def __init__(self, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False) -> None:
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.sign = -1.0 if maximize else 1.0
        self.moments: dict[int, Tensor] = {}

    def step(self, i: int, p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The parameter after a step, and how near the update's argument was to 0."""
        beta1, beta2 = self.betas
        g = self.sign * g.double()
        m = self.moments.get(i, torch.zeros_like(g))
        c = beta1 * m + (1 - beta1) * g
        self.moments[i] = beta2 * m + (1 - beta2) * g
        size = beta1 * m.abs() + (1 - beta1) * g.abs()
        p = p.double()
        return p - self.lr * (c.sign() + self.weight_decay * p), c.abs() / size.clamp(min=1e-300)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_follow_the_formula(options):
    parameters = make_parameters()
    optimizer, exact = PagedLion(parameters, **options), ExactLion(**options)
    lr = exact.lr
    for step in range(20):
        set_gradients(step, parameters)
        expected = [exact.step(i, p.detach(), p.grad) for i, p in enumerate(parameters)]
        optimizer.step()
        for i, (p, (value, distance)) in enumerate(zip(parameters, expected, strict=True)):
            decided = distance > 1e-5  # else fp32 may find another sign
            assert decided.double().mean() > 0.999 or p.numel() == 0
            error = (p.detach().double() - value).abs()
            allowed = 4 * FP32_ROUNDOFF * (value.abs() + lr)
            assert (error <= allowed)[decided].all()
            # The moment's roundings add up over the steps that it remembers.
            m, m64 = optimizer.state[p]["exp_avg"].double(), exact.moments[i]
            assert ((m - m64).abs() <= 4 * (step + 1) * FP32_ROUNDOFF).all()


def test_a_first_step_is_the_rate_times_the_sign():
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]))
    p.grad = torch.tensor([3.0, -1e-30, 0.0, -0.0, math.inf])
    PagedLion([p], lr=0.25).step()
    assert p.tolist() == [0.75, 1.25, 1.0, 1.0, 0.75]


def test_a_nan_shows_where_it_is():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.tensor([1.0, math.nan, -1.0, 0.0])
    optimizer = PagedLion([p], lr=0.25)
    optimizer.step()
    assert p.isnan().tolist() == [False, True, False, False]
    assert optimizer.state[p]["exp_avg"].isnan().tolist() == [False, True, False, False]


@over_dtypes
def test_parameters_of_every_dtype_are_stepped_in_fp32_and_rounded_once(dtype):
    parameters = make_parameters(dtype)
    in_fp32 = clones(parameters, torch.float32)
    a, b = PagedLion(parameters, lr=1e-2), PagedLion(in_fp32, lr=1e-2)
    for step in range(5):
        set_gradients(step, parameters, in_fp32)
        a.step()
        b.step()
        for p, q in zip(parameters, in_fp32, strict=True):
            assert same_bits(p, q.to(dtype))
            assert same_bits(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
            q.data.copy_(p)


# ---- bitsandbytes


@pytest.fixture(scope="module")
def bnb():
    with import_bitsandbytes():
        return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_follow_bitsandbytes(bnb, dtype, decay):
    ours = make_parameters(dtype, [(33, 65), (5000,)])
    theirs = clones(ours)
    a = PagedLion(ours, lr=1e-2, weight_decay=decay)
    b = bnb.optim.Lion32bit(theirs, lr=1e-2, weight_decay=decay)
    for step in range(10):
        set_gradients(step, ours, theirs)
        a.step()
        with import_bitsandbytes():
            b.step()
        for p, q in zip(ours, theirs, strict=True):
            m, m_ = a.state[p]["exp_avg"], b.state[q]["state1"]
            torch.testing.assert_close(m, m_, rtol=1e-5, atol=1e-8)
            difference = (p - q).detach().float().abs()
            rounding = max(torch.finfo(dtype).eps, 8 * FP32_ROUNDOFF) * (1e-2 + q.abs().float())
            # Where fp32 finds another sign they are two rates apart.
            assert (difference > rounding).sum() <= 1
            p.data.copy_(q)


def test_8_bit_steps_stay_within_the_tolerances_of_bitsandbytes(bnb):
    """Both from one state each time: the codes are the same but for a few neighbours."""
    (ours,) = make_parameters(shapes=[(257, 129)])
    theirs = nn.Parameter(ours.detach().clone())
    a = PagedLion8bit([ours], lr=1e-3)
    b = bnb.optim.Lion8bit([theirs], lr=1e-3)
    for step in range(10):
        set_gradients(step, [ours], [theirs])
        with import_bitsandbytes():
            b.step()
        a.step()
        m, m_ = a.state[ours]["exp_avg"], b.state[theirs]["state1"]
        apart = (m.int() - m_.int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01  # it looks codes up in a table of bins
        scales = b.state[theirs]["absmax1"]
        torch.testing.assert_close(a.state[ours]["exp_avg_absmax"], scales, rtol=1e-6, atol=0)
        assert ((ours - theirs).abs() > 1e-6).float().mean() < 1e-3  # another sign
        m.copy_(m_)
        a.state[ours]["exp_avg_absmax"].copy_(scales)
        ours.data.copy_(theirs)
    take_steps(a, [10])
