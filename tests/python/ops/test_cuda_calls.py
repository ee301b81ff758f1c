"""What the core is asked on CUDA, without a GPU: fake CUDA tensors, and a core that writes down."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qlora_native import _core, ops
from qlora_native.ops import base_product, kernel_choice, lora, lora_groups, storage
from qlora_native.ops.storage import NF4Tensors, empty_nf4_tensors
from support import FLOAT_DTYPES, over_dtypes

pytestmark = pytest.mark.real_kernel_choice

N, K, R = 48, 64, 8
DEVICE = torch.device("cuda", 1)  # while the current device is another
STREAM = 0x5EED


@pytest.fixture
def core(monkeypatch):
    """Takes the place of the core's operations; `plan` is its answer, `calls` what it was asked."""
    seen = SimpleNamespace(plan={"forward": "tiles", "grad_input": "tiles"}, calls=[], plans=[])

    def strategy(direction, *sizes):
        seen.plans.append((direction, *sizes))
        return seen.plan[direction]

    def recorder(name):
        def operation(*arguments):
            *operands, threads, stream = arguments
            assert (threads, stream) == (1, STREAM), name
            for tensor in tensors_of(operands):
                assert tensor.device == DEVICE, name
                assert tensor.is_contiguous(), name
            seen.calls.append(name)

        return operation

    def stream_of(device_index: int) -> int:
        assert device_index == DEVICE.index
        return STREAM

    kernel_choice._is_native_on_cuda.cache_clear()
    monkeypatch.setattr(_core, "nf4_matmul_strategy", strategy, raising=False)
    monkeypatch.setattr(storage, "_current_raw_stream", stream_of)
    operations = ("nf4_dequantize", "nf4_linear", "nf4_linear_grad_input", "dropout")
    for name in (*operations, "lora_forward", "lora_backward"):
        monkeypatch.setattr(_core, name, recorder(name))
    with FakeTensorMode():
        yield seen
    kernel_choice._is_native_on_cuda.cache_clear()


def tensors_of(operands) -> list[Tensor]:
    tensors = []
    for operand in operands:
        parts = operand[:4] if isinstance(operand, NF4Tensors) else (operand,)
        tensors += [part for part in parts if isinstance(part, Tensor)]
    return tensors


def gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def weight(n: int = N, k: int = K) -> NF4Tensors:
    return empty_nf4_tensors(n, k, 64, True, DEVICE)


@pytest.mark.parametrize("strategy", ["plain", "few_tokens", "tiles", "workspace"])
@over_dtypes
def test_the_plan_decides_for_each_direction(core, strategy, dtype):
    other = "tiles" if strategy == "workspace" else "workspace"
    core.plan = {"forward": strategy, "grad_input": other}
    forward = "nf4_dequantize" if strategy == "workspace" else "nf4_linear"
    backward = "nf4_dequantize" if other == "workspace" else "nf4_linear_grad_input"

    y = base_product.base_forward(gpu(2, 3, K, dtype=dtype), weight(), gpu(N, dtype=dtype))
    dx = base_product.base_grad_input(gpu(2, 3, N, dtype=dtype), weight())
    assert (y.shape, y.dtype, y.device) == ((2, 3, N), dtype, DEVICE)
    assert (dx.shape, dx.dtype, dx.device) == ((2, 3, K), dtype, DEVICE)
    assert core.calls == [forward, backward]
    name = str(dtype).removeprefix("torch.")
    assert core.plans == [(d, 6, N, K, name, 64, 1) for d in ("forward", "grad_input")]


def test_a_plan_is_asked_for_once(core):
    for _ in range(3):
        base_product.base_forward(gpu(5, K), weight(), None)
    base_product.base_forward(gpu(1, 5, K), weight(), None)
    assert len(core.plans) == 1
    base_product.base_forward(gpu(6, K), weight(), None)
    base_product.base_forward(gpu(5, K), weight(n=N + 8), None)
    base_product.base_forward(gpu(5, K, dtype=torch.float16), weight(), None)
    assert len(core.plans) == 4


def test_a_strategy_without_a_name_here_is_an_error(core):
    core.plan["forward"] = "sparse"
    with pytest.raises(KeyError, match="sparse"):
        base_product.base_forward(gpu(5, K), weight(), None)


def test_what_the_core_refuses_to_plan_is_refused_each_time(core, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("compute capability 7.5")

    monkeypatch.setattr(_core, "nf4_matmul_strategy", refuse)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"7\.5"):
            base_product.base_forward(gpu(5, K), weight(), None)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_without_tokens_there_is_no_plan_and_no_workspace(core, shape):
    assert base_product.base_forward(gpu(*shape, K), weight(), None).shape == (*shape, N)
    assert base_product.base_grad_input(gpu(*shape, N), weight()).shape == (*shape, K)
    assert core.calls == ["nf4_linear", "nf4_linear_grad_input"]
    assert core.plans == []


def test_a_sum_of_nothing_is_left_to_torch(core):
    empty = weight(n=N, k=0)
    assert base_product.base_forward(gpu(3, 0), empty, gpu(N)).shape == (3, N)
    assert core.calls == ["nf4_dequantize"]


# ---- LoRA


LORA_ROWS = {
    (torch.bfloat16, 64, 48): True,
    (torch.float16, 64, 48): True,
    (torch.float32, 64, 48): False,
    (torch.bfloat16, 60, 48): False,
    (torch.bfloat16, 64, 44): False,
}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("factors_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "k", "n"), LORA_ROWS, ids=str)
def test_lora_takes_the_kernels_of_its_table(core, dtype, k, n, factors_dtype, kind, p):
    base = weight(n, k) if kind == "nf4" else gpu(n, k, dtype=dtype)
    seed = gpu(1, dtype=torch.int64) if p else None
    a, b = gpu(R, k, dtype=factors_dtype), gpu(n, R, dtype=factors_dtype)
    factors = lora.LoRAFactors(a, b, seed, 0.5, p)
    x, dy = gpu(2, 5, k, dtype=dtype), gpu(2, 5, n, dtype=dtype)
    is_native = LORA_ROWS[dtype, k, n]

    y, t = lora.forward(x, base, gpu(n, dtype=dtype), factors)
    assert (y.shape, y.dtype) == ((2, 5, n), dtype)
    assert (t.shape, t.dtype) == ((10, R), dtype)
    expected = ["nf4_linear"] * (kind == "nf4") + ["dropout"] * (p > 0)
    assert core.calls == expected + ["lora_forward"] * is_native

    for needs_dx in (True, False):
        core.calls.clear()
        dx, grad_a, grad_b = lora.backward(dy, x, t, base, factors, needs_dx)
        assert (dx is None) == (not needs_dx)
        if dx is not None:
            assert (dx.shape, dx.dtype) == (x.shape, dtype)
        assert (grad_a.shape, grad_a.dtype) == (a.shape, factors_dtype)
        assert (grad_b.shape, grad_b.dtype) == (b.shape, factors_dtype)
        expected = ["nf4_linear_grad_input"] * (kind == "nf4" and needs_dx) + ["dropout"] * (p > 0)
        expected += ["lora_backward"] * is_native + ["dropout"] * (p > 0 and needs_dx)
        assert core.calls == expected


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "k", "n"), LORA_ROWS, ids=str)
def test_every_group_with_rows_is_a_call_of_its_own(core, dtype, k, n, p):
    seed = gpu(1, dtype=torch.int64) if p else None
    first, second = (
        lora.LoRAFactors(gpu(r, k, dtype=torch.float32), gpu(n, r, dtype=torch.float32), seed, 1, p)
        for r in (R, 3)
    )
    groups = [(0, 2, first), (2, 2, second), (2, 5, second), (7, 10, first)]
    groups = [ops.LoRAGroup(*group) for group in groups]
    x, dy = gpu(2, 5, k, dtype=dtype), gpu(2, 5, n, dtype=dtype)
    is_native = LORA_ROWS[dtype, k, n]
    plan, pairs, seeds = lora_groups._listed(x, n, k, groups)

    y, t = lora_groups._forward(x, weight(n, k), None, plan, pairs, seeds)
    assert (y.shape, y.dtype) == ((2, 5, n), dtype)
    assert (t.shape, t.dtype) == ((5 * R + 3 * 3,), dtype)
    group = ["dropout"] * (p > 0) + ["lora_forward"] * is_native
    assert core.calls == ["nf4_linear", *3 * group]

    core.calls.clear()
    dx, gradients = lora_groups._backward(dy, x, t, weight(n, k), plan, pairs, seeds, True)
    assert (dx.shape, dx.dtype) == (x.shape, dtype)
    assert [gradient.shape for gradient in gradients] == [factor.shape for factor in pairs]
    group = ["dropout"] * (p > 0) + ["lora_backward"] * is_native + ["dropout"] * (p > 0)
    assert core.calls == ["nf4_linear_grad_input", *3 * group]


def test_every_dtype_has_its_row():
    assert set(kernel_choice._CUDA_LORA_DTYPES) == set(FLOAT_DTYPES)


# ---- devices


@pytest.mark.parametrize("other", ["cpu", "cuda:0"])
def test_a_tensor_elsewhere_than_the_weight_is_refused_by_both_names(core, other):
    x = torch.empty(3, K, device=other)
    with pytest.raises(ValueError, match=f"x is on {other}, the weight is on cuda:1"):
        ops.nf4_linear(x, weight())
    bias = torch.empty(N, device=other)
    with pytest.raises(ValueError, match=rf"bias is .* on {other}, want .* on cuda:1"):
        ops.nf4_linear(gpu(3, K, dtype=torch.float32), weight(), bias)
    factors = torch.empty(R, K, device=other), torch.empty(N, R, device=other)
    with pytest.raises(ValueError, match=f"lora_a is on {other} .*, x is on cuda:1"):
        ops.lora_linear(gpu(3, K), weight(), None, *factors, 1.0)
    dense = torch.empty(N, K, device=other)
    with pytest.raises(ValueError, match=f"x is on cuda:1, the weight is on {other}"):
        ops.lora_linear(gpu(3, K), dense, None, gpu(R, K), gpu(N, R), 1.0)
    assert core.calls == []


def test_the_stream_is_the_current_one_of_the_tensors_device(monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "_current_raw_stream", lambda i: asked.append(i) or 10 + i)
    with FakeTensorMode():
        for index in (0, 1, 3):
            assert storage.execution(torch.empty(1, device=f"cuda:{index}")) == (1, 10 + index)
    assert asked == [0, 1, 3]
    assert storage.execution(torch.empty(1)) == (torch.get_num_threads(), 0)


def test_a_torch_without_raw_streams_is_asked_for_the_object(monkeypatch):
    streams = {0: SimpleNamespace(cuda_stream=7), 1: SimpleNamespace(cuda_stream=9)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    assert storage._raw_stream_of_object(1) == 9
