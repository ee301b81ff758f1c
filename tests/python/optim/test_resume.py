"""A run that another process resumes from files is the run that was not stopped, bit for bit."""

import itertools
import os
import sys

import pytest
import torch
from optimizers import ALL, clones, make_parameters, over_all, same_run, take_steps
from safetensors.torch import load_file, save_file
from torch import nn

from support import over_dtypes, run_python, same_bits

STEPS = 3
SHAPES = [(33, 65), (5000,), (300, 40), (), (0, 5)]
WAYS = [
    {"dtype": dtype, "has_file": has_file, "is_stochastic": is_stochastic, "format": format_}
    for dtype, has_file, is_stochastic, format_ in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (False, True), ("torch", "safetensors")
    )
    if not is_stochastic or dtype is torch.bfloat16
]


def make(optimizer_class, parameters, folder, dtype, has_file, is_stochastic, format):
    groups = [
        {"params": parameters[:3], "lr": 3e-2, "weight_decay": 0.1},
        {"params": parameters[3:], "betas": (0.8, 0.95)},
    ]
    return optimizer_class(
        groups, stochastic_rounding=is_stochastic, page_file=folder if has_file else None
    )


def save(path, parameters, optimizer, format):
    """Tensors in safetensors, and what is no tensor by torch; or all by torch."""
    state_dict = optimizer.state_dict()
    tensors = {f"parameter {i}": p.detach() for i, p in enumerate(parameters)}
    if format == "safetensors":
        for i, state in state_dict["state"].items():
            tensors |= {f"{i} {name}": value for name, value in state.items()}
        state_dict["state"] = {i: list(state) for i, state in state_dict["state"].items()}
        save_file(tensors, f"{path}.safetensors")
        tensors = {}
    torch.save({"tensors": tensors, "optimizer": state_dict}, f"{path}.pt")


def load(path, format):
    saved = torch.load(f"{path}.pt", weights_only=True)
    tensors, state_dict = saved["tensors"], saved["optimizer"]
    if format == "safetensors":
        tensors = load_file(f"{path}.safetensors")
        state_dict["state"] = {
            i: {name: tensors[f"{i} {name}"] for name in names}
            for i, names in state_dict["state"].items()
        }
    values = [tensors[f"parameter {i}"] for i in range(len(SHAPES))]
    return [nn.Parameter(value.clone()) for value in values], state_dict


def cases(folder):
    for (i, optimizer_class), (j, way) in itertools.product(enumerate(ALL), enumerate(WAYS)):
        yield optimizer_class, way, f"{folder}/{i}.{j}"


def resume_all(folder):
    """What the other process does."""
    torch.manual_seed(1234)  # of no consequence
    for optimizer_class, way, path in cases(folder):
        parameters, state_dict = load(path, way["format"])
        optimizer = make(optimizer_class, parameters, folder, **way)
        optimizer.load_state_dict(state_dict)
        take_steps(optimizer, range(STEPS, 2 * STEPS))
        save(f"{path}.resumed", parameters, optimizer, way["format"])


def test_another_process_resumes_all_runs_exactly(tmp_path):
    runs = []
    for optimizer_class, way, path in cases(tmp_path):
        torch.manual_seed(0)
        parameters = make_parameters(way["dtype"], SHAPES)
        optimizer = make(optimizer_class, parameters, tmp_path, **way)
        take_steps(optimizer, range(STEPS))
        save(path, parameters, optimizer, way["format"])
        take_steps(optimizer, range(STEPS, 2 * STEPS))
        runs.append(optimizer)
    done = run_python(
        f"import test_resume; test_resume.resume_all({str(tmp_path)!r})",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    assert done.returncode == 0, done.stderr
    assert len(runs) == len(ALL) * len(WAYS)
    for (optimizer_class, way, path), expected in zip(cases(tmp_path), runs, strict=True):
        parameters, state_dict = load(f"{path}.resumed", way["format"])
        resumed = make(optimizer_class, parameters, tmp_path, **way)
        resumed.load_state_dict(state_dict)
        assert same_run(resumed, expected), (optimizer_class, way)
    with_and_without = [runs[WAYS.index(way)] for way in WAYS if way["dtype"] is torch.float32]
    assert all(same_run(run, with_and_without[0]) for run in with_and_without)


@over_all
@over_dtypes
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_model_that_accumulates_gradients_resumes_exactly(optimizer_class, dtype, micro_batches):
    x = torch.randn(6, 3, 8, 80).to(dtype)

    def train(model, optimizer, steps):
        for step in steps:
            for micro_batch in range(micro_batches):
                model(x[step, micro_batch]).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def make_model():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 3)).to(dtype)

    model = make_model()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    saved = [p.detach().clone() for p in model.parameters()]
    state_dict = optimizer.state_dict()
    resumed_model = make_model()
    for p, value in zip(resumed_model.parameters(), saved, strict=True):
        p.data.copy_(value)
    resumed = optimizer_class(resumed_model.parameters())
    resumed.load_state_dict(state_dict)
    train(model, optimizer, range(3, 6))
    train(resumed_model, resumed, range(3, 6))
    assert same_run(optimizer, resumed)
    assert not any(map(same_bits, model.parameters(), clones(make_model().parameters())))
