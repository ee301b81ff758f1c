"""A LoRA layer forward and backward on a GPU: fp32 factors, a 4-bit base, bf16 activations."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import qlora_native as q
from checks import PEER_TOLERANCE, assert_close, assert_product
from cuda_clock import GRAPH, Round
from cuda_harness import CudaCase
from cuda_peers import add_peer, peft
from cuda_weights import CudaWeights
from goals import OWN_BASE, PEFT
from harness import OURS, Work

TOKENS, RANK, ALPHA = (512, 2048), 16, 32
# t = x · Aᵀ and the factors are rounded to bf16 as well: a few roundings, not one.
_TOLERANCE = 2**-7


def works(weights: CudaWeights, tokens: Sequence[int]) -> Iterator[Work]:
    for m in tokens:
        yield Work("LoRA forward + backward", weights.size, lambda m=m: _lora(weights, m), m)


def _lora(weights: CudaWeights, m: int) -> CudaCase:
    n, k, device = weights.n, weights.k, weights.device
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).bfloat16().to(device)
    dy = torch.randn(m, n, generator=generator).bfloat16().to(device)
    rank = min(RANK, n, k)
    a = (torch.rand(rank, k, generator=generator) * 2 - 1).div(math.sqrt(k)).to(device)
    b = (0.02 * torch.randn(n, rank, generator=generator)).to(device)

    def make_ours(base: q.NF4Linear) -> q.LoRALinear:
        layer = q.LoRALinear(base, rank, ALPHA)
        layer.lora_a.data.copy_(a), layer.lora_b.data.copy_(b)
        return layer

    ours = Round([make_ours(layer) for layer in weights.ours], _step(x, dy))
    _check(ours, x, dy, a, b, weights.decoded)
    case = CudaCase(
        {OURS: ours},
        clock=GRAPH,
        # x, dY in, y, dX out, and the weight twice.
        bytes_moved=2 * weights.nf4_bytes + 4 * m * (n + k),
        # Forward and dX of the base; of the factors two products forward, four backward.
        operations=4.0 * m * n * k + 6.0 * m * rank * (n + k),
    )

    def check_forward(results: tuple[Tensor, ...]) -> None:
        w = weights.decoded.double() + ALPHA / rank * (b.double() @ a.double())
        assert_product(PEFT, results[0], x, w, PEER_TOLERANCE)

    add_peer(
        case.contenders,
        case.notes,
        PEFT,
        lambda: Round([_peft_layer(layer, a, b) for layer in weights.theirs], _step(x, dy)),
        check_forward,
    )
    case.contenders[OWN_BASE] = Round(weights.ours, _step(x, dy))
    return case


def _peft_layer(base: nn.Module, a: Tensor, b: Tensor) -> nn.Module:
    holder = nn.Sequential(copy.copy(base))
    holder.is_loaded_in_4bit = True  # as transformers marks a model; PEFT looks for it
    config = peft.LoraConfig(r=a.shape[0], lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["0"])
    layer = peft.get_peft_model(holder, config).base_model.model[0].train()
    if not type(layer).__module__.endswith("bnb"):
        raise SystemExit(f"PEFT made a {type(layer)}, not its layer on bitsandbytes")
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    return layer.to(a.device)


def _step(x: Tensor, dy: Tensor) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """A call that takes a layer forward and backward: y, dX and the factors' gradients."""
    x = x.detach().requires_grad_()

    def call(layer: nn.Module) -> tuple[Tensor, ...]:
        factors = [p for p in layer.parameters() if p.requires_grad]
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, *factors), dy)

    return call


def _check(ours: Round, x: Tensor, dy: Tensor, a: Tensor, b: Tensor, w: Tensor) -> None:
    """y, dX and the factors' gradients against fp64 of what the layer stands for."""
    y, dx, grad_a, grad_b = ours.first()
    scaling = ours.items[0].scaling
    a64, b64 = (factor.bfloat16().double() for factor in (a, b))
    dense = w.double() + scaling * (b64 @ a64)
    assert_product("LoRA: forward", y, x, dense, _TOLERANCE)
    assert_product("LoRA: dX", dx, dy, dense.T, _TOLERANCE)
    x64, dy64 = x.double(), dy.double()
    expected_a = scaling * (dy64 @ b64).T @ x64
    expected_b = scaling * dy64.T @ (x64 @ a64.T)
    assert_close("LoRA: gradient of A", grad_a, expected_a, _TOLERANCE)
    assert_close("LoRA: gradient of B", grad_b, expected_b, _TOLERANCE)
