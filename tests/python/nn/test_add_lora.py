"""add_lora, count_parameters and print_trainable_parameters."""

import pytest
import torch
from torch import nn

from qlora_native import (
    LoRALinear,
    add_lora,
    count_parameters,
    merge_lora,
    print_trainable_parameters,
    quantize_model,
)
from support import NAMES, Model, nf4_layer, same_bits

TOKENS = torch.arange(7)[None]


class ModelWithHead(Model):
    """Names its output head, as transformers' models do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def lora_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def randomise_b(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b)


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


def test_a_second_lora_of_the_same_name_is_refused():
    model = add_lora(Model(), r=2, target_modules=["up"])
    with pytest.raises(ValueError, match="adapter_name 'default' is taken; there are: 'default'"):
        add_lora(model, r=2, target_modules=["down"])


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
