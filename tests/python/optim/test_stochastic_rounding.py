"""Stochastic rounding: unbiased, seeded, resumed; and what it leaves alone."""

import pytest
import torch
from optimizers import (
    clones,
    make_parameters,
    nothing_changes,
    over_all,
    parameters_of,
    same_run,
    saved_and_loaded,
    set_gradients,
    settings_of,
    snapshot,
    stepped,
    take_steps,
)
from torch import nn

from support import same_bits

BF16 = torch.bfloat16
SHAPES = [(5000,), (300,), (70, 80), ()]


def make(optimizer_class, parameters, seed: int = 11, **options):
    torch.manual_seed(seed)
    return optimizer_class(parameters, **{"lr": 1e-2, "stochastic_rounding": True, **options})


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
    make(optimizer_class, [rounded], lr=1e-3, weight_decay=0.0).step()
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
    optimizer = make(optimizer_class, [rounded])
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
        optimizer = make(optimizer_class, [p], lr=2e-4, weight_decay=0.0, **options)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.float().mean().item()

    assert train(stochastic_rounding=False) == 1.0  # it stalls: 2e-4 < 2**-9
    assert train() == pytest.approx(1.0 - 300 * 2e-4, abs=2e-3)


# ---- the seed


@over_all
def test_the_seed_of_torch_decides_the_bits(optimizer_class):
    def run(seed: int) -> torch.optim.Optimizer:
        optimizer = make(optimizer_class, make_parameters(BF16, SHAPES), seed)
        torch.manual_seed(99)  # what follows does not matter
        take_steps(optimizer, range(3))
        return optimizer

    assert same_run(run(1), run(1))
    assert not same_run(run(1), run(2))
    assert run(1).param_groups[0]["rounding_seed"] != run(2).param_groups[0]["rounding_seed"]


@over_all
def test_torchs_generator_is_asked_once_for_it_and_never_without_it(optimizer_class):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    optimizer = stepped(optimizer_class, make_parameters(BF16, SHAPES))
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.param_groups[0]["rounding_seed"] is None

    stochastic = optimizer_class(make_parameters(BF16, SHAPES), stochastic_rounding=True)
    after = torch.get_rng_state()
    assert not torch.equal(after, before)
    take_steps(stochastic, range(2))
    stochastic.load_state_dict(stochastic.state_dict())
    assert torch.equal(torch.get_rng_state(), after)


@over_all
def test_a_seed_may_be_given(optimizer_class):
    a, b = (
        optimizer_class(
            [
                {
                    "params": make_parameters(BF16, SHAPES),
                    "stochastic_rounding": True,
                    "rounding_seed": 2**64 - 1,
                }
            ]
        )
        for _ in range(2)
    )
    for optimizer in (a, b):
        take_steps(optimizer, range(2))
    assert a.param_groups[0]["rounding_seed"] == 2**64 - 1
    assert same_run(a, b)


@over_all
def test_parameters_of_one_value_are_rounded_each_in_its_own_way(optimizer_class):
    """Also in two groups, and from step to step."""
    parameters = [nn.Parameter(torch.ones(4096, dtype=BF16)) for _ in range(4)]
    torch.manual_seed(2)
    optimizer = optimizer_class(
        [{"params": parameters[:2]}, {"params": parameters[2:]}], lr=4e-3, stochastic_rounding=True
    )
    seen = []
    for _ in range(2):
        for p in parameters:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [tuple(p.tolist()) for p in parameters]
    assert len(set(seen)) == len(seen) == 8


@over_all
def test_a_group_may_have_it_alone(optimizer_class):
    parameters = make_parameters(BF16, SHAPES)
    plain = clones(parameters)
    torch.manual_seed(0)
    optimizer = optimizer_class([{"params": parameters[:1]}], lr=1e-2)
    optimizer.add_param_group({"params": parameters[1:], "stochastic_rounding": True})
    seeds = [group["rounding_seed"] for group in optimizer.param_groups]
    assert seeds[0] is None
    assert isinstance(seeds[1], int)
    reference = optimizer_class(plain, lr=1e-2)
    for one in (optimizer, reference):
        take_steps(one, range(2))
    assert same_bits(parameters[0], plain[0])
    assert not any(same_bits(p, q) for p, q in zip(parameters[1:3], plain[1:3], strict=True))


# ---- resuming


@over_all
def test_a_run_that_is_resumed_rounds_as_the_run_that_was_not(optimizer_class):
    optimizer = make(optimizer_class, make_parameters(BF16, SHAPES))
    take_steps(optimizer, range(3))
    resumed = optimizer_class(clones(parameters_of(optimizer)))  # has it from the state dict
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for a, b in zip(settings_of(optimizer), settings_of(resumed), strict=True):
        assert a.items() <= b.items()
    for one in (optimizer, resumed):
        take_steps(one, range(3, 6))
    assert same_run(optimizer, resumed)


@over_all
def test_a_state_dict_without_it_leaves_it_as_it_was(optimizer_class):
    """torch's, bitsandbytes' and older ones know of no such setting."""
    source = stepped(optimizer_class, make_parameters(BF16, SHAPES)).state_dict()
    for group in source["param_groups"]:
        del group["stochastic_rounding"], group["rounding_seed"]
    optimizer = make(optimizer_class, make_parameters(BF16, SHAPES))
    seed = optimizer.param_groups[0]["rounding_seed"]
    optimizer.load_state_dict(source)
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    assert optimizer.param_groups[0]["rounding_seed"] == seed
    take_steps(optimizer, [3])


# ---- what it leaves alone


@over_all
def test_float32_is_not_rounded(optimizer_class):
    mixed = [*make_parameters(torch.float32, SHAPES), *make_parameters(BF16, SHAPES)]
    stochastic = make(optimizer_class, mixed)
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
@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "seed"])
def test_a_seed_out_of_range_is_refused(optimizer_class, seed):
    group = {"params": make_parameters(BF16, [(40,)]), "rounding_seed": seed}
    with pytest.raises(ValueError, match=r"rounding_seed is .*, want an integer from 0 to"):
        optimizer_class([{**group, "stochastic_rounding": True}])
    optimizer_class([group])  # not asked for


@over_all
def test_it_may_be_switched_on_with_a_seed(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(BF16, SHAPES))
    group = optimizer.param_groups[0]
    group["stochastic_rounding"] = True
    with nothing_changes(optimizer), pytest.raises(ValueError, match="rounding_seed is None, want"):
        optimizer.step()
    group["rounding_seed"] = 5
    before = snapshot(optimizer)
    take_steps(optimizer, [3])
    assert not all(map(same_bits, snapshot(optimizer), before))


@over_all
@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_rounds_alike(optimizer_class, threads):
    optimizers = []
    for count in (1, threads):
        torch.set_num_threads(count)
        optimizer = make(optimizer_class, make_parameters(BF16, [(100_003,), (33, 65)]))
        take_steps(optimizer, range(2))
        optimizers.append(optimizer)
    assert same_run(*optimizers)
