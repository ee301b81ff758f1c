"""Stochastic rounding: unbiased, of what stalls without it; and what it leaves alone."""

import pytest
import torch
from optimizers import (
    clones,
    make_parameters,
    nothing_changes,
    over_all,
    parameters_of,
    same_run,
    set_gradients,
    stepped,
    take_steps,
)
from rounding import BF16, SHAPES, make_rounding
from torch import nn

from support import same_bits


@over_all
def test_it_is_unbiased(optimizer_class):
    """The mean of many roundings of one number is the number, within 6 sigma.

    Each is one of two neighbours, `ulp` apart, so that the variance of one is at most ulp²/4.
    """
    count = 200_000
    exact = nn.Parameter(torch.full((count,), 1.0))
    rounded = nn.Parameter(torch.full((count,), 1.0, dtype=BF16))
    for p in (exact, rounded):
        p.grad = torch.full_like(p, -0.5)
    optimizer_class([exact], lr=1e-3, weight_decay=0.0).step()
    make_rounding(optimizer_class, [rounded], lr=1e-3, weight_decay=0.0).step()
    ulp = 2.0**-7
    assert rounded.unique().tolist() == [1.0, 1.0 + ulp]
    target = exact[0].double().item()
    assert exact.eq(exact[0]).all()
    assert target == pytest.approx(1.001, abs=1e-6)
    assert abs(rounded.double().mean().item() - target) <= 6 * ulp / 2 / count**0.5
    # Neighbours are independent: products of their deviations have a mean near 0.
    deviation = (rounded.detach().double() - target) / ulp
    chance = (target - 1.0) / ulp
    variance = chance * (1 - chance)
    for lag in (1, 8, 256):
        product = deviation[lag:] * deviation[:-lag]
        assert abs(product.mean().item()) <= 6 * variance / (count - lag) ** 0.5


@over_all
def test_a_step_rounds_to_one_of_the_neighbours_of_the_fp32_result(optimizer_class):
    (rounded,) = make_parameters(BF16, [(20_000,)])
    (exact,) = clones([rounded], torch.float32)
    optimizer = make_rounding(optimizer_class, [rounded])
    reference = optimizer_class([exact], lr=1e-2)
    up = 0
    for step in range(3):
        set_gradients(step, [rounded], [exact])
        optimizer.step()
        reference.step()
        as_bits = exact.detach().view(torch.int32)
        below = (as_bits & -65536).view(torch.float32).to(BF16)  # towards zero
        above = ((as_bits & -65536) + 65536).view(torch.float32).to(BF16)
        is_exact = as_bits & 65535 == 0
        assert ((rounded == below) | ((rounded == above) & ~is_exact)).all()
        up += int((rounded == above).sum())
        assert same_bits(optimizer.state[rounded]["exp_avg"], reference.state[exact]["exp_avg"])
        exact.data.copy_(rounded)
    assert 0.3 * 60_000 < up < 0.7 * 60_000


@over_all
def test_updates_below_half_a_last_place_are_not_lost(optimizer_class):
    def train(**options) -> float:
        p = nn.Parameter(torch.full((8192,), 1.0, dtype=BF16))
        optimizer = make_rounding(optimizer_class, [p], lr=2e-4, weight_decay=0.0, **options)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.float().mean().item()

    assert train(stochastic_rounding=False) == 1.0  # it stalls: 2e-4 < 2**-9
    assert train() == pytest.approx(1.0 - 300 * 2e-4, abs=2e-3)


# ---- what it leaves alone


@over_all
def test_float32_is_not_rounded(optimizer_class):
    mixed = [*make_parameters(torch.float32, SHAPES), *make_parameters(BF16, SHAPES)]
    stochastic = make_rounding(optimizer_class, mixed)
    plain = optimizer_class(clones(mixed), lr=1e-2)
    for optimizer in (stochastic, plain):
        take_steps(optimizer, range(2))
    a, b = parameters_of(stochastic), parameters_of(plain)
    assert all(map(same_bits, a[: len(SHAPES)], b[: len(SHAPES)]))
    assert not same_bits(a[-2], b[-2])


@over_all
def test_float16_is_refused(optimizer_class):
    message = "a parameter is torch.float16, and stochastic_rounding is for torch.bfloat16"
    halves = make_parameters(torch.float16, [(30,)])
    with pytest.raises(ValueError, match=f"{optimizer_class.__name__}: {message}"):
        optimizer_class(halves, stochastic_rounding=True)
    optimizer = stepped(optimizer_class, make_parameters(BF16, [(40,)]))
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": halves, "stochastic_rounding": True})
    optimizer.add_param_group({"params": halves})
    set_gradients(0, parameters_of(optimizer))
    optimizer.param_groups[1].update(stochastic_rounding=True, rounding_seed=3)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


@over_all
@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_rounds_alike(optimizer_class, threads):
    optimizers = []
    for count in (1, threads):
        torch.set_num_threads(count)
        optimizer = make_rounding(optimizer_class, make_parameters(BF16, [(100_003,), (33, 65)]))
        take_steps(optimizer, range(2))
        optimizers.append(optimizer)
    assert same_run(*optimizers)
