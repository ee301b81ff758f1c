"""bitsandbytes' optimiser state, converted: the same numbers and the same next step."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes_runs import WRAPPED, flat, import_or_skip, train_with
from optimizers import BLOCK, decode, saved_and_loaded
from torch import nn

from qlora_native import PagedAdamW
from qlora_native.optim.bitsandbytes_state import (
    dynamic_map,
    from_bitsandbytes,
    is_bitsandbytes_state,
)
from support import run_python, same_bits

GOLDEN = Path(__file__).parents[2] / "golden"

ADAMW = ["Adam", "AdamW", "AdamW32bit", "PagedAdam", "PagedAdamW", "PagedAdamW32bit"]
ADAMW_8BIT = ["Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"]
LION = ["Lion", "Lion32bit", "PagedLion", "PagedLion32bit"]
LION_8BIT = ["Lion8bit", "PagedLion8bit"]


@pytest.fixture(scope="module")
def bnb():
    return import_or_skip()


@pytest.fixture
def train(bnb):
    return lambda *arguments, **options: train_with(bnb, *arguments, **options)


def same_state_dicts(a: dict, b: dict) -> bool:
    return (
        a["param_groups"] == b["param_groups"]
        and a["state"].keys() == b["state"].keys()
        and all(
            state.keys() == b["state"][i].keys()
            and all(same_bits(value, b["state"][i][name]) for name, value in state.items())
            for i, state in a["state"].items()
        )
    )


# ---- the maps


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_maps_have_the_bits_of_the_core(signed):
    golden = (GOLDEN / f"dynamic_map_{'' if signed else 'un'}signed.bin").read_bytes()
    assert bytes(dynamic_map(signed).view(torch.uint8).tolist()) == golden


def test_maps_are_those_of_every_processor_and_need_no_bitsandbytes():
    """torch.linspace, from which bitsandbytes has its maps, rounds otherwise without AVX2."""
    done = run_python(
        "import json, sys\n"
        "from qlora_native.optim.bitsandbytes_state import dynamic_map\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "print(json.dumps([dynamic_map(signed).tolist() for signed in (True, False)]))\n",
        ATEN_CPU_CAPABILITY="default",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    assert done.returncode == 0, done.stderr
    for signed, there in zip((True, False), json.loads(done.stdout), strict=True):
        assert same_bits(torch.tensor(there), dynamic_map(signed))


# ---- what is converted


@pytest.mark.parametrize("name", ADAMW + LION)
def test_32_bit_state_keeps_its_bits(train, name):
    run = train(name)
    state_dict = run.optimizer.state_dict()
    assert is_bitsandbytes_state(state_dict)
    converted = from_bitsandbytes(state_dict)
    moments = {"exp_avg": "state1"} | ({"exp_avg_sq": "state2"} if name in ADAMW else {})
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(converted["state"]) == len(params) - 1
    for i, ours in converted["state"].items():
        theirs = run.optimizer.state[params[i]]
        assert ours.keys() == {"step", *moments}
        assert same_bits(ours["step"], torch.tensor(3.0))
        for moment, number in moments.items():
            assert ours[moment].shape == params[i].shape
            assert ours[moment].dtype == torch.float32
            assert same_bits(ours[moment], theirs[number])


@pytest.mark.parametrize("name", ADAMW_8BIT + LION_8BIT)
def test_8_bit_state_decodes_as_by_bitsandbytes(bnb, train, name):
    run = train(name)
    converted = from_bitsandbytes(run.optimizer.state_dict())
    moments = {"exp_avg": 1} | ({"exp_avg_sq": 2} if name in ADAMW_8BIT else {})
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    in_8_bits = set()
    for i, ours in converted["state"].items():
        theirs = run.optimizer.state[params[i]]
        if params[i].numel() < 4096:
            assert ours.keys() == {"step", *moments}
            for moment, n in moments.items():
                assert same_bits(ours[moment], theirs[f"state{n}"])
            continue
        in_8_bits.add(params[i].numel() % BLOCK)
        assert ours.keys() == {"step", *moments, *(f"{moment}_absmax" for moment in moments)}
        for moment, n in moments.items():
            exact = bnb.functional.dequantize_blockwise(
                theirs[f"state{n}"],
                absmax=theirs[f"absmax{n}"],
                code=theirs[f"qmap{n}"],
                blocksize=BLOCK,
            )
            assert exact.any()
            assert torch.equal(decode(ours, moment), exact)
    assert in_8_bits == {130 * 65 % BLOCK}  # the last block is not full


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_the_given_dict_is_left_as_it_is_and_its_tensors_are_shared(train, name):
    state_dict = train(name).optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    converted = from_bitsandbytes(state_dict)
    converted["param_groups"][0]["params"].append(7)
    converted["state"][1]["more"] = 7
    assert state_dict["param_groups"] == before["param_groups"]
    assert state_dict["state"].keys() == before["state"].keys()
    for i, state in before["state"].items():
        assert state_dict["state"][i].keys() == state.keys() == {"step", WRAPPED}
        assert state_dict["state"][i]["step"] == state["step"]
        theirs = state_dict["state"][i][WRAPPED]
        assert theirs.keys() == state[WRAPPED].keys()
        assert all(same_bits(theirs[name], value) for name, value in state[WRAPPED].items())
        assert converted["state"][i]["exp_avg"] is theirs["state1"]


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "Lion8bit"])
def test_what_older_versions_wrote_and_what_a_file_holds_is_converted_alike(train, name):
    state_dict = train(name).optimizer.state_dict()
    older = flat(state_dict)
    older["param_groups"] = [
        {key: value for key, value in group.items() if key not in ("alpha", "t_alpha", "t_beta3")}
        for group in older["param_groups"]
    ]
    expected = from_bitsandbytes(state_dict)
    for other in (older, saved_and_loaded(state_dict)):
        assert is_bitsandbytes_state(other)
        assert same_state_dicts(from_bitsandbytes(other), expected)
    assert same_state_dicts(saved_and_loaded(expected), expected)


def test_steps_that_are_tensors_are_taken_too(train):
    state_dict = train("AdamW").optimizer.state_dict()
    state_dict["state"][1]["step"] = torch.tensor(3)
    assert same_bits(from_bitsandbytes(state_dict)["state"][1]["step"], torch.tensor(3.0))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_parameter_whose_state_was_only_looked_at_has_none(train, steps):
    run = train("Lion", steps=steps)
    assert not run.optimizer.state[run.model.embed.weight]
    state_dict = run.optimizer.state_dict()
    assert state_dict["state"][0] == {}
    assert is_bitsandbytes_state(state_dict)
    assert 0 not in from_bitsandbytes(state_dict)["state"]


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion", "Lion8bit"])
@pytest.mark.parametrize("steps", [0, 1])
def test_groups_keep_their_settings(train, name, steps):
    optimizer = train(name, steps=steps).optimizer
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    theirs = optimizer.state_dict()
    assert is_bitsandbytes_state(theirs)
    assert bool(theirs["state"]) == bool(steps)
    ours = from_bitsandbytes(theirs)["param_groups"]
    settings = {"lr", "initial_lr", "betas", "weight_decay"} | (
        {"eps"} if name.startswith("Adam") else set()
    )
    added = {"maximize": False} | ({"amsgrad": False} if name.startswith("Adam") else {})
    for group, expected in zip(ours, theirs["param_groups"], strict=True):
        assert group.keys() == {*settings, "params", *added}
        assert added.items() <= group.items()
        for key in (*settings, "params"):
            assert group[key] == expected[key]


def test_state_of_others_is_known_for_what_it_is(bnb):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    others = [PagedAdamW([p]), torch.optim.AdamW([p]), torch.optim.SGD([p], lr=0.1, momentum=0.9)]
    others.append(bnb.optim.PytorchLARS([p], lr=0.1, momentum=0.9))
    for optimizer in others:
        for _ in range(2):
            assert not is_bitsandbytes_state(optimizer.state_dict())
            with pytest.raises(ValueError, match="not of an optimiser of bitsandbytes"):
                from_bitsandbytes(optimizer.state_dict())
            optimizer.step()
    assert not is_bitsandbytes_state({"state": {}, "param_groups": []})
