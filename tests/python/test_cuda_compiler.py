"""torch.compile of layers on a GPU, and the operators that it sees."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from qlora_native import nf4_quantize
from support import assert_near, lora_layer, nf4_layer, over_nesting, same_bits

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(p: float) -> nn.Sequential:
    return nn.Sequential(
        nf4_layer(48, 72),
        nn.ReLU(),
        lora_layer(nf4_layer(40, 48), lora_dropout=p),
        nn.GELU(),
        lora_layer(nn.Linear(40, 24)),
    )


def model_results(model: Callable, parameters: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(17)
    x = x.detach().requires_grad_()
    y = model(x)
    trained = [p for p in parameters.parameters() if p.requires_grad]
    return [y.detach().clone(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_compiled_model_gives_the_bits_of_the_eager_one(device, p):
    model = make_model(p).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((9, 72), (2, 5, 72)):
        x = torch.randn(shape, device=device)
        actual = model_results(compiled, model, x)
        for a, b in zip(actual, model_results(model, model, x), strict=True):
            assert same_bits(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_a_model_as_one_graph(device, mode):
    if device.type == "cuda":
        pytest.importorskip("triton")
    model = make_model(0.0).to(device)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # with reduce-overhead: warm-up, recording, replay
        x = torch.randn(9, 72, device=device)
        torch.compiler.cudagraph_mark_step_begin()
        actual = [tensor.clone() for tensor in model_results(compiled, model, x)]
        for a, b in zip(actual, model_results(model, model, x), strict=True):
            assert_near(a, b)


def test_autocast_and_compute_dtype_compile(device):
    model = nn.Sequential(
        nf4_layer(48, 72, compute_dtype=torch.bfloat16), lora_layer(nf4_layer(40, 48))
    ).to(device)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 72, device=device)
    assert compiled(x).dtype == torch.bfloat16
    for a, b in zip(model_results(compiled, model, x), model_results(run, model, x), strict=True):
        assert same_bits(a, b)


ops = torch.ops.qlora_native


@over_nesting
def test_opcheck_of_the_codec_and_the_products(device, double_quant):
    n, k = 40, 72
    w = torch.randn(n, k, device=device)
    weight = tuple(nf4_quantize(w, 32, double_quant).tensors)
    opcheck(ops.nf4_quantize.default, (w, n, k, 32, double_quant))
    opcheck(ops.nf4_dequantize.default, (*weight, torch.bfloat16))
    opcheck(ops.nf4_dequantize_absmax.default, weight)
    bias = torch.randn(n, device=device, requires_grad=True)
    for m in (3, 40):
        x, dy = (torch.randn(m, size, device=device, requires_grad=True) for size in (k, n))
        opcheck(ops.nf4_linear.default, (x, bias, *weight))
        opcheck(ops.nf4_linear_grad_input.default, (dy, *weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck_of_lora(device, p, dtype):
    n, k, r = 40, 72, 4
    weight = tuple(nf4_quantize(torch.randn(n, k, device=device), 32).tensors)
    for m in (3, 40):
        x, dy = (torch.randn(m, size, device=device).to(dtype) for size in (k, n))
        x.requires_grad_()
        bias = torch.randn(n, device=device).to(dtype)
        a, b = torch.randn(r, k, device=device), torch.randn(n, r, device=device)
        a.requires_grad_()
        b.requires_grad_()
        seed = torch.tensor([5], device=device) if p else None
        t = torch.randn(m, r, device=device).to(dtype)
        opcheck(ops.lora_linear.default, (x, bias, a, b, seed, *weight, 0.5, p))
        for needs_dx in (True, False):
            detached = (dy, x.detach(), t, a.detach(), b.detach(), seed)
            arguments = (*detached, *weight, 0.5, p, needs_dx)
            opcheck(ops.lora_linear_backward.default, arguments)
