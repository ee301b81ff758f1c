"""State dicts of PagedAdamW and PagedAdamW8bit: to and from torch, resuming, refusing."""

import copy
import io

import pytest
import torch
from test_paged_adamw import clones, make_parameters, over_both, set_gradients, snapshot
from torch import nn

from qlora_native import PagedAdamW, PagedAdamW8bit
from support import over_dtypes, same_bits


def stepped(optimizer_class, parameters: list[nn.Parameter], steps: int = 3, **options):
    optimizer = optimizer_class(parameters, **options)
    for step in range(steps):
        set_gradients(step, parameters)
        optimizer.step()
    return optimizer


def saved_and_loaded(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@over_both
@over_dtypes
def test_a_run_that_is_resumed_is_the_run_that_was_not_bit_for_bit(optimizer_class, dtype):
    parameters = make_parameters(dtype, [(33, 65), (5000,), (300, 40), ()])
    optimizer = stepped(optimizer_class, parameters, lr=3e-2, weight_decay=0.1)

    resumed_parameters = clones(parameters)
    resumed = optimizer_class(resumed_parameters)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 3e-2
    for step in range(3, 8):
        set_gradients(step, parameters, resumed_parameters)
        optimizer.step()
        resumed.step()
    for a, b in zip(snapshot(optimizer), snapshot(resumed), strict=True):
        assert same_bits(a, b)


@over_both
def test_loading_copies_and_shares_nothing(optimizer_class):
    parameters = make_parameters(shapes=[(5000,), (30,)])
    optimizer = stepped(optimizer_class, parameters)
    other = optimizer_class(clones(parameters))
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(other)
    set_gradients(9, parameters)
    optimizer.step()
    for a, b in zip(snapshot(other), before, strict=True):
        assert same_bits(a, b)


@over_both
def test_the_given_dict_is_left_as_it_is(optimizer_class):
    state_dict = stepped(optimizer_class, make_parameters(torch.bfloat16)).state_dict()
    before = copy.deepcopy(state_dict)
    optimizer_class(make_parameters(torch.bfloat16)).load_state_dict(state_dict)
    assert state_dict["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        for name, value in state.items():
            assert same_bits(state_dict["state"][i][name], value)


# ---- torch.optim.AdamW


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"maximize": True}], ids=str)
def test_a_state_of_torch_loads_and_goes_on(options):
    theirs = make_parameters()
    adamw = stepped(torch.optim.AdamW, theirs, lr=1e-2, **options)
    ours = clones(theirs)
    optimizer = PagedAdamW(ours)
    optimizer.load_state_dict(saved_and_loaded(adamw.state_dict()))
    for step in range(3, 6):
        set_gradients(step, theirs, ours)
        adamw.step()
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == adamw.state[q]["step"]


def test_a_state_of_ours_loads_into_torch_and_goes_on():
    ours = make_parameters()
    optimizer = stepped(PagedAdamW, ours, lr=1e-2)
    theirs = clones(ours)
    adamw = torch.optim.AdamW(theirs)
    adamw.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for step in range(3, 6):
        set_gradients(step, theirs, ours)
        adamw.step()
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_moments_of_torch_become_fp32(dtype):
    theirs = make_parameters(dtype, [(300,), (5, 7)])
    adamw = stepped(torch.optim.AdamW, theirs, lr=1e-2)
    assert adamw.state[theirs[0]]["exp_avg"].dtype == dtype
    ours = clones(theirs)
    optimizer = PagedAdamW(ours)
    optimizer.load_state_dict(adamw.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert same_bits(optimizer.state[p][name], adamw.state[q][name].float())
    set_gradients(3, ours)
    optimizer.step()


def test_the_fp32_moments_of_bf16_parameters_survive_a_load():
    parameters = make_parameters(torch.bfloat16, [(300,), (50, 100)])
    optimizer = stepped(PagedAdamW, parameters)
    other = PagedAdamW(clones(parameters))
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(snapshot(optimizer), snapshot(other), strict=True):
        assert same_bits(a, b)
    # torch rounds them to bf16, and goes on.
    theirs = clones(parameters)
    adamw = torch.optim.AdamW(theirs)
    adamw.load_state_dict(optimizer.state_dict())
    set_gradients(3, theirs)
    adamw.step()


def test_a_state_of_strided_parameters_loads_both_ways():
    def transposed() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 300).view(30, 10).t())]

    theirs, ours = transposed(), transposed()
    adamw = stepped(torch.optim.AdamW, theirs)
    optimizer = PagedAdamW(ours)
    optimizer.load_state_dict(adamw.state_dict())
    assert torch.equal(optimizer.state[ours[0]]["exp_avg"], adamw.state[theirs[0]]["exp_avg"])
    ours[0].data.copy_(theirs[0])
    set_gradients(3, ours, theirs)
    optimizer.step()
    adamw.step()
    torch.testing.assert_close(ours[0], theirs[0])
    adamw.load_state_dict(optimizer.state_dict())
    adamw.step()


def test_a_step_that_is_a_plain_number_loads():
    parameters = make_parameters(shapes=[(300,)])
    state_dict = stepped(PagedAdamW, parameters).state_dict()
    state_dict["state"][0]["step"] = 3
    other = PagedAdamW(clones(parameters))
    other.load_state_dict(state_dict)
    set_gradients(3, other.param_groups[0]["params"])
    other.step()
    assert other.state[other.param_groups[0]["params"][0]]["step"] == 4


def test_the_hooks_of_the_user_run():
    parameters = make_parameters(shapes=[(300,)])
    optimizer = PagedAdamW(clones(parameters))
    seen = []

    def double_the_rate(_, state_dict):
        seen.append("before")
        return {
            **state_dict,
            "param_groups": [{**g, "lr": 2 * g["lr"]} for g in state_dict["param_groups"]],
        }

    optimizer.register_load_state_dict_pre_hook(double_the_rate)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(stepped(PagedAdamW, parameters, lr=0.1).state_dict())
    optimizer.load_state_dict(stepped(PagedAdamW, parameters, lr=0.1).state_dict())
    assert seen == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].abs().max() > 0


# ---- refusals


def refused(optimizer, state_dict: dict, message: str) -> None:
    """`state_dict` raises, and leaves state and settings alone."""
    before = snapshot(optimizer)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    for a, b in zip(snapshot(optimizer), before, strict=True):
        assert same_bits(a, b)
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert after == settings


@pytest.mark.parametrize("stepped_before", [False, True])
def test_8_bit_state_is_refused_by_32_bits_and_the_other_way(stepped_before):
    parameters = make_parameters(shapes=[(30,), (5000,)])
    steps = 2 if stepped_before else 0
    in_32_bits = stepped(PagedAdamW, clones(parameters), steps)
    in_8_bits = stepped(PagedAdamW8bit, clones(parameters), steps)
    refused(
        in_32_bits,
        stepped(PagedAdamW8bit, clones(parameters)).state_dict(),
        r"PagedAdamW: state of parameter 1 has .*'exp_avg_absmax'.*, want",
    )
    refused(
        in_8_bits,
        stepped(PagedAdamW, clones(parameters)).state_dict(),
        r"PagedAdamW8bit: state of parameter 1 has \['exp_avg', 'exp_avg_sq', 'step'\], want",
    )
    refused(
        in_8_bits,
        stepped(torch.optim.AdamW, clones(parameters)).state_dict(),
        "PagedAdamW8bit: state of parameter 1 has",
    )


@over_both
@pytest.mark.parametrize("shapes", [[(30,), (50, 100)], [(5000,), (30,)], [(30,), (5001,)]])
def test_state_of_other_shapes_is_refused(optimizer_class, shapes):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(30,), (100, 50)]), lr=0.3)
    source = stepped(optimizer_class, make_parameters(shapes=shapes), lr=0.5)
    refused(optimizer, source.state_dict(), "state of parameter [01]")


@over_both
def test_another_number_of_parameters_or_groups_is_refused(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(30,), (40,)]))
    fewer = stepped(optimizer_class, make_parameters(shapes=[(30,)]))
    refused(optimizer, fewer.state_dict(), r"groups of \[1\] parameters, want \[2\]")
    a, b = make_parameters(shapes=[(30,), (40,)])
    split = stepped(optimizer_class, [a])
    split.add_param_group({"params": [b]})
    refused(optimizer, split.state_dict(), r"groups of \[1, 1\] parameters, want \[2\]")


@pytest.mark.parametrize(
    ("optimizer_class", "message"),
    [
        (torch.optim.SGD, "another kind of optimiser: a group has no betas, eps"),
        (torch.optim.Adagrad, "another kind of optimiser: a group has no betas"),
        (torch.optim.Adam, "of Adam, whose weight decay is not decoupled"),
        (torch.optim.Adamax, "state of parameter 0 has .*exp_inf|not decoupled"),
        (torch.optim.NAdam, "state of parameter 0 has .*mu_product|not decoupled"),
    ],
)
def test_the_state_of_another_algorithm_is_refused(optimizer_class, message):
    parameters = make_parameters(shapes=[(30,)])
    source = stepped(optimizer_class, clones(parameters))
    if optimizer_class is torch.optim.Adam and "decoupled_weight_decay" not in source.defaults:
        pytest.skip(f"the state of Adam of torch {torch.__version__} is that of AdamW")
    refused(stepped(PagedAdamW, parameters), source.state_dict(), message)


def test_the_state_of_amsgrad_is_refused():
    parameters = make_parameters(shapes=[(30,)])
    source = stepped(torch.optim.AdamW, clones(parameters), amsgrad=True)
    refused(stepped(PagedAdamW, parameters), source.state_dict(), "AdamW with amsgrad")


def test_numbers_out_of_range_are_refused():
    parameters = make_parameters(shapes=[(30,)])
    state_dict = stepped(PagedAdamW, clones(parameters)).state_dict()
    state_dict["param_groups"][0]["lr"] = -1.0
    refused(stepped(PagedAdamW, parameters), state_dict, "lr is -1.0")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", torch.zeros(5000), "exp_avg is torch.float32, want uint8"),
        ("exp_avg_absmax", torch.zeros(19), r"exp_avg_absmax is .* \[19\], want .* \[20\]"),
        ("exp_avg_sq_absmax", torch.zeros(20).half(), "exp_avg_sq_absmax is torch.float16"),
    ],
)
def test_damaged_8_bit_state_is_refused(name, value, message):
    parameters = make_parameters(shapes=[(5000,)])
    state_dict = stepped(PagedAdamW8bit, clones(parameters)).state_dict()
    state_dict["state"][0][name] = value
    refused(stepped(PagedAdamW8bit, parameters), state_dict, message)


def test_32_bit_state_of_a_dtype_of_codes_is_refused():
    parameters = make_parameters(shapes=[(300,)])
    state_dict = stepped(PagedAdamW, clones(parameters)).state_dict()
    state_dict["state"][0]["exp_avg"] = torch.zeros(300, dtype=torch.uint8)
    refused(stepped(PagedAdamW, parameters), state_dict, "exp_avg is torch.uint8, want a float")
