"""Copies of parameters on a GPU, and whether two optimisers agree to the bit."""

import torch
from optimizers import snapshot
from torch import nn

from support import same_bits

SHAPES = [(33, 65), (300,), (1,), (), (2, 3, 4), (0, 5), (20_001,), (64, 4096)]


def on_gpu(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().cuda()) for p in parameters]


def copy_gradients(source: list[nn.Parameter], target: list[nn.Parameter]) -> None:
    for p, q in zip(source, target, strict=True):
        q.grad = None if p.grad is None else p.grad.cuda()


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip(snapshot(a), snapshot(b), strict=True):
        assert same_bits(p.cpu(), q.cpu())
