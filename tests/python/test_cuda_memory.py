"""What layers take of the GPU's memory, and what they do where it is not enough."""

import contextlib
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cuda_layers import GPU, K, N, batch, make_layer, over_layers, results
from qlora_native.ops import base_product
from support import same_bits

pytestmark = pytest.mark.cuda  # conftest.py skips these where there is no GPU, or no CUDA build


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


@over_layers
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_out_of_memory_is_torchs_own_error_and_leaves_nothing_allocated(kind, part):
    layer = make_layer(kind).to(GPU)
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
