"""The registration with torch.library: opcheck, torch.compile, torch.export."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from qlora_native import nf4_dequantize, nf4_quantize
from qlora_native.nn.routing import Routing
from qlora_native.ops import (
    LoRAFactors,
    LoRAGroup,
    dora_linear,
    lora_linear_groups,
    quantize,
    row_norms_squared,
)
from support import (
    BATCHES,
    K,
    N,
    assert_near,
    lora_layer,
    make_base,
    nf4_layer,
    over_dtypes,
    over_nesting,
    same_bits,
)

ops = torch.ops.qlora_native


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_operator_is_checked_here():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qlora_native::")
    }
    assert registered == {
        "nf4_quantize",
        "nf4_dequantize",
        "nf4_dequantize_absmax",
        "nf4_linear",
        "nf4_linear_grad_input",
        "lora_linear",
        "lora_linear_backward",
        "lora_linear_groups",
        "lora_linear_groups_backward",
        "dora_linear",
        "dora_linear_backward",
        "check_recomputation",
    }


def weight_arguments(n: int, k: int, double_quant: bool) -> tuple:
    return tuple(nf4_quantize(torch.randn(n, k), 32, double_quant).tensors)


@over_nesting
@over_dtypes
def test_opcheck_of_the_codec(dtype, double_quant):
    w = torch.randn(24, 40, dtype=dtype)
    opcheck(ops.nf4_quantize.default, (w, 24, 40, 32, double_quant))
    opcheck(ops.nf4_quantize.default, (w.t(), 40, 24, 32, double_quant))
    arguments = weight_arguments(24, 40, double_quant)
    opcheck(ops.nf4_dequantize.default, (*arguments, dtype))
    opcheck(ops.nf4_dequantize_absmax.default, arguments)


@over_nesting
@pytest.mark.parametrize("shape", [(3,), (9,), (2, 5)], ids=str)
def test_opcheck_of_the_linear_products(shape, double_quant):
    weight = weight_arguments(N, K, double_quant)
    x, dy = (torch.randn(*shape, size, requires_grad=True) for size in (K, N))
    bias = torch.randn(N, requires_grad=True)
    opcheck(ops.nf4_linear.default, (x, bias, *weight))
    opcheck(ops.nf4_linear.default, (x.detach(), None, *weight))
    opcheck(ops.nf4_linear_grad_input.default, (dy, *weight))


def test_opcheck_of_the_check_of_a_routing():
    opcheck(ops.check_recomputation.default, (Routing("a")._key,))
    opcheck(ops.check_recomputation.default, (torch.tensor(-1),))  # of another process


def base_arguments(kind: str) -> tuple:
    if kind == "dense":
        return torch.randn(N, K), None, None, None, N, K, 0
    return weight_arguments(N, K, kind == "nested")


@pytest.mark.parametrize("kind", ["nested", "plain", "dense"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("m", [3, 9])
def test_opcheck_of_lora(kind, p, m):
    weight = base_arguments(kind)
    x, dy = torch.randn(m, K, requires_grad=True), torch.randn(m, N)
    bias = torch.randn(N, requires_grad=True)
    a, b = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    seed = torch.tensor([5]) if p else None
    opcheck(ops.lora_linear.default, (x, bias, a, b, seed, *weight, 0.5, p))
    t = torch.randn(m, 4)
    for needs_dx in (True, False):
        arguments = (dy, x.detach(), t, a.detach(), b.detach(), seed, *weight, 0.5, p, needs_dx)
        opcheck(ops.lora_linear_backward.default, arguments)


@pytest.mark.parametrize("kind", ["nested", "dense"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(9,), (3, 3)], ids=str)
def test_opcheck_of_groups(kind, p, shape):
    weight = base_arguments(kind)
    x, dy = torch.randn(*shape, K, requires_grad=True), torch.randn(*shape, N)
    bias = torch.randn(N, requires_grad=True)
    lora_a = [torch.randn(r, K, requires_grad=True) for r in (4, 3)]
    lora_b = [torch.randn(N, r, requires_grad=True) for r in (4, 3)]
    seeds = [torch.tensor([5]), torch.tensor([6])] if p else []
    plan = [0, 2, 5], [2, 5, 8], [0, 1, 0], [0, -1, 1] if p else [-1] * 3, [0.5, 1.0, 2.0]
    ps = [p, 0.0, p]
    arguments = (x, bias, lora_a, lora_b, seeds, *weight, *plan, ps)
    opcheck(ops.lora_linear_groups.default, arguments)
    factors = [[factor.detach() for factor in factors] for factors in (lora_a, lora_b)]
    for needs_dx in (True, False):
        arguments = (dy, x.detach(), torch.randn(29), *factors, seeds, *weight, *plan, ps, needs_dx)
        opcheck(ops.lora_linear_groups_backward.default, arguments)


@pytest.mark.parametrize("kind", ["nested", "dense"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(9,), (3, 3)], ids=str)
def test_opcheck_of_dora(kind, p, shape):
    weight = base_arguments(kind)
    x, dy = torch.randn(*shape, K, requires_grad=True), torch.randn(*shape, N)
    bias = torch.randn(N, requires_grad=True)
    a, b = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    magnitude = torch.rand(N, requires_grad=True)
    seed = torch.tensor([5]) if p else None
    squared = 100 + torch.rand(N)
    arguments = (x, bias, a, b, magnitude, seed, squared, *weight, 0.5, p)
    opcheck(ops.dora_linear.default, arguments)
    t, rows, norms = torch.randn(9, 4), torch.randn(*shape, N), 1 + torch.rand(N)
    trained = [tensor.detach() for tensor in (a, b, magnitude)]
    for needs_dx in (True, False):
        kept = t, rows if needs_dx else None, norms
        arguments = (dy, x.detach(), *kept, *trained, seed, *weight, 0.5, p, needs_dx)
        opcheck(ops.dora_linear_backward.default, arguments)


# ---- torch.compile


def make_model(p: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nf4_layer(48, K),
        nn.ReLU(),
        lora_layer(nf4_layer(32, 48), lora_dropout=p),
        nn.GELU(),
        lora_layer(make_base("dense", n=N, k=32)),
    )


def forward_and_backward(model, parameters: nn.Module, x: Tensor) -> list[Tensor]:
    """y and the gradients of x and of every trained parameter, from one seed."""
    torch.manual_seed(17)
    x = x.detach().requires_grad_()
    y = model(x)
    trained = [p for p in parameters.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_compiled_is_eager(compiled, model, x: Tensor, exact: bool) -> None:
    actual = forward_and_backward(compiled, model, x)
    expected = forward_and_backward(model, model, x)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if exact:
            assert same_bits(a, b)
        else:
            assert_near(a, b)


@pytest.mark.slow
def test_inductor_compiles_a_model_as_one_graph():
    model = make_model()
    compiled = torch.compile(model, fullgraph=True)
    assert_compiled_is_eager(compiled, model, torch.randn(9, K), exact=False)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_compiled_model_gives_the_bits_of_the_eager_one(p):
    model = make_model(p)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((9, K), (2, K)):
        assert_compiled_is_eager(compiled, model, torch.randn(shape), exact=True)


def test_dynamic_shapes_compile_once_for_all_batches():
    model = make_model(0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    assert_compiled_is_eager(compiled, model, torch.randn(9, K), exact=True)
    compilations = counter.frame_count
    for m in (2, 33, 4, 5, 70):
        assert_compiled_is_eager(compiled, model, torch.randn(m, K), exact=True)
    assert counter.frame_count == compilations
    for shape in ((2, 5, K), (1, K), (K,)):
        assert_compiled_is_eager(compiled, model, torch.randn(shape), exact=True)


def test_autocast_and_compute_dtype_compile():
    model = nn.Sequential(
        nf4_layer(48, K, compute_dtype=torch.bfloat16), lora_layer(nf4_layer(N, 48))
    )

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for m in (2, 9):
        x = torch.randn(m, K)
        assert compiled(x).dtype == torch.bfloat16
        for actual, expected in zip(
            forward_and_backward(compiled, model, x),
            forward_and_backward(run, model, x),
            strict=True,
        ):
            assert same_bits(actual, expected)


def test_evaluation_compiles_without_gradients():
    model = make_model(0.5).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, K)
    with torch.no_grad():
        assert same_bits(compiled(x), model(x))
    with torch.inference_mode():
        assert same_bits(compiled(x), model(x))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_groups_and_dora_compile(p):
    weight = quantize(torch.randn(N, K), 32, True)
    squared = row_norms_squared(weight)
    r = 4
    trained = nn.ParameterList(
        [torch.randn(r, K) / 8, torch.randn(N, r), torch.randn(3, K) / 8, torch.randn(N, 3)]
    )
    trained.append(squared.sqrt())

    def run(x: Tensor) -> Tensor:
        a, b, other_a, other_b, magnitude = trained
        seed = torch.randint(2**63 - 1, (1,)) if p else None
        first = LoRAFactors(a, b, seed, 0.5, p)
        second = LoRAFactors(other_a, other_b, None, 2.0, 0.0)
        rows = x.shape[0]
        groups = [
            LoRAGroup(0, rows // 3, first),
            LoRAGroup(rows // 3, rows - 1, second),
            LoRAGroup(rows - 1, rows, first),
        ]
        return lora_linear_groups(x, weight, None, groups) + dora_linear(
            x, weight, None, a, b, magnitude, 0.5, squared, p, seed
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for m in (9, 12, 33):
        x = torch.randn(m, K)
        for actual, expected in zip(
            forward_and_backward(compiled, trained, x),
            forward_and_backward(run, trained, x),
            strict=True,
        ):
            assert same_bits(actual, expected)
    assert counter.frame_count == 1


def test_the_codec_compiles():
    def round_trip(w: Tensor) -> Tensor:
        return nf4_dequantize(nf4_quantize(w, 32), torch.bfloat16)

    w = torch.randn(24, 40)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(w), round_trip(w))


def test_an_x_that_does_not_fit_is_refused_while_compiling():
    compiled = torch.compile(nf4_layer(N, K), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="nf4_linear"):  # of which class is up to torch
        compiled(torch.randn(3, K + 1))


def test_export_records_the_operators():
    model = make_model().eval()
    x = torch.randn(9, K)
    dynamic = ({0: torch.export.Dim("m", min=2, max=512)},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"qlora_native.nf4_linear.default", "qlora_native.lora_linear.default"} <= targets
    for m in BATCHES[1:]:
        x = torch.randn(m, K)
        torch.testing.assert_close(program.module()(x), model(x))
