"""add_lora, count_parameters and print_trainable_parameters."""

import pytest
import torch
from torch import nn

from qlora_native import (
    LoRALinear,
    add_lora,
    count_parameters,
    delete_lora,
    merge_lora,
    print_trainable_parameters,
    quantize_model,
    set_lora,
    unmerge_lora,
)
from support import NAMES, Model, nf4_layer, same_bits, state_bits

TOKENS = torch.arange(7)[None]


class ModelWithHead(Model):
    """Names its output head, as transformers' models do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def lora_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def randomise_b(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)


@pytest.mark.parametrize("quantised", [False, True])
def test_all_linear_layers_but_the_head_get_a_lora_and_the_start_is_the_base(quantised):
    model = ModelWithHead()
    if quantised:
        quantize_model(model)
    before = model(TOKENS)
    assert add_lora(model, r=4) is model
    assert lora_names(model) == NAMES
    assert same_bits(model(TOKENS), before)
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_a",
        "lora_b",
    }


def test_a_head_that_nobody_names_is_a_linear_layer_like_any():
    assert lora_names(add_lora(Model(), r=4)) == [*NAMES, "lm_head"]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["up"], [f"blocks.{i}.up" for i in range(3)]),
        (["blocks.1.up", "down"], [n for n in NAMES if n == "blocks.1.up" or n.endswith("down")]),
        (["1.up"], ["blocks.1.up"]),
        (["lm_head"], ["lm_head"]),
        (("up", "up"), [f"blocks.{i}.up" for i in range(3)]),
    ],
)
def test_names_choose_layers_by_their_end(targets, names):
    assert lora_names(add_lora(ModelWithHead(), r=4, target_modules=targets)) == names


def test_the_options_reach_every_layer():
    model = add_lora(Model().eval(), r=3, lora_alpha=7, lora_dropout=0.25, use_rslora=True)
    for name in lora_names(model):
        layer = model.get_submodule(name)
        assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.use_rslora) == (3, 7, 0.25, 1)
        assert not layer.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"]}, "'q_proj', which is no linear layer; there are: down, lm"),
        ({"target_modules": ["up", "norm"]}, "'norm', which is no linear layer"),
        ({"target_modules": ["p"]}, "'p', which is no linear layer"),
        ({"target_modules": []}, "no linear layer to put a LoRA beside"),
        ({"target_modules": "up"}, "target_modules is 'up', want 'all-linear' or a list"),
        ({"r": 33}, r"add_lora: blocks.0.up: r is 33, want an integer from 1 to 32"),
        ({"r": 0}, "r is 0"),
        ({"r": 4.0}, "r is 4.0, want an integer"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"adapter_name": "a.b"}, r"adapter_name is 'a\.b', want a string without a dot"),
        ({"adapter_name": ""}, "adapter_name is '', want a string"),
        ({"adapter_name": None}, "adapter_name is None, want a string"),
        ({"adapter_name": "__base__"}, "'__base__', which has a meaning already"),
        ({"adapter_name": "keys"}, "'keys', which has a meaning already"),
        ({"adapter_name": "training"}, "'training', which has a meaning already"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(options, message):
    model = Model()
    model.embed.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert dict(model.named_modules()) == modules
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_the_smallest_layer_bounds_the_rank_before_any_is_changed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"add_lora: 1: r is 3, want an integer from 1 to 2"):
        add_lora(model, r=3)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


# ---- several adapters


def make_model_with_two() -> nn.Module:
    model = add_lora(quantize_model(Model()), r=2, target_modules=["up"], adapter_name="a")
    add_lora(model, r=5, lora_alpha=3, lora_dropout=0.5, adapter_name="b", use_dora=True)
    return model


def test_a_second_adapter_has_its_own_rank_settings_and_targets():
    model = make_model_with_two()
    assert lora_names(model) == [*NAMES, "lm_head"]
    for name in lora_names(model):
        adapters = model.get_submodule(name).adapters
        assert list(adapters) == (["a", "b"] if name.endswith("up") else ["b"])
        b = adapters["b"]
        assert (b.r, b.lora_alpha, b.lora_dropout, b.use_rslora, b.use_dora) == (5, 3, 0.5, 0, 1)
        if "a" in adapters:
            assert (adapters["a"].r, adapters["a"].use_dora) == (2, False)


def test_a_second_adapter_leaves_the_first_as_it_is():
    model = add_lora(quantize_model(Model()), r=2, target_modules=["up"], adapter_name="a")
    randomise_b(model)
    model.blocks[0].up.adapters["a"].requires_grad_(False)
    model.embed.weight.requires_grad_(True)
    parameters = {n: p for n, p in model.named_parameters() if ".adapters.a." in n}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    bits_before = state_bits(model)
    expected = model(TOKENS)
    add_lora(model, r=2, adapter_name="b")
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
        assert parameter.requires_grad == flags[name]
    after = {name.replace(".base.", "."): value for name, value in state_bits(model).items()}
    assert all(after[name.replace(".base.", ".")] == bits_before[name] for name in bits_before)
    assert same_bits(model(TOKENS), expected)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapters." in name and flags.get(name, True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_name": "a"}, "add_lora: adapter_name 'a' is taken; there are: 'a', 'b'"),
        ({"adapter_name": "a", "target_modules": ["down"]}, "'a' is taken"),
        ({"adapter_name": "c", "r": 33}, "add_lora: blocks.0.up: r is 33, want an integer from 1"),
        ({"adapter_name": "c", "target_modules": ["base"]}, "'base', which is no linear layer"),
        ({"adapter_name": "c", "target_modules": ["q"]}, "'q', .* there are: down, lm_head, up"),
    ],
)
def test_an_error_leaves_a_model_with_adapters_as_it_was(options, message):
    model = make_model_with_two()
    model.lm_head.adapters["b"].requires_grad_(False)
    modules = dict(model.named_modules())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert dict(model.named_modules()) == modules
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_a_layer_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch):
    model = quantize_model(Model())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    made = []

    def fail_at_the_third(tensor: torch.Tensor, **_) -> torch.Tensor:
        made.append(tensor)
        if len(made) == 3:
            raise torch.OutOfMemoryError
        return tensor

    monkeypatch.setattr(nn.init, "kaiming_uniform_", fail_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        add_lora(model, r=2)
    assert not lora_names(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_dora_starts_at_the_base_to_rounding():
    model = quantize_model(ModelWithHead())
    before = model(TOKENS)
    add_lora(model, r=4, use_dora=True)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_a",
        "lora_b",
        "magnitude",
    }


def test_a_layer_with_several_adapters_has_no_factors_of_its_own():
    layer = make_model_with_two().blocks[0].up
    for name in ("lora_a", "lora_b", "magnitude", "r", "lora_alpha", "lora_dropout", "scaling"):
        with pytest.raises(ValueError, match=r"has the adapters \['a', 'b'\]; ask layer.adapters"):
            getattr(layer, name)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [(set_lora, ["a"]), (set_lora, [None]), (add_lora, []), (delete_lora, ["b"])],
)
def test_adapters_stay_as_they_are_while_they_are_merged(operation, arguments):
    model = make_model_with_two()
    set_lora(model, "a")
    randomise_b(model)
    before = model(TOKENS)
    merge_lora(model, reversible=True)
    merged = model(TOKENS)
    with pytest.raises(ValueError, match=f"{operation.__name__}: adapters are merged; call unmer"):
        operation(model, *arguments)
    assert same_bits(model(TOKENS), merged)
    assert same_bits(unmerge_lora(model)(TOKENS), before)


# ---- delete_lora


def test_deleting_all_adapters_gives_the_base_back():
    model = quantize_model(Model())
    modules = dict(model.named_modules())
    before = state_bits(model)
    add_lora(model, r=2, target_modules=["up"], adapter_name="a")
    add_lora(model, r=3, adapter_name="b")
    set_lora(model, "b")
    assert delete_lora(model, "a") is model
    assert lora_names(model) == [*NAMES, "lm_head"]
    assert all(list(m.adapters) == ["b"] for m in model.modules() if isinstance(m, LoRALinear))
    set_lora(model, None)
    delete_lora(model, "b")
    assert dict(model.named_modules()) == modules
    assert state_bits(model) == before


@pytest.mark.parametrize("in_force", ["a", ["b", "a"]])
def test_an_adapter_in_force_is_not_deleted(in_force):
    model = make_model_with_two()
    set_lora(model, in_force)
    before = state_bits(model)
    with pytest.raises(ValueError, match="delete_lora: 'a' is in force; call set_lora with other"):
        delete_lora(model, "a")
    for name in ("c", "__base__"):
        with pytest.raises(ValueError, match=f"there is no adapter '{name}'; there are: 'a', 'b'"):
            delete_lora(model, name)
    assert state_bits(model) == before


def test_a_model_that_is_one_layer_is_refused():
    for function in (add_lora, merge_lora):
        layer = LoRALinear(nn.Linear(8, 8), r=2) if function is merge_lora else nn.Linear(8, 8)
        with pytest.raises(ValueError, match=f"{function.__name__}: the model is itself the layer"):
            function(layer)
        assert any(p.requires_grad for p in layer.parameters())


def test_a_layer_with_two_names_gets_one_lora_under_both():
    for target_modules in ("all-linear", ["a"], ["b"]):
        model = nn.Module()
        model.a = nf4_layer(8, 8)
        model.b = model.a
        add_lora(model, r=2, target_modules=target_modules)
        assert isinstance(model.a, LoRALinear)
        assert model.a is model.b
        merge_lora(model)
        assert type(model.a) is nn.Linear
        assert model.a is model.b


def test_subclasses_of_linear_get_no_lora():
    class Special(nn.Linear):
        pass

    model = add_lora(nn.Sequential(nn.Linear(8, 8), Special(8, 8)), r=2)
    assert lora_names(model) == ["0"]


# ---- counting


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_nf4_weight_counts_its_weights_and_not_its_bytes(double_quant):
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total)
    quantize_model(model, double_quant=double_quant)
    trainable = (
        total
        - sum(model.get_submodule(n).weight_shape.numel() for n in NAMES)
        - sum(model.get_submodule(n).bias.numel() for n in NAMES if n.endswith("up"))
    )
    assert count_parameters(model) == (trainable, total)


def test_only_the_factors_count_as_trained(capsys):
    model = add_lora(quantize_model(ModelWithHead()), r=4)
    factors = 3 * (4 * (32 + 64) + 4 * (64 + 32))
    dense = sum(p.numel() for p in Model().parameters())
    assert count_parameters(model) == (factors, dense + factors)
    print_trainable_parameters(model)
    share = 100 * factors / (dense + factors)
    assert capsys.readouterr().out == (
        f"trainable params: {factors:,} || all params: {dense + factors:,} "
        f"|| trainable%: {share:.4f}\n"
    )


def test_shared_parameters_count_once():
    model = Model()
    model.lm_head.weight = model.embed.weight
    assert count_parameters(model)[1] == sum(p.numel() for p in model.parameters())


def test_an_empty_model_has_no_share(capsys):
    print_trainable_parameters(nn.ReLU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"
