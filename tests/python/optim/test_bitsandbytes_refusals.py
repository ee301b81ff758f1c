"""bitsandbytes' optimiser state that has no equivalent here: refused by name."""

import re

import pytest
import torch
from bitsandbytes_runs import flat, import_or_skip
from torch import Tensor, nn

from qlora_native.optim.bitsandbytes_state import (
    dynamic_map,
    from_bitsandbytes,
    is_bitsandbytes_state,
)


@pytest.fixture(scope="module")
def bnb():
    return import_or_skip()


def refused(state_dict: dict, message: str) -> None:
    assert is_bitsandbytes_state(state_dict)
    with pytest.raises(ValueError, match=re.compile(message)):
        from_bitsandbytes(state_dict)


def stepped(bnb, name: str, steps: int = 1, parameter: Tensor | None = None, **options) -> dict:
    p = nn.Parameter(torch.randn(65, 64) if parameter is None else parameter)
    optimizer = getattr(bnb.optim, name)([p], **options)
    p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("SGD8bit", {"lr": 0.1, "momentum": 0.9}),
        ("LARS", {"lr": 0.1, "momentum": 0.9, "max_unorm": 0.0}),
        ("RMSprop", {}),
        ("RMSprop8bit", {"momentum": 0.9}),
        ("Adagrad", {"eps": 0.0}),
        ("Adagrad8bit", {}),
    ],
    ids=str,
)
def test_other_optimisers_of_one_moment_are_refused(bnb, name, options, steps):
    refused(stepped(bnb, name, steps, **options), r"group 0 .* of one moment .* want Lion's")


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit"])
def test_ademamix_is_refused(bnb, name, steps):
    refused(stepped(bnb, name, steps), r"group 0 .* is of AdEMAMix \(betas \(0.9, 0.999, 0.9999\)")
    with_alpha = stepped(bnb, "AdamW")
    with_alpha["param_groups"][0]["alpha"] = 5.0
    refused(with_alpha, "AdEMAMix")


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit", "LARS", "LARS8bit"])
def test_bounded_updates_are_refused(bnb, name):
    options = {"momentum": 0.9, "lr": 0.1} if name.startswith("LARS") else {}
    state_dict = stepped(bnb, name, **options)
    state_dict["param_groups"][0]["betas"] = (0.9, 0.99)  # else LARS is known by them
    refused(state_dict, "parameter 0 has unorm_vec: it is of LAMB or LARS")


def altered(state_dict: dict, **changes) -> dict:
    """As older versions would nest it, with parts of parameter 0 replaced, or removed (None)."""
    changed = flat(state_dict)
    state = changed["state"][0]
    state |= changes
    changed["state"][0] = {name: value for name, value in state.items() if value is not None}
    return changed


def test_clipping_by_percentile_is_refused(bnb):
    clipped = altered(stepped(bnb, "AdamW"), gnorm_vec=torch.zeros(100))
    refused(clipped, "gnorm_vec: it is of an optimiser with percentile_clipping")


def test_8_bit_state_that_is_not_blockwise_is_refused(bnb):
    scales = {f"{name}max{n}": torch.ones(1) for name in ("", "new_") for n in (1, 2)}
    whole = altered(stepped(bnb, "AdamW8bit"), absmax1=None, absmax2=None, **scales)
    refused(whole, "max1: it is of an optimiser with 8-bit state that is not block-wise")


@pytest.mark.parametrize("number", [1, 2])
def test_other_block_sizes_are_refused(bnb, number):
    of_2048 = altered(stepped(bnb, "AdamW8bit"), **{f"absmax{number}": torch.ones(3)})
    refused(of_2048, rf"blocks of 256: absmax{number} is torch.float32 \[3\], want .* \[17\]")
    in_fp64 = altered(stepped(bnb, "AdamW8bit"), absmax1=torch.ones(17).double())
    refused(in_fp64, r"absmax1 is torch.float64 \[17\]")


@pytest.mark.parametrize(("number", "kind"), [(1, "signed"), (2, "unsigned")])
def test_maps_are_ours_to_the_last_bit(bnb, number, kind):
    state_dict = stepped(bnb, "AdamW8bit")
    name = f"qmap{number}"
    other = flat(state_dict)["state"][0][name].clone()
    other[200] = other[200].nextafter(torch.tensor(1.0))
    wanted = f"parameter 0: {name} is not the {kind} dynamic map: 1 entries differ, entry 200 is"
    refused(altered(state_dict, **{name: other}), wanted)
    refused(altered(state_dict, **{name: other[:128]}), rf"{name} is torch.float32 \[128\]")
    swapped = altered(state_dict, **{name: dynamic_map(kind != "signed")})
    refused(swapped, f"{name} is not the {kind} dynamic map: 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state2": None}, r"has \['absmax1', .*\], want \['absmax1', 'qmap1', 'state1', 'step'\]"),
        ({"absmax2": None}, "has .*'qmap2', 'state1', 'state2', 'step'], want .*'absmax2'"),
        ({"qmap1": None}, r"has .*, want \['state1', 'state2', 'step'\]"),
        ({"step": None}, "has .*, want .*'step'"),
        ({"projector": 3}, "has .*'projector'"),
        ({"state2": torch.zeros(65, 64)}, "state2 is torch.float32 .*, want torch.uint8"),
        ({"state2": torch.zeros(4160, dtype=torch.uint8)}, r"state2 .* \[4160\], want .* \[65, 64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_state_that_is_incomplete_or_odd_is_refused(bnb, changes, message):
    state_dict = stepped(bnb, "AdamW8bit")
    if changes == {"state2": None}:  # looks like Lion, whose settings it then needs
        state_dict["param_groups"][0] |= {"eps": 0.0}
    refused(altered(state_dict, **changes), message)


def test_32_bit_state_in_other_dtypes_is_refused(bnb):
    halves = {f"state{n}": torch.zeros(65, 64, dtype=torch.bfloat16) for n in (1, 2)}
    refused(altered(stepped(bnb, "AdamW"), **halves), "state1 is torch.bfloat16")


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion8bit"])
def test_state_of_a_parameter_that_was_not_contiguous_is_refused(bnb, name):
    transposed = torch.randn(65, 64).t()
    refused(stepped(bnb, name, parameter=transposed), "state1 is not contiguous")


def test_a_second_moment_of_some_parameters_is_refused(bnb):
    state_dict = stepped(bnb, "AdamW")
    state_dict["state"][1] = stepped(bnb, "Lion")["state"][0]
    refused(state_dict, "has a state2 of some parameters, not of all")


def test_groups_without_settings_are_refused(bnb):
    state_dict = stepped(bnb, "AdamW")
    del state_dict["param_groups"][0]["betas"], state_dict["param_groups"][0]["eps"]
    refused(state_dict, "group 0 of the bitsandbytes state dict has no betas, eps")
