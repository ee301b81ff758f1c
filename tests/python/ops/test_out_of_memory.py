"""A core that runs out of GPU memory is called again once torch's cache is free: without a GPU."""

import pytest
import torch

from qlora_native import (
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    _core,
    nf4_dequantize,
    nf4_quantize,
    ops,
)
from qlora_native.ops.storage import run_core

OPERATIONS = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_dequantize_absmax",
    "nf4_linear",
    "nf4_linear_grad_input",
    "lora_forward",
    "lora_backward",
    "dropout",
)


@pytest.fixture
def torch_cuda(monkeypatch):
    """Torch as it is on a GPU: what was asked of it, and whether a graph is being captured."""

    class State:
        emptied = 0
        is_capturing = False

    def empty_cache() -> None:
        State.emptied += 1

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: State.is_capturing)
    return State


class Failing:
    """An operation that runs out of memory so many times before it works."""

    def __init__(self, operation, failures: int) -> None:
        self.operation, self.failures, self.calls = operation, failures, 0

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls <= self.failures:
            raise torch.OutOfMemoryError(f"failure {self.calls}")
        return self.operation(*arguments, **named)


def test_a_call_that_works_is_made_once(torch_cuda):
    operation = Failing(lambda x, *, y: x + y, 0)
    assert run_core(operation, 1, y=2) == 3
    assert (operation.calls, torch_cuda.emptied) == (1, 0)


def test_a_call_without_memory_is_made_again_when_the_cache_is_free(torch_cuda):
    operation = Failing(lambda x, *, y: (x + y, torch_cuda.emptied), 1)
    assert run_core(operation, 1, y=2) == (3, 1)
    assert operation.calls == 2


def test_a_second_failure_is_the_callers(torch_cuda):
    operation = Failing(lambda: None, 2)
    with pytest.raises(torch.OutOfMemoryError, match="failure 2"):
        run_core(operation)
    assert (operation.calls, torch_cuda.emptied) == (2, 1)


def test_nothing_is_freed_while_a_graph_is_captured(torch_cuda):
    torch_cuda.is_capturing = True
    operation = Failing(lambda: None, 1)
    with pytest.raises(torch.OutOfMemoryError, match="failure 1"):
        run_core(operation)
    assert (operation.calls, torch_cuda.emptied) == (1, 0)


def test_a_cache_that_cannot_be_freed_leaves_the_error_as_it_was(torch_cuda, monkeypatch):
    def refuse() -> None:
        raise RuntimeError("captures are under way")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    operation = Failing(lambda: None, 1)
    with pytest.raises(torch.OutOfMemoryError, match="failure 1"):
        run_core(operation)
    assert operation.calls == 1


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError])
def test_other_errors_are_not_tried_again(torch_cuda, error):
    def operation():
        nonlocal calls
        calls += 1
        raise error

    calls = 0
    with pytest.raises(error):
        run_core(operation)
    assert (calls, torch_cuda.emptied) == (1, 0)


@pytest.mark.real_kernel_choice
def test_every_operation_is_called_so(torch_cuda, monkeypatch):
    failing = {name: Failing(getattr(_core, name), 1) for name in OPERATIONS}
    for name, operation in failing.items():
        monkeypatch.setattr(_core, name, operation)
    for module in (ops.base_product, ops.lora_update):
        for choice in ("prefers_native", "lora_prefers_native"):
            monkeypatch.setattr(module, choice, lambda *_: True, raising=False)

    w, x = torch.randn(8, 64), torch.randn(3, 64, requires_grad=True)
    weight = nf4_quantize(w)
    nf4_dequantize(weight, torch.float32)
    stored = ops.quantize(w, 64, True)
    ops.dequantize_absmax(stored)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    seed = torch.tensor([5])
    ops.lora_linear(x, stored, None, a, b, 2.0, 0.5, seed).sum().backward()
    assert [name for name, operation in failing.items() if operation.calls < 2] == []
    assert torch_cuda.emptied == len(OPERATIONS)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_step_of_an_optimiser_is_called_so(torch_cuda, monkeypatch, failures):
    """Before anything is stepped; and what fails twice has left no state."""
    steps = []

    class Step:
        def __init__(self, *arguments, **options):
            step = step_of_core(*arguments, **options)
            self.prepare, self.run = Failing(step.prepare, failures), step.run
            steps.append(self.prepare)

    step_of_core = _core.PagedStep
    monkeypatch.setattr(_core, "PagedStep", Step)
    for optimizer_class in (PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit):
        p = torch.nn.Parameter(torch.ones(5000))
        p.grad = torch.ones(5000)
        optimizer = optimizer_class([p], lr=0.5)
        if failures == 1:
            optimizer.step()
            assert optimizer.state[p]["step"] == 1
            assert (p < 0.6).all()
        else:
            with pytest.raises(torch.OutOfMemoryError, match="failure 2"):
                optimizer.step()
            assert not optimizer.state
            assert (p == 1).all()
    assert [prepare.calls for prepare in steps] == [2] * 4
    assert torch_cuda.emptied == 4
