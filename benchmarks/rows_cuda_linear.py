"""Products with a 4-bit weight on a GPU: forward, and the input gradient by itself."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

import qlora_native as q
from checks import PEER_TOLERANCE, TOLERANCE, assert_product
from cuda_clock import GRAPH, Round
from cuda_harness import CudaCase
from cuda_peers import add_peer
from cuda_peers import bitsandbytes as bnb
from cuda_weights import CudaWeights
from goals import BF16, BNB, DEQUANTISE_MM, OWN_ONE_TOKEN
from harness import OURS, Work
from qlora_native.ops.linear import nf4_linear_grad_input
from qlora_native.ops.storage import NF4Tensors

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
QUICK_TOKENS = (1, 16, 64, 256, 2048)


def works(weights: CudaWeights, tokens: Sequence[int]) -> Iterator[Work]:
    for m in tokens:
        yield Work("forward", weights.size, lambda m=m: _forward(weights, m), m)
    for m in tokens:
        yield Work("dX", weights.size, lambda m=m: _grad_input(weights, m), m)


@torch.no_grad()
def _forward(weights: CudaWeights, m: int) -> CudaCase:
    """y = x · Wᵀ in bf16, without autograd."""
    x = _activations(weights, m, weights.k)

    def check(name: str, tolerance: float) -> Callable[[Tensor], None]:
        w = weights.dense[0] if name == BF16 else weights.decoded
        return lambda y: assert_product(f"{name}: forward", y, x, w, tolerance)

    def dequantise_first(layer: q.NF4Linear) -> Tensor:
        return torch.mm(x, layer.dequantize(torch.bfloat16, weights.workspace).t())

    case = _case(weights, m, Round(weights.ours, _without_autograd(lambda layer: layer(x))))
    check(OURS, TOLERANCE[torch.bfloat16])(case.contenders[OURS].first())
    if m == 16:
        one_token = x[:1].contiguous()
        case.contenders[OWN_ONE_TOKEN] = Round(
            weights.ours, _without_autograd(lambda layer: layer(one_token))
        )
    peers = {
        BNB: lambda: Round(weights.theirs, _without_autograd(lambda layer: layer(x))),
        BF16: lambda: Round(weights.dense, lambda w: linear(x, w)),
        DEQUANTISE_MM: lambda: Round(weights.ours, dequantise_first),
    }
    for name, make in peers.items():
        add_peer(case.contenders, case.notes, name, make, check(name, PEER_TOLERANCE))
    return case


@torch.no_grad()
def _grad_input(weights: CudaWeights, m: int) -> CudaCase:
    """DX = dY · W in bf16, as backward calls it."""
    dy = _activations(weights, m, weights.n)

    def check(name: str, tolerance: float) -> Callable[[Tensor], None]:
        w = weights.dense[0] if name == BF16 else weights.decoded
        return lambda dx: assert_product(f"{name}: dX", dx, dy, w.t(), tolerance)

    def dequantise_first(layer: q.NF4Linear) -> Tensor:
        return torch.mm(dy, layer.dequantize(torch.bfloat16, weights.workspace))

    def ours(tensors: NF4Tensors) -> Tensor:
        return nf4_linear_grad_input(dy, tensors)

    def theirs(layer: torch.nn.Module) -> Tensor:  # as its backward does it
        weight = layer.weight
        return torch.mm(dy, bnb.functional.dequantize_4bit(weight.data, weight.quant_state))

    case = _case(weights, m, Round(weights.tensors, ours))
    check(OURS, TOLERANCE[torch.bfloat16])(case.contenders[OURS].first())
    peers = {
        BNB: lambda: Round(weights.theirs, theirs),
        BF16: lambda: Round(weights.dense, lambda dense: torch.mm(dy, dense)),
        DEQUANTISE_MM: lambda: Round(weights.ours, dequantise_first),
    }
    for name, make in peers.items():
        add_peer(case.contenders, case.notes, name, make, check(name, PEER_TOLERANCE))
    return case


def _activations(weights: CudaWeights, m: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, columns, generator=generator).bfloat16().to(weights.device)


def _without_autograd(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Rows are timed after they were prepared, outside of no_grad."""
    return torch.no_grad()(call)


def _case(weights: CudaWeights, m: int, ours: Round) -> CudaCase:
    activations = 2 * m * (weights.n + weights.k)
    return CudaCase(
        {OURS: ours},
        clock=GRAPH,
        bytes_moved=weights.nf4_bytes + activations,
        operations=2.0 * m * weights.n * weights.k,
    )
