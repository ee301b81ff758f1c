"""set_lora: what is in force, in which layers, until when; and the groups of a mixed batch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qlora_native import add_lora, quantize_model, set_lora
from qlora_native.nn.routing import BASE, RoutedLayer, Routing, groups_of_batch
from qlora_native.ops.lora import LoRAFactors
from support import Model, same_bits

TOKENS = torch.arange(4 * 5).reshape(4, 5)


def make_model() -> nn.Module:
    """Adapters `a` of every layer and `b` of some, which do something, on an NF4 base."""
    model = add_lora(quantize_model(Model()), r=4, adapter_name="a")
    add_lora(model, r=2, lora_alpha=8, target_modules=["up"], adapter_name="b")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model() -> nn.Module:
    return make_model()


def output(model: nn.Module, names) -> torch.Tensor:
    set_lora(model, names)
    return model(TOKENS)


def routings(model: nn.Module) -> list[object]:
    return [layer.routing.names for layer in model.modules() if isinstance(layer, RoutedLayer)]


def test_the_first_adapter_is_in_force_and_a_second_is_not():
    model = add_lora(Model(), r=2, adapter_name="a", target_modules=["up"])
    add_lora(model, r=2, adapter_name="b")
    assert routings(model) == ["a"] * 7  # the layers that only `b` has, too
    set_lora(model, None)
    add_lora(model, r=2, adapter_name="c")
    assert routings(model) == [None] * 7


def test_a_name_a_list_the_base_and_none(model):
    base = quantize_model(Model())
    base.load_state_dict(
        {
            name.replace(".base.", "."): value
            for name, value in model.state_dict().items()
            if ".adapters." not in name
        }
    )
    of_base = base(TOKENS)
    outputs = {name: output(model, name) for name in ("a", "b", None)}
    assert same_bits(outputs[None], of_base)
    assert same_bits(output(model, BASE), of_base)
    assert same_bits(output(model, [BASE] * 4), of_base)
    assert not torch.allclose(outputs["a"], of_base)
    assert not torch.allclose(outputs["b"], of_base)
    assert same_bits(output(model, ["a"] * 4), outputs["a"])
    mixed = output(model, ["b", BASE, "a", "b"])
    for row, name in enumerate(["b", None, "a", "b"]):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-5, atol=1e-5)


def test_names_may_be_any_sequence(model):
    expected = output(model, ["a", "b", "b", "a"])
    assert same_bits(output(model, ("a", "b", "b", "a")), expected)


def test_it_stays_in_force_until_the_next_call(model):
    expected = output(model, "b")
    assert same_bits(model(TOKENS), expected)
    assert same_bits(model(TOKENS), expected)


def test_a_part_of_a_model_is_routed_alone(model):
    set_lora(model, "a")
    set_lora(model.blocks[1], "b")
    assert set(routings(model.blocks[0])) == {"a"}
    assert set(routings(model.blocks[1])) == {"b"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("c", "set_lora: there is no adapter 'c'; there are: 'a', 'b'"),
        (["a", "x", BASE, "c"], "there is no adapter 'c', 'x'; there are: 'a', 'b'"),
        ([None], "a name is None, want a string"),
        (["a", 1], "a name is 1, want a string"),
    ],
)
def test_unknown_names_leave_what_was_in_force(model, names, message):
    set_lora(model, ["b", "a"])
    with pytest.raises(ValueError, match=message):
        set_lora(model, names)
    assert set(routings(model)) == {("b", "a")}


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="set_lora: the model has no LoRA layer"):
        set_lora(Model(), None)


@pytest.mark.parametrize("names", [["a"], ["a"] * 5, [BASE] * 3, []])
def test_a_batch_of_another_length_is_refused_with_both_numbers(model, names):
    set_lora(model, names)
    with pytest.raises(ValueError, match=rf"set_lora: {len(names)} names .* has shape \[4, 5, 32]"):
        model(TOKENS)


def test_an_x_without_a_batch_is_refused(model):
    layer = model.blocks[0].up
    set_lora(model, ["a"] * 32)
    with pytest.raises(ValueError, match=r"32 names .* has shape \[32]: want \[32, ..., k]"):
        layer(torch.randn(32))


def test_copies_and_pickles_keep_what_is_in_force_and_are_independent(model):
    set_lora(model, ["a", "b", "a", BASE])
    expected = model(TOKENS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(other(TOKENS), expected)
        set_lora(other, "b")
        assert same_bits(model(TOKENS), expected)


def test_an_empty_batch_has_no_names(model):
    set_lora(model, [])
    assert model(TOKENS[:0]).shape == (0, 5, 50)


# ---- groups_of_batch


def factors(value: float, seed: int | None = None) -> LoRAFactors:
    seed_tensor = None if seed is None else torch.tensor([seed])
    return LoRAFactors(torch.full((2, 8), value), torch.zeros(6, 2), seed_tensor, 1.0, 0.5)


@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8), (5, 2, 4, 8), (5, 0, 8)], ids=str)
def test_neighbours_of_one_name_are_one_group_and_others_have_none(shape):
    known = {"a": factors(1.0), "b": factors(2.0)}
    names = ["b", "b", "unknown", "a", "b"]
    groups = groups_of_batch(names, torch.zeros(shape), known)
    rows = torch.zeros(shape).numel() // (5 * 8)
    assert [(g.begin, g.end) for g in groups] == [
        (0, 2 * rows),
        (3 * rows, 4 * rows),
        (4 * rows, 5 * rows),
    ]
    assert groups[0].factors is known["b"]
    assert groups[1].factors is known["a"]
    assert groups[2].factors is known["b"]


def test_an_adapter_with_dropout_has_another_seed_in_each_of_its_groups():
    groups = groups_of_batch(
        ["a", "b", "a", "b", "a"], torch.zeros(5, 8), {"a": factors(1.0, 7), "b": factors(2.0, 9)}
    )
    of_a = [group.factors for group in groups[::2]]
    assert len({f.seed.item() for f in of_a}) == 3
    assert of_a[0].seed.item() == 7
    assert len({id(f.lora_a) for f in of_a}) == 1  # one gradient


# ---- what a routing remembers


def test_only_the_last_changes_are_kept():
    routing = Routing("a")
    for i in range(1000):
        routing.change(f"{i}")
    assert len(pickle.dumps(routing)) < 200
    assert len(routing._past) == 64
    routing.change("999")
    assert routing._past[-1].names == "998"  # what is in force already is no change
