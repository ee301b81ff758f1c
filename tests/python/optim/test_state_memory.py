"""The memory of state: freed with the optimiser, kept by its tensors, never twice for long."""

import os
import sys
from pathlib import Path

import pytest

from support import run_python

# What is measured is far above what else comes and goes, and freed memory goes back to the system
# at once: the environment tells malloc so.
SCRIPT = """
import gc, os, sys, weakref
from pathlib import Path
import torch
from torch import nn
import qlora_native

COUNT = 6_000_000
SLACK = 4 << 20
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what is here already is no concern of the collections below

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = ones[: p.numel()]
    optimizer.step()

ones = torch.ones(COUNT)
large = nn.Parameter(torch.ones(COUNT))
for optimizer_class, width in (
    (qlora_native.PagedAdamW, 8), (qlora_native.PagedAdamW8bit, 2),
    (qlora_native.PagedLion, 4), (qlora_native.PagedLion8bit, 1),
):
    need = width * COUNT + (width * COUNT // 64 if width < 4 else 0)
    step(optimizer_class([nn.Parameter(torch.ones(5000))]))

    def check(what, extra, expected, slack=SLACK):
        assert abs(extra - expected) < slack, f"{optimizer_class} {what}: {extra}, want {expected}"

    start = resident()
    optimizer = optimizer_class([large])
    check("before the first step", resident() - start, 0)
    step(optimizer)
    check("after a step", resident() - start, need)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    check("after loads", resident() - start, need)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5000))]})
    step(optimizer)
    check("after new pages", resident() - start, need)
    optimizer.state.clear()
    step(optimizer)
    check("after a new beginning", resident() - start, need)
    moment = optimizer.state[large]["exp_avg"]
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    # (1 - beta) of a gradient of ones, or its code
    expected = 255 if moment.dtype == torch.uint8 else 0.1 if width == 8 else 0.01
    assert abs(moment[-1].item() - expected) < 1e-6
    check("while a tensor of it lives", resident() - start, moment.nbytes)
    del moment
    check("in the end", resident() - start, 0)
    large.grad = None
print("measured")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")
def test_memory_is_freed_with_the_optimiser_and_kept_by_its_tensors():
    done = run_python(
        SCRIPT, PYTHONPATH=os.pathsep.join(sys.path), MALLOC_MMAP_THRESHOLD_=str(1 << 16)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "measured\n"
