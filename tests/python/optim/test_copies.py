"""Copies: pickle, copy and forked processes; each has memory of its own."""

import copy
import io
import os
import pickle
import sys

import pytest
import torch
from optimizers import (
    IN_8_BITS,
    clones,
    in_file,
    is_in_pages,
    make_parameters,
    over_8_bits,
    over_all,
    parameters_of,
    same_run,
    same_snapshots,
    settings_of,
    snapshot,
    stepped,
    take_steps,
)
from torch import nn

from support import run_python, same_bits

SHAPES = [(5000,), (300,), (70, 80), ()]


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved_by_torch(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


over_ways = pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved_by_torch])
over_files = pytest.mark.parametrize("has_file", [False, True], ids=["memory", "file"])


@over_all
@over_ways
@over_files
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_goes_on_as_the_original(optimizer_class, way, has_file, steps, tmp_path):
    paging = in_file(tmp_path, resident_bytes=20_000_000) if has_file else {}
    options = {"lr": 1e-2, "stochastic_rounding": True, **paging}
    parameters = make_parameters(torch.bfloat16, SHAPES)
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1}]
    optimizer = stepped(optimizer_class, groups, steps=steps, **options)
    copied = way(optimizer)
    assert type(copied) is optimizer_class
    for ours, theirs in zip(settings_of(optimizer), settings_of(copied), strict=True):
        assert ours.items() <= theirs.items()
    take_steps(copied, range(steps, steps + 2))
    untouched = optimizer_class(
        [{**group, "params": clones(group["params"])} for group in optimizer.param_groups]
    )
    untouched.load_state_dict(optimizer.state_dict())
    assert same_run(optimizer, untouched)  # the copy's steps were its own
    take_steps(optimizer, range(steps, steps + 2))
    assert same_run(optimizer, copied)
    assert is_in_pages(copied)
    ours, theirs = optimizer.paging_report(), copied.paging_report()
    assert [part[:6] for part in theirs.parts] == [part[:6] for part in ours.parts]
    addresses = [
        {v.data_ptr() for state in one.state.values() for v in state.values()}
        for one in (optimizer, copied)
    ]
    assert not addresses[0] & addresses[1]


@over_all
def test_a_model_and_its_optimiser_are_copied_together(optimizer_class):
    model = nn.Linear(100, 50)
    optimizer = stepped(optimizer_class, model.parameters(), lr=1e-2)
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert parameters_of(copied) == list(copied_model.parameters())
    for one in (optimizer, copied):
        take_steps(one, range(3, 5))
    for p, q in zip(model.parameters(), copied_model.parameters(), strict=True):
        assert same_bits(p, q)
    assert same_run(optimizer, copied)


@over_all
def test_a_shallow_copy_steps_the_same_parameters_with_state_of_its_own(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=SHAPES))
    before = [v.clone() for state in optimizer.state.values() for v in state.values()]
    shallow = copy.copy(optimizer)
    assert parameters_of(shallow)[0] is parameters_of(optimizer)[0]
    take_steps(shallow, [3])
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert same_snapshots(after, before)
    assert is_in_pages(shallow)
    assert {state["step"].item() for state in shallow.state.values()} == {4}


@over_all
def test_a_copy_of_a_copy_before_any_step_keeps_the_state(optimizer_class):
    optimizer = stepped(optimizer_class, make_parameters(shapes=SHAPES))
    copied = copy.deepcopy(pickled(copy.deepcopy(optimizer)))
    assert same_run(optimizer, copied)
    copied_by_dict = optimizer_class(clones(parameters_of(optimizer)))
    copied_by_dict.load_state_dict(copy.deepcopy(optimizer).state_dict())
    for one in (optimizer, copied, copied_by_dict):
        take_steps(one, [3])
    assert same_run(optimizer, copied)
    assert same_run(optimizer, copied_by_dict)


@over_8_bits
def test_a_copy_keeps_the_size_from_which_state_has_8_bits(optimizer_class):
    assert optimizer_class in IN_8_BITS
    for way in (copy.deepcopy, pickled, copy.copy):
        (p,) = make_parameters(shapes=[(300,)])
        copied = way(optimizer_class([p], min_8bit_size=256))
        take_steps(copied, [0])
        (q,) = parameters_of(copied)
        assert copied.state[q]["exp_avg"].dtype == torch.uint8


@over_all
def test_hooks_and_a_scheduler_of_a_copy_work(optimizer_class):
    copied = copy.deepcopy(stepped(optimizer_class, make_parameters(shapes=SHAPES)))
    seen = []
    copied.register_step_post_hook(lambda *_: seen.append("stepped"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(copied, 0.5)
    before = snapshot(copied)
    take_steps(copied, [3])
    scheduler.step()
    assert seen == ["stepped"]
    assert not same_snapshots(snapshot(copied), before)


# ---- a process that was forked

FORKS = """
import gc, itertools, os, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import qlora_native
torch.set_num_threads(1)

def step(optimizer, parameters):
    for i, p in enumerate(parameters):
        p.grad = torch.linspace(-1, 1, p.numel()) * (i + 1)
    optimizer.step()

def make(name, page_file):
    parameters = [nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(300))]
    optimizer = getattr(qlora_native, name)(parameters, lr=0.1, page_file=page_file)
    step(optimizer, parameters)
    return optimizer, parameters

class Data(Dataset):
    def __init__(self, optimizer):
        self.optimizer = optimizer  # as a trainer's dataset may, by way of a callback
    def __len__(self):
        return 4
    def __getitem__(self, i):
        if i == 3:
            self.optimizer = None
            gc.collect()
        return i

classes = ("PagedAdamW", "PagedAdamW8bit", "PagedLion", "PagedLion8bit")
for name, page_file in itertools.product(classes, (None, os.environ["PAGE_FILE"])):
    optimizer, parameters = make(name, page_file)
    same, same_parameters = make(name, page_file)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            if page_file:
                before = [p.detach().clone() for p in parameters]
                try:
                    step(optimizer, parameters)
                except NotImplementedError as error:
                    assert "this process was forked" in str(error), error
                    assert all(torch.equal(a, b) for a, b in zip(before, parameters))
                    code = 0
            else:
                step(optimizer, parameters)  # memory of its own
                code = 0
            del optimizer
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (name, page_file)

    if name == "PagedAdamW8bit":
        loader = DataLoader(Data(optimizer), num_workers=2, multiprocessing_context="fork")
        assert sorted(int(i) for i in loader) == [0, 1, 2, 3]

    for _ in range(2):
        step(optimizer, parameters)
        step(same, same_parameters)
    for p, q in zip(parameters, same_parameters):
        assert torch.equal(p, q), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, same.state[q][key]), (name, key)
        assert optimizer.state[p]["step"] == 3
print("went on")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_may_drop_the_optimiser_and_the_parent_goes_on(tmp_path):
    """With a file, whose pages are the parent's too, a step of the child is refused."""
    done = run_python(
        FORKS,
        PYTHONPATH=os.pathsep.join(sys.path),
        PAGE_FILE=str(tmp_path),
        PYTHONWARNINGS="ignore",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("went on\n")
