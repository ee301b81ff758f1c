"""Layers as guests of torch on a GPU: its streams, graphs, devices, memory and compiler."""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from qlora_native import (
    LoRALinear,
    NF4Linear,
    PagedAdamW,
    PagedAdamW8bit,
    _core,
    add_lora,
    merge_lora,
    nf4_quantize,
    quantize_model,
)
from qlora_native.ops import base_product
from support import (
    Model,
    assert_near,
    lora_layer,
    nf4_layer,
    over_nesting,
    same_bits,
    state_bits,
)

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build

GPU = torch.device("cuda")
SLEEP_CYCLES = 200_000_000  # some 100 ms: the GPU lags well behind the host
TOKENS = (1, 17, 300, 2100)  # for every kernel, and the workspace
N, K = 768, 512

over_tokens = pytest.mark.parametrize("m", TOKENS)
over_optimizers = pytest.mark.parametrize("optimizer_class", [PagedAdamW, PagedAdamW8bit])


@pytest.fixture(params=["nf4", "lora", "lora with dropout"])
def layer(request) -> nn.Module:
    return make_layer(request.param).to(GPU)


def make_layer(kind: str, n: int = N, k: int = K) -> nn.Module:
    if kind == "nf4":
        return nf4_layer(n, k)
    return lora_layer(nf4_layer(n, k), r=16, lora_dropout=0.25 if "dropout" in kind else 0.0)


def batch(m: int, size: int, dtype: torch.dtype = torch.bfloat16, device=GPU) -> Tensor:
    return torch.randn(m, size, device=device).to(dtype)


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x and of what is trained, with the masks of one seed."""
    torch.manual_seed(17)
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_all_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, 2**-6)


# ---- streams


@over_tokens
def test_work_runs_on_the_current_stream(layer, m):
    late_x, late_dy = batch(m, K), batch(m, N)
    expected = results(layer, late_x, late_dy)
    x, dy = torch.zeros_like(late_x), torch.zeros_like(late_dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(late_x)  # what another stream would not wait for
        dy.copy_(late_dy)
        actual = results(layer, x, dy)
    stream.synchronize()
    assert_all_near(actual, expected)


@contextlib.contextmanager
def the_host_may_not_wait() -> Iterator[None]:
    """The GPU sleeps at first: if the sleep is over at the end, something has waited for it."""
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")  # knows of torch's own waits, and where they are
    try:
        yield
        has_waited = slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert not has_waited


@over_tokens
def test_layers_do_not_wait_for_the_gpu(layer, m):
    x, dy = batch(m, K), batch(m, N)
    results(layer, x, dy)  # loads the kernels
    x = x.requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with the_host_may_not_wait():
        torch.autograd.grad(layer(x), leaves, dy)
        with torch.no_grad():
            layer(x)


@over_optimizers
def test_a_training_step_does_not_wait_for_the_gpu(optimizer_class):
    model = add_lora(quantize_model(Model()), r=4, lora_dropout=0.1).to(GPU)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.arange(42, device=GPU).view(6, 7)

    def step() -> None:
        model(tokens).square().mean().backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()  # loads the kernels, makes the state
    with the_host_may_not_wait():
        step()


@over_tokens
def test_streams_side_by_side_do_not_disturb_each_other(m):
    layers = [make_layer(kind).to(GPU) for kind in ("nf4", "lora", "nf4", "lora")]
    batches = [(batch(m, K), batch(m, N)) for _ in layers]
    expected = [results(layer, *xs) for layer, xs in zip(layers, batches, strict=True)]
    streams = [torch.cuda.Stream() for _ in layers]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())

    def work(layer: nn.Module, xs: tuple[Tensor, Tensor], stream) -> list[list[Tensor]]:
        with torch.cuda.stream(stream):
            runs = [results(layer, *xs) for _ in range(10)]
        stream.synchronize()
        return runs

    with ThreadPoolExecutor(len(layers)) as pool:  # each in a thread of its own
        for runs, wanted in zip(pool.map(work, layers, batches, streams), expected, strict=True):
            for run in runs:
                assert_all_near(run, wanted)


# ---- graphs


def warm_up(step: Callable[[], object]) -> None:
    """As torch asks before a capture: some calls on a stream aside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@over_tokens
@pytest.mark.parametrize("kind", ["nf4", "lora"])
def test_forward_and_backward_replay_in_a_graph(kind, m):
    layer = make_layer(kind).to(GPU)
    x, dy = batch(m, K).requires_grad_(), batch(m, N)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        new_x, new_dy = batch(m, K), batch(m, N)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        first = [tensor.detach().clone() for tensor in captured]
        assert_all_near(first, results(layer, new_x, new_dy))
        graph.replay()
        for a, b in zip(captured, first, strict=True):
            assert same_bits(a, b)


def test_each_replay_draws_a_new_mask_for_forward_and_backward_alike():
    # y = dropout(x), dx = dropout(dy): W is zero, A and B are the identity, the scale is 1.
    layer = LoRALinear(NF4Linear(64, 64, bias=False), r=64, lora_alpha=64, lora_dropout=0.5)
    nn.init.eye_(layer.lora_a)
    nn.init.eye_(layer.lora_b)
    layer.to(GPU)
    x = torch.ones(40, 64, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    dy = torch.ones_like(x)

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, x, dy)]

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    masks = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, dx)
        assert ((y == 0) | (y == 2)).all()
        masks.append(y.detach() == 0)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert 0.4 < (masks[a] == masks[b]).float().mean() < 0.6


@over_tokens
@pytest.mark.parametrize("kind", ["nf4", "lora"])
def test_torch_makes_graphed_callables_of_layers(kind, m):
    layer = make_layer(kind).to(GPU)
    eager = copy.deepcopy(layer)
    graphed = torch.cuda.make_graphed_callables(layer, (batch(m, K).requires_grad_(),))
    for _ in range(2):
        x, dy = batch(m, K), batch(m, N)
        assert_all_near(results(graphed, x, dy), results(eager, x, dy))


@over_optimizers
def test_a_graph_of_forward_and_backward_trains(optimizer_class):
    model = add_lora(quantize_model(Model()), r=4, lora_dropout=0.1).to(GPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(trained, lr=1e-2)
    tokens = torch.arange(42, device=GPU).view(6, 7)

    def backward() -> Tensor:
        for parameter in trained:
            parameter.grad = None
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss

    warm_up(backward)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = backward()
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


# ---- devices

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two_gpus
@over_tokens
@pytest.mark.parametrize("kind", ["nf4", "lora"])
def test_work_runs_on_the_device_of_the_tensors(kind, m):
    layer = make_layer(kind).to("cuda:0")
    x, dy = batch(m, K), batch(m, N)
    expected = [tensor.to("cuda:1") for tensor in results(layer, x, dy)]
    layer.to("cuda:1")
    with torch.cuda.device(0):
        actual = results(layer, x.to("cuda:1"), dy.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in actual)
    assert_all_near(actual, expected)


@needs_two_gpus
def test_a_tensor_of_another_gpu_is_refused_by_both_names():
    layer = make_layer("lora").to("cuda:1")
    for part in (layer, layer.base):
        with pytest.raises(ValueError, match="x is on cuda:0, the weight is on cuda:1"):
            part(batch(3, K, device="cuda:0"))


@needs_two_gpus
def test_a_stream_of_another_gpu_is_refused():
    weight = nf4_quantize(torch.randn(64, 256, device="cuda:0"))
    out = torch.empty(64, 256, device="cuda:0")
    stream = torch.cuda.Stream("cuda:1").cuda_stream
    with pytest.raises(ValueError, match="stream"):
        _core.nf4_dequantize(weight.tensors, out, 1, stream)


# ---- memory


@pytest.mark.parametrize("choice", ["planned", "workspace"])
@pytest.mark.parametrize("kind", ["nf4", "lora", "lora with dropout"])
def test_no_dense_weight_is_kept_for_backward(monkeypatch, kind, choice):
    if choice == "workspace":
        monkeypatch.setattr(base_product, "prefers_native", lambda *_: False)
    n = k = 4096
    m, slack = 16, 1 << 20
    dense = 2 * n * k
    layer = make_layer(kind, n, k).to(GPU)
    x, dy = batch(m, k), batch(m, n)
    for _ in range(2):
        results(layer, x, dy)  # cuBLAS takes its workspace
    x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + slack
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(p.grad.nbytes for p in (x, *layer.parameters()) if p.grad is not None)
    assert peak <= y.nbytes + gradients + slack + dense * (choice == "workspace")


@contextlib.contextmanager
def memory_for(spare_bytes: int) -> Iterator[None]:
    """torch may take `spare_bytes` more of the GPU's memory than it holds, and no more."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    limit = (torch.cuda.memory_reserved() + spare_bytes) / total
    torch.cuda.set_per_process_memory_fraction(min(limit, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_out_of_memory_is_torchs_own_error_and_leaves_nothing_allocated(layer, part):
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs 4 GB of free GPU memory")
    torch.cuda.empty_cache()  # so that each tensor below has memory to itself, with no room beside
    m = 1 << 17  # x, y, dy and dx take 128 MiB and more each
    x = torch.zeros(m, K, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    dy = torch.zeros(m, N, dtype=torch.bfloat16, device=GPU)
    y = layer(x) if part == "backward" else None
    with memory_for(8 << 20):
        before = torch.cuda.memory_allocated()
        with pytest.raises(torch.OutOfMemoryError):
            layer(x) if y is None else torch.autograd.grad(y, x, dy, retain_graph=True)
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    y = layer(x)  # with all of the memory again
    assert torch.autograd.grad(y, x, dy)[0].shape == (m, K)


# ---- compiler


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


# ---- models


def test_a_model_gets_the_bytes_of_the_cpu(device):
    torch.manual_seed(1)
    model = Model(width=64)
    on_gpu = quantize_model(copy.deepcopy(model).to(device))
    on_cpu = quantize_model(model)
    assert state_bits(on_gpu) == state_bits(on_cpu)
    assert all(p.device.type == device.type for p in on_gpu.parameters())


def test_a_state_dict_crosses_devices(device):
    source = add_lora(quantize_model(Model()), r=4).to(device)
    target = add_lora(quantize_model(Model()), r=4)
    target.load_state_dict(source.state_dict())
    assert state_bits(target) == state_bits(source)
    back = add_lora(quantize_model(Model()), r=4).to(device)
    back.load_state_dict(target.state_dict())
    tokens = torch.arange(21, device=device).view(3, 7)
    assert same_bits(back.eval()(tokens), source.eval()(tokens))


def test_a_merged_model_is_what_was_trained(device):
    model = add_lora(quantize_model(Model()), r=4).to(device).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(21, device=device).view(3, 7)
    expected = model(tokens)
    merged = merge_lora(model)
    assert all(p.device.type == device.type for p in merged.parameters())
    assert_near(merged(tokens), expected)


@over_optimizers
def test_training_on_the_gpu_follows_the_cpu(device, optimizer_class):
    def losses_on(place: torch.device) -> list[float]:
        torch.manual_seed(2)
        model = add_lora(quantize_model(Model()), r=4).to(place)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_class(trained, lr=1e-2)
        tokens = torch.arange(42, device=place).view(6, 7)
        losses = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    actual, expected = losses_on(device), losses_on(torch.device("cpu"))
    assert expected[-1] < 0.9 * expected[0]
    assert actual == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients_in_less_memory(use_reentrant):
    model = nn.Sequential(*(make_layer("lora with dropout", 512, 512) for _ in range(8))).to(GPU)
    x = batch(4096, 512).requires_grad_()

    def run_in_halves(x: Tensor) -> Tensor:
        for half in (model[:4], model[4:]):
            x = checkpoint(half, x, use_reentrant=use_reentrant)
        return x

    def measure(function) -> tuple[int, list[Tensor]]:
        torch.manual_seed(11)
        for leaf in (x, *model.parameters()):
            leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(x).sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        return peak, [p.grad.clone() for p in (x, *model.parameters()) if p.grad is not None]

    measure(model)  # cuBLAS takes its workspace
    plain_peak, plain = measure(model)
    peak, recomputed = measure(run_in_halves)
    for a, b in zip(recomputed, plain, strict=True):
        assert same_bits(a, b)
    assert peak < plain_peak
