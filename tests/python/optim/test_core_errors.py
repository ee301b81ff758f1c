"""Errors of the core before a step runs: nothing has changed, and the next step goes on."""

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

from qlora_native import _core
from qlora_native.optim import paged_optimizer, state_pages


class Failing:
    """A step of the core that finds no memory, or is interrupted."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def prepare(self, num_threads: int, stream: int) -> None:
        raise self.error


@pytest.fixture
def fail(monkeypatch):
    """`fail(error)`: the next step raises it when it prepares its last call of the core."""

    def arrange(error: BaseException) -> None:
        def make_calls(*arguments):
            calls = real(*arguments)
            return [*calls[:-1], calls[-1]._replace(step=Failing(error))]

        real = paged_optimizer.make_calls
        monkeypatch.setattr(paged_optimizer, "make_calls", make_calls)

    yield arrange
    monkeypatch.undo()


@over_all
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("the device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_error_of_the_last_call_is_found_before_the_first_runs(
    optimizer_class, error, steps, fail, monkeypatch
):
    parameters = make_parameters(shapes=[(5000,), (300,), (40,)])
    same = clones(parameters)
    late = parameters.pop(), same.pop()
    optimizer = stepped(optimizer_class, parameters, steps=steps, lr=1e-2)
    reference = stepped(optimizer_class, same, steps=steps, lr=1e-2)
    for one, p in zip((optimizer, reference), late, strict=True):
        one.add_param_group({"params": [p]})
    set_gradients(steps, parameters_of(optimizer))
    fail(error)
    with nothing_changes(optimizer), pytest.raises(type(error)):
        optimizer.step()
    monkeypatch.undo()
    for one in (optimizer, reference):
        take_steps(one, range(steps, steps + 2))
    assert same_run(optimizer, reference)


@over_all
def test_pages_that_cannot_be_made_leave_the_old_ones(optimizer_class, monkeypatch):
    parameters = make_parameters(shapes=[(5000,), (300,)])
    optimizer = stepped(optimizer_class, parameters)
    reference = stepped(optimizer_class, make_parameters(shapes=[(5000,), (300,)]))
    for one in (optimizer, reference):
        one.add_param_group({"params": make_parameters(shapes=[(6000,), (20,)])})
    set_gradients(3, parameters_of(optimizer))

    def refuse(*arguments, **options):
        raise MemoryError("no bytes of host memory")

    monkeypatch.setattr(state_pages, "_make_pages", refuse)
    with nothing_changes(optimizer), pytest.raises(MemoryError, match="no bytes"):
        optimizer.step()
    state_dict = reference.state_dict()
    other = stepped(optimizer_class, make_parameters(shapes=[(300,)]), steps=0)
    source = stepped(optimizer_class, make_parameters(shapes=[(300,)]), steps=0)
    monkeypatch.undo()
    take_steps(source, [0])
    monkeypatch.setattr(state_pages, "_make_pages", refuse)
    with nothing_changes(other), pytest.raises(MemoryError, match="no bytes"):
        other.load_state_dict(source.state_dict())
    monkeypatch.undo()
    assert state_dict["state"].keys() == {0, 1}
    for one in (optimizer, reference):
        take_steps(one, [3])
    assert same_run(optimizer, reference)


@over_all
def test_state_too_large_for_memory_is_refused_before_anything_changes(optimizer_class):
    parameters = make_parameters(shapes=[(5000,)])
    optimizer = stepped(optimizer_class, parameters)
    huge = torch.nn.Parameter(torch.ones(1).expand(1 << 46))
    optimizer.add_param_group({"params": [huge]})
    huge.grad = torch.ones(1).expand(1 << 46)
    with pytest.raises(MemoryError, match="bytes of host memory"):
        optimizer.step()
    optimizer.param_groups.pop()
    take_steps(optimizer, [3])
    assert same_run(optimizer, stepped(optimizer_class, make_parameters(shapes=[(5000,)]), steps=4))


def test_the_core_refuses_a_step_that_is_not_of_its_pages():
    """What the optimisers never ask for."""
    state = _core.PagedState("cpu", "adamw", False, 512)
    p, step = torch.zeros(300), torch.zeros(())
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.0}
    for first in (256, 1, -256):
        with pytest.raises(ValueError, match=rf"adamw_step: .*(first_element is|element) {first}"):
            _core.PagedStep(state, [p], [p], [step], [first], [0], maximize=False, **numbers)
    with pytest.raises(ValueError, match="1 params, but 2 of another list"):
        _core.PagedStep(state, [p], [p, p], [step], [0], [0], maximize=False, **numbers)
    with pytest.raises(ValueError, match="number"):
        _core.PagedStep(
            state, [p], [p], [step], [0], [1 << 24], maximize=False, rounding_seed=1, **numbers
        )
