"""All state is in pages: what is where, how much it is, what `state` shows."""

import pytest
import torch
from optimizers import (
    ADAMW,
    BLOCK,
    IN_8_BITS,
    PAGED_SHAPES,
    clones,
    is_in_pages,
    make_parameters,
    moments_of,
    over_8_bits,
    over_all,
    parameters_of,
    same_run,
    set_gradients,
    stepped,
    take_steps,
)
from torch import Tensor, nn

from support import same_bits

# ---- how much


def bytes_needed(optimizer_class: type, parameters: list[nn.Parameter], min_8bit_size=4096) -> int:
    """Whole blocks of 256 elements, one at least for each parameter."""
    total = 0
    for p in parameters:
        blocks = max(1, -(-p.numel() // BLOCK))
        is_8bit = optimizer_class in IN_8_BITS and p.numel() >= min_8bit_size
        total += blocks * (BLOCK + 4 if is_8bit else 4 * BLOCK)
    return total * len(moments_of(optimizer_class))


@over_all
def test_pages_have_room_for_all_state_and_no_more(optimizer_class):
    parameters = make_parameters(
        shapes=[*[(i * 37 % 9001,) for i in range(60)], (), (0,), (70, 80)]
    )
    optimizer = stepped(optimizer_class, parameters, steps=1)
    report = optimizer.paging_report()
    assert report.bytes == bytes_needed(optimizer_class, parameters)
    assert is_in_pages(optimizer)
    assert all(set(state) > {"step"} for state in optimizer.state.values())
    assert len(optimizer.state) == len(parameters)
    assert {part.bits for part in report.parts} == (
        {8, 32} if optimizer_class in IN_8_BITS else {32}
    )
    assert {part.strategy for part in report.parts} == {"ordinary"}
    assert report.host_bytes == report.bytes  # where the CPU has it


@over_all
def test_many_small_parameters_share_a_page(optimizer_class):
    parameters = make_parameters(shapes=[(10,)] * 500)
    optimizer = stepped(optimizer_class, parameters, steps=1)
    report = optimizer.paging_report()
    assert (report.pages, len(report.parts)) == (1, 1)
    assert report.bytes == bytes_needed(optimizer_class, parameters)
    addresses = [optimizer.state[p]["exp_avg"].data_ptr() for p in parameters]
    assert addresses == list(range(addresses[0], addresses[0] + 500 * 4 * BLOCK, 4 * BLOCK))


@over_8_bits
def test_state_in_8_bits_takes_few_bytes_a_parameter(optimizer_class):
    """Of factors of rank 16 as a model of 7B has them, with a norm beside."""
    shapes = [(16, 4096), (4096, 16), (16, 4096), (11008, 16), (4096,), (16,)] * 2
    parameters = make_parameters(torch.bfloat16, shapes)
    optimizer = stepped(optimizer_class, parameters, steps=1)
    count = sum(p.numel() for p in parameters)
    per_parameter = optimizer.paging_report().bytes / count
    moments = len(moments_of(optimizer_class))
    assert per_parameter <= 1.05 * moments
    assert per_parameter >= (1 + 4 / BLOCK) * moments
    shown = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    assert shown <= 1.05 * moments * count


# ---- what `state` shows


@over_all
def test_what_is_written_into_state_is_used(optimizer_class):
    written, replaced, loaded = (
        stepped(optimizer_class, make_parameters(shapes=[(5000,), (300,)])) for _ in range(3)
    )
    state_dict = loaded.state_dict()
    state_dict["state"] = {
        i: {name: changed(value) for name, value in state.items()}
        for i, state in state_dict["state"].items()
    }
    loaded.load_state_dict(state_dict)
    for state in written.state.values():
        for value in state.values():
            value.copy_(changed(value))
    for p in parameters_of(replaced):
        replaced.state[p] = {name: changed(v) for name, v in replaced.state[p].items()}
    assert not is_in_pages(replaced)
    for optimizer in (written, replaced, loaded):
        take_steps(optimizer, range(3, 5))
        assert is_in_pages(optimizer)
    assert same_run(written, loaded)
    assert same_run(replaced, loaded)
    untouched = stepped(optimizer_class, make_parameters(shapes=[(5000,), (300,)]), steps=5)
    assert not same_run(untouched, loaded)


def changed(value: Tensor) -> Tensor:
    return value // 2 if value.dtype == torch.uint8 else (value * 2.0).clone()


@over_all
def test_one_tensor_of_a_state_may_be_replaced(optimizer_class):
    a, b = (stepped(optimizer_class, make_parameters(shapes=[(5000,), (300,)])) for _ in range(2))
    for p, q in zip(parameters_of(a), parameters_of(b), strict=True):
        a.state[p]["exp_avg"] = changed(a.state[p]["exp_avg"])
        b.state[q]["exp_avg"].copy_(changed(b.state[q]["exp_avg"]))
        a.state[p]["step"] = 7
        b.state[q]["step"].fill_(7)
    for optimizer in (a, b):
        take_steps(optimizer, [3])
    assert same_run(a, b)
    assert is_in_pages(a)


@over_all
@pytest.mark.parametrize("how", ["removed", "shape", "step"])
def test_state_that_others_have_spoilt_is_refused(optimizer_class, how):
    parameters = make_parameters(shapes=[(5000,), (300,)])
    optimizer = stepped(optimizer_class, parameters)
    before = [p.detach().clone() for p in parameters]
    state = optimizer.state[parameters[1]]
    kept = dict(state)
    if how == "removed":
        del state["exp_avg"]
    elif how == "shape":
        state["exp_avg"] = torch.zeros(299)
    else:
        state["step"] = torch.tensor(-3.0)
    set_gradients(3, parameters)
    with pytest.raises(ValueError, match=f"{optimizer_class.__name__}: state of parameter 1"):
        optimizer.step()
    assert all(map(same_bits, before, parameters))
    optimizer.state[parameters[1]] = kept
    optimizer.step()
    assert same_run(optimizer, stepped(optimizer_class, clones_of_start(parameters), steps=4))


def clones_of_start(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return make_parameters(shapes=[p.shape for p in parameters])


@over_all
@pytest.mark.parametrize("how", ["all", "one", "empty"])
def test_cleared_state_starts_anew(optimizer_class, how):
    shapes = [(5000,), (300,)]
    optimizer = stepped(optimizer_class, make_parameters(shapes=shapes))
    parameters = parameters_of(optimizer)
    fresh_parameters = clones(parameters)
    if how == "all":
        optimizer.state.clear()
    elif how == "empty":
        for p in parameters:
            optimizer.state[p] = {}
    else:
        del optimizer.state[parameters[0]]
    fresh = optimizer_class(fresh_parameters)
    if how == "one":
        kept = optimizer.state_dict()["state"][1]
        fresh.load_state_dict({**fresh.state_dict(), "state": {1: kept}})
    for one in (optimizer, fresh):
        take_steps(one, range(3, 6))
    assert same_run(optimizer, fresh)


@over_8_bits
def test_cleared_state_may_be_of_another_width(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(5000,), (300,)]))
    fresh = optimizer_class(clones(parameters_of(optimizer)), min_8bit_size=1)
    optimizer.min_8bit_size = 1
    optimizer.state.clear()
    for one in (optimizer, fresh):
        take_steps(one, range(2))
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.uint8}
    assert same_run(optimizer, fresh)


@over_all
def test_a_resized_parameter_takes_state_of_its_new_size(optimizer_class):
    """Cleared, or loaded from a run that has it so."""
    other = stepped(optimizer_class, make_parameters(shapes=[(6000,), (300,)]))
    for how in ("cleared", "loaded"):
        optimizer = stepped(optimizer_class, make_parameters(shapes=[(5000,), (300,)]))
        for p, q in zip(parameters_of(optimizer), parameters_of(other), strict=True):
            p.data = q.detach().clone()
            p.grad = None
        if how == "cleared":
            optimizer.state.clear()
        optimizer.load_state_dict(other.state_dict())
        assert same_run(optimizer, other)
        take_steps(optimizer, [3])
        assert is_in_pages(optimizer)


@over_all
def test_old_tensors_are_left_alone_by_new_pages(optimizer_class):
    parameters = make_parameters(shapes=PAGED_SHAPES)
    optimizer = stepped(optimizer_class, parameters, steps=1)
    old = {p: dict(optimizer.state[p]) for p in parameters}
    values = {p: {k: v.clone() for k, v in state.items()} for p, state in old.items()}
    optimizer.add_param_group({"params": make_parameters(shapes=[(5000,), (30,)])})
    take_steps(optimizer, [1])
    for p in parameters:
        assert optimizer.state[p]["exp_avg"].data_ptr() != old[p]["exp_avg"].data_ptr()
        assert all(same_bits(old[p][name], value) for name, value in values[p].items())
    assert optimizer_class in ADAMW or "exp_avg_sq" not in old[parameters[0]]
