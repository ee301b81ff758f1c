"""Layers on a GPU, their results, and the sizes at which each kernel has its turn."""

import pytest
import torch
from torch import Tensor, nn

from qlora_native import PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit
from support import assert_near, lora_layer, nf4_layer

GPU = torch.device("cuda")
TOKENS = (1, 17, 300, 2100)  # for every kernel, and the workspace
N, K = 768, 512

over_tokens = pytest.mark.parametrize("m", TOKENS)
over_optimizers = pytest.mark.parametrize(
    "optimizer_class", [PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit]
)
over_layers = pytest.mark.parametrize("kind", ["nf4", "lora", "lora with dropout"])


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
