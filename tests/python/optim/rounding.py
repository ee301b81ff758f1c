"""Optimisers that round stochastically."""

from __future__ import annotations

from typing import Any

import torch

BF16 = torch.bfloat16
SHAPES = [(5000,), (300,), (70, 80), ()]


def make_rounding(
    optimizer_class: type, parameters: Any, seed: int = 11, **options: Any
) -> torch.optim.Optimizer:
    torch.manual_seed(seed)
    return optimizer_class(parameters, **{"lr": 1e-2, "stochastic_rounding": True, **options})
