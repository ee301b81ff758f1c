"""Steps on a GPU and its streams: nothing waits, graphs replay them, a GradScaler skips them."""

import math

import pytest
import torch
from cuda_optimizers import SHAPES, assert_same, copy_gradients, on_gpu
from optimizers import (
    make_parameters,
    over_all,
    set_gradients,
)

from support import delay_the_gpu, the_host_may_not_wait

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build


def step_without_waiting(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()  # loads the kernels
    with the_host_may_not_wait():
        optimizer.step()


@over_all
@pytest.mark.parametrize("options", [{}, {"lr": "tensor"}, {"stochastic_rounding": True}], ids=str)
def test_a_step_does_not_wait_for_the_gpu(optimizer_class, options):
    if options.get("lr") == "tensor":
        options = {"lr": torch.tensor(0.1, device="cuda")}
    parameters = on_gpu(make_parameters(shapes=SHAPES))
    for p in parameters:
        p.grad = torch.ones_like(p)
    step_without_waiting(optimizer_class(parameters, **options))


@over_all
def test_a_step_runs_on_the_current_stream(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    copies = on_gpu(parameters)
    a, b = optimizer_class(parameters), optimizer_class(copies)
    set_gradients(0, parameters)
    late = [p.grad.cuda() for p in parameters]
    for p in copies:
        p.grad = torch.zeros_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delay_the_gpu()
        for p, gradient in zip(copies, late, strict=True):
            p.grad.copy_(gradient)  # what another stream would not wait for
        b.step()
    stream.synchronize()
    a.step()
    assert_same(a, b)


@over_all
def test_a_graph_replays_steps_that_count(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    copies = on_gpu(parameters)
    rate = torch.tensor(0.5, device="cuda")
    a = optimizer_class(parameters, lr=0.5)
    b = optimizer_class(copies, lr=rate)
    set_gradients(0, parameters)
    copy_gradients(parameters, copies)
    a.step()
    b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        b.step()
    for step in range(1, 4):
        set_gradients(step, parameters)
        for p, q in zip(parameters, copies, strict=True):
            q.grad.copy_(p.grad)
        a.param_groups[0]["lr"] = 0.5**step
        rate.fill_(0.5**step)
        a.step()
        graph.replay()
    assert_same(a, b)


@over_all
def test_a_capture_before_the_first_step_is_refused(optimizer_class):
    (p,) = on_gpu(make_parameters(shapes=[(300,)]))
    p.grad = torch.ones(300, device="cuda")
    optimizer = optimizer_class([p])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="before the capture"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


# ---- GradScaler


@over_all
def test_a_grad_scaler_skips_steps_without_waiting(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    copies = on_gpu(parameters)
    a, b = optimizer_class(parameters, lr=1e-2), optimizer_class(copies, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=1000)
    scaler.scale(torch.zeros((), device="cuda"))
    scale = 8.0
    for step in range(5):
        set_gradients(step, parameters)
        copy_gradients(parameters, copies)
        for p in copies:
            p.grad *= scale
        if step in (0, 3):
            copies[0].grad[0, 0] = math.inf
            scale /= 2
        else:
            a.step()
        scaler.step(b)
        scaler.update()
    assert scaler.get_scale() == scale
    assert all(b.state[p]["step"].is_cuda for p in copies)
    assert [b.state[p]["step"].item() for p in copies] == [3.0] * len(SHAPES)
    assert_same(a, b)


@over_all
def test_found_inf_is_read_on_the_device(optimizer_class):
    parameters = on_gpu(make_parameters(shapes=SHAPES))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = optimizer_class(parameters)
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.grad_scale = torch.full((), 4.0, device="cuda")
    step_without_waiting(optimizer)
