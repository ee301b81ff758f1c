"""bitsandbytes' optimiser state, converted: the same numbers and the same next step."""

import copy
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qlora_native import PagedAdamW, PagedAdamW8bit
from qlora_native.optim.bitsandbytes_state import (
    dynamic_map,
    from_bitsandbytes,
    is_bitsandbytes_state,
)
from support import FP32_ROUNDOFF, Model, import_bitsandbytes, run_python, same_bits

BLOCK = 256
WRAPPED = "__bnb_optimizer_quant_state__"
GOLDEN = Path(__file__).parents[2] / "golden"

ADAMW = ["Adam", "AdamW", "AdamW32bit", "PagedAdam", "PagedAdamW", "PagedAdamW32bit"]
ADAMW_8BIT = ["Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"]
LION = ["Lion", "Lion32bit", "PagedLion", "PagedLion32bit"]
LION_8BIT = ["Lion8bit", "PagedLion8bit"]


@pytest.fixture(scope="module")
def bnb():
    with import_bitsandbytes():
        return pytest.importorskip("bitsandbytes")


def set_gradients(model: nn.Module, seed: int) -> None:
    """Those of a loss; the embedding, which is frozen, has none."""
    tokens = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()


def groups_of(model: nn.Module, **options) -> list[dict]:
    """Two groups with other settings, and a parameter among them that is never stepped."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, **options},
        {"params": vectors, **options, "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)},
    ]


@pytest.fixture
def train(bnb):
    """A small model (its width: blocks that are not full) after steps by one of bitsandbytes."""

    def run(name: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options):
        model = Model(width=65, blocks=2).to(dtype)
        model.embed.weight.requires_grad_(False)
        options = {"lr": 1e-2, "weight_decay": 0.1, **options}
        optimizer = getattr(bnb.optim, name)(groups_of(model, **options))
        with import_bitsandbytes():  # quiet: a paged one warns that on a CPU it is not
            for step in range(steps):
                set_gradients(model, step)
                optimizer.step()
        return SimpleNamespace(model=model, optimizer=optimizer)

    return run


def flat(state_dict: dict) -> dict:
    """As versions before FSDP was thought of wrote it."""
    states = {i: {**s, **s[WRAPPED]} for i, s in state_dict["state"].items()}
    for state in states.values():
        del state[WRAPPED]
    return {**state_dict, "state": states}


def saved_and_loaded(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def decode(state: dict[str, Tensor], moment: str) -> Tensor:
    codes = state[moment]
    absmax = state[f"{moment}_absmax"].repeat_interleave(BLOCK)[: codes.numel()]
    return dynamic_map(moment == "exp_avg")[codes.flatten().long()].mul(absmax).view(codes.shape)


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
    for group, expected in zip(ours, theirs["param_groups"], strict=True):
        assert group.keys() == {*settings, "params", "maximize"}
        assert not group["maximize"]
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


# ---- going on from it


def go_on(run: SimpleNamespace, optimizer_class) -> tuple[SimpleNamespace, list[Tensor]]:
    """A next step by this library, beside bitsandbytes'; returns the parameters before it too."""
    set_gradients(run.model, seed=3)
    model = copy.deepcopy(run.model)
    before = [p.detach().clone() for p in model.parameters()]
    for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    optimizer = optimizer_class(groups_of(model))
    optimizer.load_state_dict(from_bitsandbytes(saved_and_loaded(run.optimizer.state_dict())))
    optimizer.step()
    with import_bitsandbytes():
        run.optimizer.step()
    return SimpleNamespace(model=model, optimizer=optimizer), before


def check_parameters(ours: nn.Module, theirs: nn.Module, before: list[Tensor], lr: float) -> None:
    """Within a few roundings of the terms of the step, and one to the parameter's dtype."""
    moved = 0
    for p, q, start in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        step = (q - start).float().abs()
        moved += int(step.any())
        allowed = 8 * FP32_ROUNDOFF * (start.float().abs() + step) + 64 * FP32_ROUNDOFF * lr
        if p.dtype != torch.float32:
            allowed += torch.finfo(p.dtype).eps * q.float().abs()
        assert ((p - q).float().abs() <= allowed).all()
    assert moved == len(before) - 1


@pytest.mark.parametrize("name", ["Adam", "AdamW", "PagedAdamW32bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_next_step_in_32_bits_is_that_of_bitsandbytes(train, name, dtype):
    run = train(name, dtype=dtype)
    ours, before = go_on(run, PagedAdamW)
    check_parameters(ours.model, run.model, before, lr=1e-2)
    for p, q in zip(ours.model.parameters(), run.model.parameters(), strict=True):
        if q.grad is None:
            continue
        state, theirs = ours.optimizer.state[p], run.optimizer.state[q]
        assert state["step"] == theirs["step"] == 4
        g = q.grad.float().abs()
        for moment, n, term in (("exp_avg", 1, g), ("exp_avg_sq", 2, g * g)):
            allowed = 4 * FP32_ROUNDOFF * (theirs[f"state{n}"].abs() + term)
            assert ((state[moment] - theirs[f"state{n}"]).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit"])
def test_the_next_step_in_8_bits_is_that_of_bitsandbytes(train, name):
    run = train(name)
    ours, before = go_on(run, PagedAdamW8bit)
    check_parameters(ours.model, run.model, before, lr=1e-2)
    theirs = from_bitsandbytes(run.optimizer.state_dict())["state"]
    params = [p for group in ours.optimizer.param_groups for p in group["params"]]
    count = 0
    for i, expected in theirs.items():
        state = ours.optimizer.state[params[i]]
        if params[i].numel() < 4096:
            continue
        count += 1
        assert state["step"] == expected["step"] == 4
        for moment in ("exp_avg", "exp_avg_sq"):
            absmax = expected[f"{moment}_absmax"]
            torch.testing.assert_close(state[f"{moment}_absmax"], absmax, rtol=1e-6, atol=0)
            apart = (state[moment].int() - expected[moment].int()).abs()
            assert apart.max() <= 1
            assert (apart > 0).float().mean() < 0.01  # it looks codes up in a table of bins
    assert count == 4


def test_a_converted_state_of_the_other_width_is_refused_when_it_is_loaded(train):
    for name, optimizer_class in (("AdamW8bit", PagedAdamW), ("AdamW", PagedAdamW8bit)):
        run = train(name)
        optimizer = optimizer_class(groups_of(run.model))
        with pytest.raises(ValueError, match="absmax"):
            optimizer.load_state_dict(from_bitsandbytes(run.optimizer.state_dict()))
    lion = from_bitsandbytes(train("Lion").optimizer.state_dict())
    with pytest.raises(ValueError, match="has no eps"):
        PagedAdamW(groups_of(run.model)).load_state_dict(lion)
