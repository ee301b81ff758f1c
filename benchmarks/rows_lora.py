"""A LoRA layer forward and backward: fp32 factors beside a 4-bit base, bf16 activations."""

import copy
import math
from collections.abc import Callable, Iterator

import peft
import torch
from torch import Tensor, nn

import qlora_native as q
from checks import PEER_TOLERANCE, assert_close, assert_product
from harness import OURS, Case, Work, copies_past_l3, in_turn
from qlora_native.hf.peft import NF4LoraLinear
from weights import Weights

TOKENS, RANK, ALPHA = 512, 16, 32
# t = x · Aᵀ and the factors are rounded to bf16 as well: a few roundings, not one.
_TOLERANCE = 2**-7


def works(weights: Weights) -> Iterator[Work]:
    yield Work("LoRA forward + backward", weights.size, lambda: _lora(weights), TOKENS)
    yield Work(
        "LoRA through PEFT, forward + backward",
        weights.size,
        lambda: _through_peft(weights),
        TOKENS,
    )


def _lora(weights: Weights) -> Case:
    n, k = weights.n, weights.k
    x = torch.randn(TOKENS, k, dtype=torch.bfloat16)
    dy = torch.randn(TOKENS, n, dtype=torch.bfloat16)
    a = torch.empty(RANK, k).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k))
    b = 0.02 * torch.randn(n, RANK)

    ours = q.LoRALinear(copy.deepcopy(weights.ours[0]), RANK, ALPHA)
    ours.lora_a.data.copy_(a), ours.lora_b.data.copy_(b)
    theirs = _peft_layer(weights, a, b)
    _check(ours, [ours.lora_a, ours.lora_b], x, dy)
    y, _ = _train(x, dy)(theirs)
    w = weights.ours[0].dequantize(torch.float32) + ours.scaling * (b @ a)
    assert_product("PEFT on bitsandbytes", y, x, w, PEER_TOLERANCE)

    def products(dense: nn.Linear) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return nn.functional.linear(x, dense.weight), dy @ dense.weight

    def copies(layer: nn.Module) -> list[nn.Module]:
        return copies_past_l3(lambda: copy.deepcopy(layer), n * k // 2)

    return Case(
        {
            OURS: in_turn(copies(ours), _train(x, dy)),
            "PEFT on bitsandbytes": in_turn(copies(theirs), _train(x, dy)),
            "bare bf16 products": in_turn(weights.dense_bf16, products),
        },
        bytes_moved=2 * weights.nf4_bytes,
        # Forward and dX of the base; of the factors two products forward, four backward.
        operations=4.0 * TOKENS * n * k + 6.0 * TOKENS * RANK * (n + k),
    )


def _through_peft(weights: Weights) -> Case:
    """The same script with this library's layer in bitsandbytes' place."""
    x = torch.randn(TOKENS, weights.k, dtype=torch.bfloat16)
    dy = torch.randn(TOKENS, weights.n, dtype=torch.bfloat16)
    a = torch.empty(RANK, weights.k).uniform_(-1 / math.sqrt(weights.k), 1 / math.sqrt(weights.k))
    b = 0.02 * torch.randn(weights.n, RANK)
    native = q.LoRALinear(copy.deepcopy(weights.ours[0]), RANK, ALPHA)
    native.lora_a.data.copy_(a), native.lora_b.data.copy_(b)
    layers = {
        OURS: _peft_layer_on(copy.deepcopy(weights.ours[0]), a, b, NF4LoraLinear),
        "PEFT on bitsandbytes": _peft_layer(weights, a, b),
        "without PEFT": native,
    }
    y, dx = _train(x, dy)(layers[OURS])
    wanted = _train(x, dy)(native)
    if not (torch.equal(y, wanted[0]) and torch.equal(dx, wanted[1])):
        raise SystemExit("the layer through PEFT does not give the bits of LoRALinear")

    def copies(layer: nn.Module) -> list[nn.Module]:
        return copies_past_l3(lambda: copy.deepcopy(layer), weights.n * weights.k // 2)

    return Case(
        {name: in_turn(copies(layer), _train(x, dy)) for name, layer in layers.items()},
        bytes_moved=2 * weights.nf4_bytes,
        operations=4.0 * TOKENS * weights.n * weights.k,
    )


def _peft_layer(weights: Weights, a: Tensor, b: Tensor) -> nn.Module:
    return _peft_layer_on(weights.linear4bit(), a, b, peft.tuners.lora.Linear4bit)


def _peft_layer_on(base: nn.Module, a: Tensor, b: Tensor, wanted: type) -> nn.Module:
    holder = nn.Sequential(base)
    holder.is_loaded_in_4bit = True  # as transformers marks a model; PEFT looks for it
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["0"])
    layer = peft.get_peft_model(holder, config).base_model.model[0].train()
    if type(layer) is not wanted:
        raise SystemExit(f"PEFT made a {type(layer)}, want {wanted}")
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    return layer


def _train(x: Tensor, dy: Tensor) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    """Forward and backward; the factors' gradients are made anew each time."""
    x = x.detach().requires_grad_()

    def call(layer: nn.Module) -> tuple[Tensor, Tensor]:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        y.backward(dy)
        return y, x.grad

    return call


def _check(layer: q.LoRALinear, factors: list[Tensor], x: Tensor, dy: Tensor) -> None:
    """y, dX and the factors' gradients against fp64 of what the layer stands for."""
    y, dx = _train(x, dy)(layer)
    a, b = (factor.detach().bfloat16().double() for factor in factors)
    w = layer.base.dequantize(torch.bfloat16).double() + layer.scaling * (b @ a)
    assert_product("LoRA: forward", y, x, w, _TOLERANCE)
    assert_product("LoRA: dX", dx, dy, w.T, _TOLERANCE)
    x64, dy64 = x.double(), dy.double()
    grad_a = layer.scaling * (dy64 @ b).T @ x64
    grad_b = layer.scaling * dy64.T @ (x64 @ a.T)
    assert_close("LoRA: gradient of A", factors[0].grad, grad_a, _TOLERANCE)
    assert_close("LoRA: gradient of B", factors[1].grad, grad_b, _TOLERANCE)
