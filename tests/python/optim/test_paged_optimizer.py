"""What all four optimisers are to a training loop: a torch optimiser."""

import pytest
import torch
from optimizers import (
    clones,
    in_8_bits,
    is_in_pages,
    make_parameters,
    nothing_changes,
    over_all,
    parameters_of,
    same_run,
    set_gradients,
    snapshot,
    stepped,
    take_steps,
)
from torch import Tensor, nn

from support import same_bits


@over_all
def test_any_number_of_threads_gives_the_same_bits(optimizer_class):
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        parameters = make_parameters(shapes=[(100_003,), (33, 65), (300, 400)])
        results.append(snapshot(stepped(optimizer_class, parameters, lr=1e-2)))
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


@over_all
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


@over_all
def test_gradients_may_come_late_and_parameters_be_thawed(optimizer_class):
    """One of each kind of state has no gradient at first, and one is frozen."""
    parameters = make_parameters(shapes=[(5000,), (300,), (4096, 2), (50,)])
    alone = clones(parameters)
    for p in parameters[2:]:
        p.requires_grad_(False)
    together = optimizer_class(parameters, lr=1e-2)
    separate = [optimizer_class([p], lr=1e-2) for p in alone]
    first_step = [0, 1, 3, 4]
    for step in range(6):
        set_gradients(step, parameters, alone)
        for i, (p, q) in enumerate(zip(parameters, alone, strict=True)):
            if step < first_step[i]:
                p.grad = None
            else:
                p.requires_grad_(True)
                separate[i].step()
                assert q.grad is not None
        together.step()
        assert is_in_pages(together)
    assert [together.state[p]["step"].item() for p in parameters] == [6, 5, 3, 2]
    for p, q, optimizer in zip(parameters, alone, separate, strict=True):
        assert same_bits(p, q)
        for name, value in optimizer.state[q].items():
            assert same_bits(value, together.state[p][name])


@over_all
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


@over_all
def test_it_minimises(optimizer_class):
    target = torch.linspace(-2, 2, 5000)
    p = nn.Parameter(torch.zeros(5000))
    optimizer = optimizer_class([p], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (p - target).square().mean().backward()
        optimizer.step()
    assert (p - target).abs().max() < 0.11  # Lion goes to and fro by its rate


@over_all
def test_maximize_steps_up(optimizer_class):
    up, down = (make_parameters(shapes=[(5000,), (300,)]) for _ in range(2))
    a, b = optimizer_class(up, lr=1e-2, maximize=True), optimizer_class(down, lr=1e-2)
    for step in range(4):
        set_gradients(step, up, down)
        for p in down:
            p.grad.neg_()
        a.step()
        b.step()
    assert all(map(same_bits, up, down))


@over_all
def test_autograd_notices_that_a_parameter_was_stepped(optimizer_class):
    for p in (nn.Parameter(torch.randn(5000)), nn.Parameter(torch.randn(60, 100).t())):
        y = (p * p).sum()
        p.grad = torch.ones_like(p)
        optimizer_class([p]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@over_all
def test_a_step_leaves_the_gradients_and_frozen_parameters_alone(optimizer_class):
    p, frozen = nn.Parameter(torch.randn(5000)), nn.Parameter(torch.ones(9), requires_grad=False)
    codes = nn.Parameter(torch.ones(9, dtype=torch.uint8), requires_grad=False)
    p.grad = torch.randn(5000)
    before = p.grad.clone()
    optimizer = optimizer_class([codes, p, frozen])
    optimizer.step()
    assert same_bits(p.grad, before)
    assert (frozen == 1).all()
    assert (codes == 1).all()
    assert optimizer.state.keys() == {p}


@over_all
def test_hooks_of_steps_run_around_them(optimizer_class):
    (p,) = make_parameters(shapes=[(300,)])
    optimizer = optimizer_class([p])
    seen = []

    def before(hooked, args, kwargs):
        assert hooked is optimizer
        seen.append(("before", p.detach().clone()))

    def after(hooked, args, kwargs):
        assert hooked is optimizer
        seen.append(("after", p.detach().clone()))

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    take_steps(optimizer, [0])
    for handle in handles:
        handle.remove()
    take_steps(optimizer, [1])
    assert [name for name, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])


@over_all
def test_gradients_whose_norm_was_clipped_are_stepped(optimizer_class):
    ours, same = (make_parameters(shapes=[(5000,), (300,)]) for _ in range(2))
    a, b = optimizer_class(ours, lr=1e-2), optimizer_class(same, lr=1e-2)
    for step in range(3):
        set_gradients(step, ours, same)
        norm = nn.utils.clip_grad_norm_(ours, 0.01)
        assert norm > 0.01
        for p in same:
            p.grad *= (0.01 / (norm + 1e-6)).clamp(max=1.0)
        a.step()
        b.step()
    assert same_run(a, b)


@over_all
def test_empty_parameters_and_lists_are_stepped(optimizer_class):
    empty, full = nn.Parameter(torch.empty(0, 5)), nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([empty, full], **in_8_bits(optimizer_class))
    optimizer.step()
    assert not optimizer.state
    empty.grad, full.grad = torch.empty(0, 5), torch.ones(3)
    optimizer.step()
    empty.grad = None
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (empty, full)] == [1, 2]
    assert optimizer.state[empty]["exp_avg"].shape == (0, 5)


@over_all
def test_named_parameters_keep_their_names(optimizer_class):
    model = nn.Linear(100, 50)
    optimizer = optimizer_class(model.named_parameters(), lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    take_steps(optimizer, range(2))
    state_dict = optimizer.state_dict()
    assert state_dict["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = optimizer_class(nn.Linear(100, 50).named_parameters())
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    for p, q in zip(parameters_of(other), parameters_of(optimizer), strict=True):
        assert same_bits(other.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
        p.data.copy_(q)
    take_steps(optimizer, [2])
    take_steps(other, [2])
    assert same_run(optimizer, other)


@over_all
def test_zero_grad_and_a_step_of_nothing_change_nothing(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=[(5000,), (30,)]))
    optimizer.zero_grad()
    with nothing_changes(optimizer):
        optimizer.step()


@over_all
def test_a_shared_list_is_stepped_as_its_parameters_are_alone(optimizer_class):
    """Thousands of parameters of both kinds of state, in one list and each by itself."""
    shapes = [(i * 37 % 5003,) for i in range(500)]
    parameters = make_parameters(shapes=shapes)
    alone = clones(parameters)
    together = optimizer_class(parameters, lr=1e-2)
    separate = [optimizer_class([p], lr=1e-2) for p in alone[::50]]
    for step in range(2):
        set_gradients(step, parameters, alone)
        together.step()
        for optimizer in separate:
            optimizer.step()
    for p, q in zip(parameters[::50], alone[::50], strict=True):
        assert same_bits(p, q)
