"""Batches of several adapters: PEFT's `adapter_names` at inference, `set_lora` in training."""

import pytest
import torch
from peft_models import (
    VOCABULARY,
    add_adapter,
    anatomy,
    assert_near,
    assert_untouched,
    logits,
    lora,
    peft_twins,
    tokens,
    twins,
    with_adapter,
)
from torch import nn

import qlora_native.nn.lora_forward as lora_forward_module
from qlora_native import set_lora

NAMES = ["a", "__base__", "b", "a", "c"]


def three_adapters(**settings):
    pair = tuple(with_adapter(model, lora(**settings), adapter_name="a") for model in twins())
    for model in pair:
        add_adapter(model, "b", lora(r=7, target_modules=["q_proj", "up_proj"]), seed=1)
        add_adapter(model, "c", lora(r=2, use_rslora=True), seed=2)
    return pair


@pytest.mark.parametrize("names", [NAMES, ["c"] * 5, ["__base__"] * 5, ["b", "b", "a", "a", "b"]])
def test_a_mixed_batch_gives_each_row_its_adapter(names):
    ours, theirs = (model.eval() for model in three_adapters(lora_dropout=0.3))
    ids = tokens(5)
    mixed = logits(ours, ids, adapter_names=names)
    assert_near(mixed, logits(theirs, ids, adapter_names=names))
    for row, name in enumerate(names):
        set_lora(ours, name)
        assert_near(mixed[row], logits(ours, ids[row : row + 1])[0])


def test_it_is_one_operation_a_layer_however_many_adapters(monkeypatch):
    ours, _ = three_adapters()
    calls = []
    original = lora_forward_module.lora_linear_groups

    def counted(x, weight, bias, groups):
        calls.append(len(groups))
        return original(x, weight, bias, groups)

    monkeypatch.setattr(lora_forward_module, "lora_linear_groups", counted)
    logits(ours.eval(), tokens(5), adapter_names=NAMES)
    assert len(calls) == 2 * 7
    assert set(calls) == {3, 4}  # where "b" is not, and where it is


def test_lora_bias_goes_to_its_own_rows():
    ours, theirs = (
        with_adapter(model, lora(lora_bias=True), adapter_name="a") for model in twins(bias=True)
    )
    for model in (ours, theirs):
        add_adapter(model, "b", lora(lora_bias=True, target_modules=["v_proj"]))
        add_adapter(model, "c", lora(), seed=6)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
        model.eval()
    ids = tokens(5)
    mixed = logits(ours, ids, adapter_names=NAMES)
    assert_near(mixed, logits(theirs, ids, adapter_names=NAMES))


def test_generation_repeats_names_for_beams():
    ours, theirs = (model.eval() for model in three_adapters())
    ids = tokens(3)
    settings = {"max_new_tokens": 6, "do_sample": False, "adapter_names": ["a", "__base__", "c"]}
    for num_beams in (1, 3):
        mine, wanted = (
            model.generate(input_ids=ids, num_beams=num_beams, **settings)
            for model in (ours, theirs)
        )
        assert torch.equal(mine, wanted)
    set_lora(ours, "a")
    alone = ours.generate(input_ids=ids[:1], num_beams=3, max_new_tokens=6, do_sample=False)
    assert torch.equal(mine[0, : alone.shape[1]], alone[0])


def test_modules_to_save_follow_peft_s_rules():
    pair = [
        with_adapter(model, lora(modules_to_save=["lm_head"]), adapter_name="a")
        for model in twins()
    ]
    for model in pair:
        add_adapter(model, "b", lora(modules_to_save=["lm_head"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save.b" in name:
                    parameter.mul_(-1.5)
        model.eval()
    ours, theirs = pair
    names = ["b", "a", "__base__"]
    mixed = logits(ours, tokens(), adapter_names=names)
    assert_near(mixed, logits(theirs, tokens(), adapter_names=names))
    assert not torch.allclose(mixed[0], logits(ours, tokens(), adapter_names=["a"] * 3)[0])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b"], ValueError, "2 and 3"),
        (["a", "b", "nobody"], ValueError, "non-existing adapter.*nobody"),
    ],
)
def test_wrong_names_are_refused_and_leave_nothing_behind(names, error, message):
    model, _ = three_adapters()
    model.eval()
    before, wanted = anatomy(model), logits(model, tokens())
    with pytest.raises(error, match=message):
        model(input_ids=tokens(), adapter_names=names)
    assert_untouched(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model, tokens()), wanted)


def test_training_with_adapter_names_is_refused_and_set_lora_is_for_that():
    model, _ = three_adapters()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=tokens(), adapter_names=["a"] * 3)


def test_dora_in_a_mixed_batch_is_set_lora_s_not_peft_s():
    model = with_adapter(twins()[0], lora(use_dora=True), adapter_name="a").eval()
    add_adapter(model, "b", lora(target_modules=["q_proj"]))
    names = ["a", "b", "__base__", "a", "a"]
    with pytest.raises(ValueError, match="DoRA"):
        model(input_ids=tokens(5), adapter_names=names)
    set_lora(model, names)
    mixed = logits(model, tokens(5))
    for row, name in enumerate(names):
        set_lora(model, name)
        assert_near(mixed[row], logits(model, tokens(5))[row])
    set_lora(model, names)
    with pytest.raises(ValueError, match="5 names are in force"):
        model(input_ids=tokens(3))


# ---- training several adapters at once


def trained_together(model, names, ids, labels):
    set_lora(model, names)
    model.zero_grad()
    losses = nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].reshape(-1, VOCABULARY),
        labels[:, 1:].reshape(-1),
        reduction="sum",
    )
    losses.backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any()
    }


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_adapters_trained_in_one_batch_get_the_gradients_they_get_alone(checkpointing):
    model, _ = three_adapters()
    model.train()
    model.base_model.set_adapter(["a", "b", "c"])  # all of them require gradients
    ids, names = tokens(5), NAMES
    together = {}
    alone: dict[str, torch.Tensor] = {}
    for name in ("a", "b", "c"):
        rows = [i for i, each in enumerate(names) if each == name]
        alone.update(trained_together(model, name, ids[rows], ids[rows]))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    together = trained_together(model, names, ids, ids)
    assert together.keys() == alone.keys()
    assert len(together) == 2 * (14 + 4 + 14)
    for name, gradient in together.items():
        assert_near(gradient, alone[name])


def test_a_list_of_another_length_is_refused_at_the_call():
    model, _ = three_adapters()
    set_lora(model, ["a", "b"])
    with pytest.raises(ValueError, match="2 names are in force"):
        model(input_ids=tokens(3))


def test_set_lora_refuses_unknown_names_and_lists_those_there_are():
    model, _ = three_adapters()
    wanted = logits(model, tokens())
    with pytest.raises(ValueError, match=r"no adapter 'd'; there are: 'a', 'b', 'c'"):
        set_lora(model, ["a", "d", "b"])
    assert torch.equal(logits(model, tokens()), wanted)


def test_peft_twins_differ_without_their_adapters():
    """The comparisons above could fail: rows of different adapters are far apart."""
    ours, _ = peft_twins(lora())
    with_it = logits(ours, tokens())
    set_lora(ours, None)
    assert (with_it - logits(ours, tokens())).abs().max() > 0.05


# What leaves a model with something that is PEFT's alone, beside NF4 layers.
BESIDE = {
    "LoRA on a dense layer": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a copy of a module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("settings", BESIDE.values(), ids=BESIDE)
def test_set_lora_refuses_what_layers_that_it_does_not_reach_would_do_otherwise(settings):
    model = with_adapter(twins()[0], lora(**settings), adapter_name="a").eval()
    add_adapter(model, "b", lora(**settings))
    before = logits(model, tokens())
    for names in ("b", ["a", "b", "a"], ["a", "a", "__base__"], None):
        with pytest.raises(ValueError, match=r"of PEFT, which set_lora does not reach.*\['a'\]"):
            set_lora(model, names)
        assert torch.equal(logits(model, tokens()), before)
    set_lora(model, ["a"] * 3)  # which is what they do
    assert_near(logits(model, tokens()), before)
    model.set_adapter("b")
    set_lora(model, "b")
    with model.disable_adapter():
        set_lora(model, "b")


def test_set_lora_lets_adapters_be_that_only_nf4_layers_have():
    model = with_adapter(twins()[0], lora(target_modules=["q_proj"]), adapter_name="a").eval()
    add_adapter(model, "b", lora(target_modules=["q_proj"]))
    add_adapter(model, "head", lora(target_modules=["k_proj", "lm_head"]))
    set_lora(model, ["a", "b", "__base__"])
    with pytest.raises(ValueError, match=r"lm_head is a Linear of PEFT.*wants \['head'\]"):
        set_lora(model, ["a", "b", "head"])
