"""Layers on a GPU follow torch's streams and devices, and make nobody wait."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from cuda_layers import (
    GPU,
    K,
    N,
    assert_all_near,
    batch,
    make_layer,
    over_layers,
    over_optimizers,
    over_tokens,
    results,
)
from qlora_native import _core, add_lora, nf4_quantize, quantize_model
from support import Model, delay_the_gpu, the_host_may_not_wait

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build


@over_layers
@over_tokens
def test_work_runs_on_the_current_stream(kind, m):
    layer = make_layer(kind).to(GPU)
    late_x, late_dy = batch(m, K), batch(m, N)
    expected = results(layer, late_x, late_dy)
    x, dy = torch.zeros_like(late_x), torch.zeros_like(late_dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delay_the_gpu()
        x.copy_(late_x)  # what another stream would not wait for
        dy.copy_(late_dy)
        actual = results(layer, x, dy)
    stream.synchronize()
    assert_all_near(actual, expected)


@over_layers
@over_tokens
def test_layers_do_not_wait_for_the_gpu(kind, m):
    layer = make_layer(kind).to(GPU)
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
