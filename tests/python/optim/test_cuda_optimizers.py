"""The optimisers on a GPU: the CPU's bits, torch's fused numbers, graphs, and no waiting."""

import math

import pytest
import torch
from optimizers import (
    make_parameters,
    over_all,
    set_gradients,
    snapshot,
)
from torch import nn

from qlora_native import PagedAdamW, PagedAdamW8bit
from support import FLOAT_DTYPES, delay_the_gpu, over_dtypes, same_bits, the_host_may_not_wait

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

SHAPES = [(33, 65), (300,), (1,), (), (2, 3, 4), (0, 5), (20_001,), (64, 4096)]


def on_gpu(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().cuda()) for p in parameters]


def copy_gradients(source: list[nn.Parameter], target: list[nn.Parameter]) -> None:
    for p, q in zip(source, target, strict=True):
        q.grad = None if p.grad is None else p.grad.cuda()


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip(snapshot(a), snapshot(b), strict=True):
        assert same_bits(p.cpu(), q.cpu())


OPTIONS = [{}, {"maximize": True, "lr": 0.1}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}]


@over_all
@over_dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_give_the_bits_of_the_cpu(optimizer_class, dtype, options):
    parameters = make_parameters(dtype, SHAPES)
    copies = on_gpu(parameters)
    a, b = optimizer_class(parameters, **options), optimizer_class(copies, **options)
    for step in range(5):
        set_gradients(step, parameters)
        if step == 2:
            parameters[1].grad = None
        copy_gradients(parameters, copies)
        a.step()
        b.step()
        assert_same(a, b)


@over_all
def test_parameters_of_all_dtypes_share_a_list_and_need_not_be_aligned(optimizer_class):
    flat = {dtype: torch.randn(100_000).to(dtype) for dtype in FLOAT_DTYPES}
    flat_gpu = {dtype: values.cuda() for dtype, values in flat.items()}
    views = [(0, 5000), (5001, 10_003), (15_005, 50_000)]

    def parameters(source: dict) -> list[nn.Parameter]:
        return [nn.Parameter(source[d][b:e]) for d in FLOAT_DTYPES for b, e in views]

    ours, copies = parameters(flat), parameters(flat_gpu)
    a, b = optimizer_class(ours, lr=0.1), optimizer_class(copies, lr=0.1)
    for _ in range(3):
        for p, q in zip(ours, copies, strict=True):
            gradient = torch.randn(p.numel() + 1).to(p.dtype)
            p.grad, q.grad = gradient[1:], gradient.cuda()[1:]
        a.step()
        b.step()
    assert_same(a, b)


@over_all
def test_more_parameters_than_a_launch_takes(optimizer_class):
    parameters = make_parameters(shapes=[(i * 37 % 5003,) for i in range(1000)])
    copies = on_gpu(parameters)
    a, b = optimizer_class(parameters), optimizer_class(copies)
    for step in range(2):
        set_gradients(step, parameters)
        copy_gradients(parameters, copies)
        a.step()
        b.step()
    assert_same(a, b)


@over_all
def test_stochastic_rounding_gives_the_bits_of_the_cpu(optimizer_class):
    parameters = make_parameters(torch.bfloat16, SHAPES)
    copies = on_gpu(parameters)
    torch.manual_seed(5)
    a = optimizer_class(parameters, lr=1e-4, stochastic_rounding=True)
    torch.manual_seed(5)
    b = optimizer_class(copies, lr=1e-4, stochastic_rounding=True)
    for step in range(4):
        set_gradients(step, parameters)
        copy_gradients(parameters, copies)
        a.step()
        b.step()
    assert_same(a, b)


@over_all
@pytest.mark.parametrize("paging", ["managed", "pinned"])
def test_pages_under_a_budget_give_the_bits_of_the_cpu(optimizer_class, paging):
    """Of three pages and more, no more than two are on the device at a time."""
    parameters = make_parameters(shapes=[(2000, 1024), (300,), (50, 70)])
    copies = on_gpu(parameters)
    page_bytes, budget = 600_000, 1_400_000
    a = optimizer_class(parameters)
    b = optimizer_class(copies, paging=paging, page_bytes=page_bytes, resident_bytes=budget)
    for step in range(3):
        set_gradients(step, parameters)
        copy_gradients(parameters, copies)
        a.step()
        b.step()
    assert_same(a, b)
    report = b.paging_report()
    large = max(report.parts, key=lambda part: part.bytes)
    assert (large.strategy, large.device) == (paging, "cuda:0")
    assert large.pages >= 3
    assert report.device_bytes + report.host_bytes + report.unknown_bytes == report.bytes
    assert report.device_bytes <= budget
    assert report.moved_to_device_bytes > 0


def test_a_list_may_be_on_the_cpu_and_the_gpu():
    parameters = make_parameters(shapes=[(300,), (5000,)])
    mixed = [parameters[0], *on_gpu(parameters[1:])]
    alone = on_gpu(parameters)
    a, b = PagedAdamW(mixed), PagedAdamW(alone)
    set_gradients(0, parameters)
    copy_gradients(parameters, alone)
    mixed[1].grad = alone[1].grad.clone()
    a.step()
    b.step()
    assert_same(a, b)


def test_steps_follow_torch_fused():
    ours = on_gpu(make_parameters(shapes=SHAPES))
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = PagedAdamW(ours, lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(20):
        torch.manual_seed(step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            p.data.copy_(q)


@over_all
def test_a_state_dict_moves_between_the_devices(optimizer_class):
    parameters = make_parameters(shapes=SHAPES)
    a = optimizer_class(parameters)
    set_gradients(0, parameters)
    a.step()
    copies = on_gpu(parameters)
    b = optimizer_class(copies)
    b.load_state_dict(a.state_dict())
    for step in range(1, 3):
        set_gradients(step, parameters)
        copy_gradients(parameters, copies)
        a.step()
        b.step()
    assert_same(a, b)
    back = optimizer_class(make_parameters(shapes=SHAPES))
    back.load_state_dict(b.state_dict())
    for p, q in zip(snapshot(back)[len(SHAPES) :], snapshot(b)[len(SHAPES) :], strict=True):
        assert same_bits(p, q.cpu())


# ---- streams and graphs


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_list_may_be_on_two_gpus():
    parameters = make_parameters(shapes=[(300,), (5000,)])
    copies = [nn.Parameter(p.detach().to(f"cuda:{i}")) for i, p in enumerate(parameters)]
    a, b = PagedAdamW8bit(parameters), PagedAdamW8bit(copies)
    set_gradients(0, parameters)
    for p, q in zip(parameters, copies, strict=True):
        q.grad = p.grad.to(q.device)
    a.step()
    b.step()
    assert_same(a, b)
