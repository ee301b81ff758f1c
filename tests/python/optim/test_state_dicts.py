"""State dicts: what they hold, and how a run goes on from one; torch's both ways."""

import copy
import io

import pytest
import torch
from optimizers import (
    clones,
    is_in_pages,
    make_parameters,
    over_all,
    parameters_of,
    same_run,
    saved_and_loaded,
    set_gradients,
    snapshot,
    stepped,
    take_steps,
)
from torch import nn

from qlora_native import PagedAdamW
from support import over_dtypes, same_bits


@over_all
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


@over_all
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


@over_all
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


@over_all
def test_a_state_dict_before_the_first_step_starts_anew(optimizer_class):
    source = optimizer_class(make_parameters(shapes=[(5000,), (30,)]), lr=0.3)
    other = stepped(optimizer_class, make_parameters(shapes=[(5000,), (30,)]))
    other.load_state_dict(saved_and_loaded(source.state_dict()))
    assert not other.state
    fresh = optimizer_class(clones(parameters_of(other)), lr=0.3)
    for optimizer in (other, fresh):
        take_steps(optimizer, range(2))
    assert same_run(other, fresh)


@over_all
def test_a_parameter_that_the_state_dict_leaves_out_starts_anew(optimizer_class):
    parameters = make_parameters(shapes=[(5000,), (5000,), (30,), (30,)])
    source = optimizer_class(clones(parameters))
    set_gradients(0, parameters_of(source))
    for p in parameters_of(source)[::2]:
        p.grad = None
    source.step()
    other = stepped(optimizer_class, parameters)
    other.load_state_dict(saved_and_loaded(source.state_dict()))
    fresh = optimizer_class(clones(parameters))
    fresh.load_state_dict(saved_and_loaded(source.state_dict()))
    assert [bool(other.state.get(p)) for p in parameters] == [False, True, False, True]
    for optimizer in (other, fresh):
        take_steps(optimizer, range(1, 3))
    assert same_run(other, fresh)


@over_all
def test_a_load_over_other_state_leaves_none_of_it(optimizer_class):
    parameters = make_parameters(shapes=[(5000,), (300,)])
    source = stepped(optimizer_class, clones(parameters), steps=2)
    saved = saved_and_loaded(source.state_dict())
    before = [p.detach().clone() for p in parameters_of(source)]
    run_further = stepped(optimizer_class, parameters, steps=5)
    for _ in range(2):
        run_further.load_state_dict(saved)
        assert is_in_pages(run_further)
        for p, value in zip(parameters, before, strict=True):
            p.data.copy_(value)
        source.load_state_dict(saved)
        for p, value in zip(parameters_of(source), before, strict=True):
            p.data.copy_(value)
        assert same_run(run_further, source)
        for optimizer in (run_further, source):
            take_steps(optimizer, range(5, 7))
        assert same_run(run_further, source)


@over_all
def test_hooks_of_state_dicts_run(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(300,)]))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))

    def mark(_, state_dict):
        seen.append("after")
        assert not isinstance(state_dict["state"][0]["step"], int)
        state_dict["marked"] = True

    optimizer.register_state_dict_post_hook(mark)
    assert optimizer.state_dict()["marked"]
    assert seen == ["before", "after"]


@over_all
def test_tensors_of_a_state_dict_go_into_safetensors(optimizer_class, tmp_path):
    """They are contiguous and share no memory, whatever the parameters' strides."""
    from safetensors.torch import load_file, save_file

    parameters = make_parameters()
    parameters.append(nn.Parameter(torch.randn(90, 80).t()))
    optimizer = stepped(optimizer_class, parameters, lr=1e-2)
    state_dict = optimizer.state_dict()
    flat = {f"{i}.{k}": v for i, state in state_dict["state"].items() for k, v in state.items()}
    assert len(flat) == len(parameters) * len(optimizer.state[parameters[0]]) + 2 * (
        len(optimizer.state[parameters[-1]]) - len(optimizer.state[parameters[0]])
    )
    save_file(flat, tmp_path / "state.safetensors")
    stored = load_file(tmp_path / "state.safetensors")
    state = {i: {k: stored[f"{i}.{k}"] for k in names} for i, names in state_dict["state"].items()}
    other = optimizer_class(clones(parameters))
    other.load_state_dict({**state_dict, "state": state})
    assert same_run(optimizer, other)


@over_all
def test_a_file_holds_what_the_state_needs_and_no_whole_pages(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(5000,), *[(10,)] * 20]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    content = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    count = sum(len(state) for state in optimizer.state.values())
    assert file.getbuffer().nbytes < content + 400 * count + 5000  # zip headers, and pickled groups
