"""Runs of bitsandbytes' optimisers, whose state this library's go on from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support import Model, import_bitsandbytes

WRAPPED = "__bnb_optimizer_quant_state__"


def import_or_skip() -> Any:
    with import_bitsandbytes():
        return pytest.importorskip("bitsandbytes")


def set_model_gradients(model: nn.Module, seed: int) -> None:
    """Those of a loss; the embedding, which is frozen, has none."""
    tokens = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Two groups with other settings, and a parameter among them that is never stepped."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, **options},
        {"params": vectors, **options, "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)},
    ]


def train_with(
    bnb: Any, name: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> SimpleNamespace:
    """A small model (its width: blocks that are not full) after steps by one of bitsandbytes."""
    model = Model(width=65, blocks=2).to(dtype)
    model.embed.weight.requires_grad_(False)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    optimizer = getattr(bnb.optim, name)(groups_of(model, **options))
    run = SimpleNamespace(model=model, optimizer=optimizer)
    for step in range(steps):
        step_with(run, step)
    return run


def step_with(run: SimpleNamespace, seed: int) -> None:
    set_model_gradients(run.model, seed)
    with import_bitsandbytes():  # quiet: a paged one warns that on a CPU it is not
        run.optimizer.step()


def flat(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As versions before FSDP was thought of wrote it."""
    states = {i: {**s, **s[WRAPPED]} for i, s in state_dict["state"].items()}
    for state in states.values():
        del state[WRAPPED]
    return {**state_dict, "state": states}
