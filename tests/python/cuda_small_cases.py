"""Every operation of the core on small odd shapes, against the CPU backend.

python tests/python/cuda_small_cases.py [--device cpu]

Small enough for compute-sanitizer, under which benchmarks/gpu_check.sh runs it, and without a need
of GoogleTest. The exit status is 1 if a result is wrong. On the CPU it shows that it is right.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_native import (
    NF4Weight,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    _core,
    nf4_dequantize,
    nf4_quantize,
)
from qlora_native.ops.storage import NF4Tensors, execution
from support import FLOAT_DTYPES, Approximate, assert_within, same_bits

# (n, k): a row of odd length; tails in each tile; more than one tile of each kernel.
SHAPES = [(5, 37), (72, 200), (136, 320)]
TOKENS = [1, 3, 17, 33, 70]  # to 32 tokens and beyond there are different kernels
RANKS = [3, 16]


def quantize_and_dequantize(device: torch.device) -> None:
    """Bits; blocks smaller, larger and no divisor of a row."""
    for (n, k), block_size, nested, dtype in itertools.product(
        SHAPES, (32, 64, 4096), (False, True), FLOAT_DTYPES
    ):
        w = torch.randn(n, k).to(dtype)
        expected, actual = (nf4_quantize(one, block_size, nested) for one in (w, w.to(device)))
        for name, a, b in zip(NF4Tensors._fields, actual.tensors, expected.tensors, strict=True):
            if isinstance(b, Tensor):
                assert same_bits(a.cpu(), b), f"{name} of {n}x{k}, blocks of {block_size}, {dtype}"
        assert same_bits(actual.absmax.cpu(), expected.absmax)
        dense = nf4_dequantize(expected.to(device), dtype)
        assert same_bits(dense.cpu(), nf4_dequantize(expected, dtype))


def products(device: torch.device) -> None:
    """Forward with and without a bias, and dX, by the core's own kernel whatever is advised."""
    for (n, k), m, dtype in itertools.product(SHAPES, TOKENS, FLOAT_DTYPES):
        weight = nf4_quantize(torch.randn(n, k), 64, double_quant=m % 2 == 1)
        w = Approximate(nf4_dequantize(weight, dtype))
        on_device: NF4Weight = weight.to(device)
        x, dy, bias = (torch.randn(*size).to(dtype) for size in ((m, k), (m, n), (n,)))
        for b in (bias, None):
            y = torch.empty(m, n, dtype=dtype, device=device)
            there = None if b is None else b.to(device)
            _core.nf4_linear(x.to(device), on_device.tensors, there, y, *execution(y))
            expected = Approximate(x) @ w.t()
            if b is not None:
                expected = expected + Approximate(b)
            assert_within(y.cpu(), expected.rounded_to(dtype))
        dx = torch.empty(m, k, dtype=dtype, device=device)
        _core.nf4_linear_grad_input(dy.to(device), on_device.tensors, dx, *execution(dx))
        assert_within(dx.cpu(), (Approximate(dy) @ w).rounded_to(dtype))


def lora(device: torch.device) -> None:
    """Shrink, expand and the gradients, in all dtypes, with fp32 factors."""
    scaling = 0.5
    for (n, k), m, r, dtype in itertools.product(SHAPES, (1, 17, 70), RANKS, FLOAT_DTYPES):
        x, dy, y, dx = (torch.randn(m, size).to(dtype) for size in (k, n, n, k))
        a, b = torch.randn(r, k), torch.randn(n, r)
        a_, b_ = (Approximate(factor.to(dtype)) for factor in (a, b))
        x_there, dy_there, a_there, b_there, y_there, dx_there = (
            tensor.to(device) for tensor in (x, dy, a, b, y.clone(), dx.clone())
        )
        t = torch.empty(m, r, dtype=dtype, device=device)
        _core.lora_forward(x_there, a_there, b_there, scaling, t, y_there, *execution(t))
        assert_within(t.cpu(), (Approximate(x) @ a_.t()).rounded_to(dtype))
        t_ = Approximate(t.cpu())
        assert_within(y_there.cpu(), (Approximate(y) + (t_ @ b_.t()) * scaling).rounded_to(dtype))
        grad_a, grad_b = torch.empty_like(a_there), torch.empty_like(b_there)
        gradients = (grad_a, grad_b, dx_there)
        arguments = (dy_there, x_there, t, a_there, b_there, scaling)
        _core.lora_backward(*arguments, *gradients, *execution(t))
        u = ((Approximate(dy) @ b_) * scaling).rounded_to(dtype)
        assert_within(grad_a.cpu(), (u.t() @ Approximate(x)).rounded_to(a.dtype))
        grad_b_ = (Approximate(dy).t() @ t_) * scaling
        assert_within(grad_b.cpu(), grad_b_.rounded_to(b.dtype))
        assert_within(dx_there.cpu(), (Approximate(dx) + u @ a_).rounded_to(dtype))


def dropout(device: torch.device) -> None:
    """Bits: the mask is a function of the seed and of an element's index."""
    for count, dtype in itertools.product((1, 37, 5003), FLOAT_DTYPES):
        x, seed = torch.randn(count).to(dtype), torch.tensor([17])
        results = []
        for place in (torch.device("cpu"), device):
            out = torch.empty(count, dtype=dtype, device=place)
            _core.dropout(x.to(place), 0.25, seed.to(place), out, *execution(out))
            results.append(out.cpu())
        assert same_bits(*results)


def optimizers(device: torch.device) -> None:
    """Bits of parameters and state after two steps, of a list of all dtypes."""
    sizes = [(1,), (300,), (33, 65), (0, 5), (20_001,)]
    classes = (PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit)
    for optimizer_class, is_stochastic in itertools.product(classes, (False, True)):
        dtypes = FLOAT_DTYPES[:2] if is_stochastic else FLOAT_DTYPES
        values = [torch.randn(size).to(dtype) for size in sizes for dtype in dtypes]
        gradients = [[torch.randn_like(value) for value in values] for _ in range(2)]
        outcomes = []
        for place in (torch.device("cpu"), device):
            parameters = [nn.Parameter(value.to(place, copy=True)) for value in values]
            torch.manual_seed(17)  # of the rounding
            optimizer = optimizer_class(parameters, lr=0.1, stochastic_rounding=is_stochastic)
            for step in gradients:
                for parameter, gradient in zip(parameters, step, strict=True):
                    parameter.grad = gradient.to(place)
                optimizer.step()
            states = [optimizer.state[parameter] for parameter in parameters]
            tensors = [*parameters, *(tensor for state in states for tensor in state.values())]
            outcomes.append([tensor.detach().cpu() for tensor in tensors])
        assert all(same_bits(a, b) for a, b in zip(*outcomes, strict=True))


def paging(device: torch.device) -> None:
    """Pages that are changed on the device, and read on the host."""
    page_bytes, pages = 2**16, 5
    for strategy in ("automatic", "pinned") if device.type == "cuda" else ("ordinary",):
        options = {"resident_bytes": 2 * page_bytes} if device.type == "cuda" else {}
        count = pages * page_bytes - 100  # the last page is shorter
        buffer = _core.PagedBuffer(
            str(device), count, page_bytes=page_bytes, strategy=strategy, **options
        )
        everything = torch.from_dlpack(buffer.memory(0, count))
        everything.fill_(3)
        _wait(device)
        stream = execution(torch.empty(0, device=device))[1]
        for page in range(buffer.page_count):
            torch.from_dlpack(buffer.begin(page, stream)).add_(1)
            buffer.end(page, stream)
        buffer.join(stream)
        _wait(device)
        assert bool((torch.from_dlpack(buffer.memory(0, count)) == 4).all()), strategy


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CASES: tuple[Callable[[torch.device], None], ...] = (
    quantize_and_dequantize,
    products,
    lora,
    dropout,
    optimizers,
    paging,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    status = 0
    for case in CASES:
        torch.manual_seed(0)
        try:
            case(device)
            _wait(device)
        except Exception as error:  # each case, so that one run says all that is wrong
            status = 1
            print(f"{case.__name__}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{case.__name__}: right", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
