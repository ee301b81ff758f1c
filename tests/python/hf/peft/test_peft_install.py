"""What is wrapped in PEFT: once, checked, and without a trace on models that have no NF4."""

import types

import peft
import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import model as lora_model
from peft.utils.error import NoMatchingPeftModuleError
from peft_models import lora, peft_twins, tiny_llama, twins, with_adapter
from torch import nn

from qlora_native import count_parameters
from qlora_native.hf.peft import install
from qlora_native.hf.peft.patching import checked, wrap, wrap_everywhere


def wrapped() -> list:
    tuner = peft.tuners.tuners_utils.BaseTuner
    return [
        lora_model.dispatch_default,
        peft.tuners.tuners_utils._maybe_include_all_linear_layers,
        peft.tuners.vera.model._maybe_include_all_linear_layers,
        tuner.inject_adapter,
        tuner.merge_adapter,
        tuner.merge_and_unload,
        PeftModel.from_pretrained.__func__,
        PeftModel.load_adapter,
        PeftModel.get_nb_trainable_parameters,
        PeftMixedModel.get_nb_trainable_parameters,
    ]


def test_installing_again_changes_nothing():
    before = wrapped()
    assert all(hasattr(function, "_made_by") for function in before)
    install()
    assert all(one is other for one, other in zip(wrapped(), before, strict=True))


def test_a_peft_without_what_is_wrapped_is_named():
    def dispatch(target, name):
        return target, name

    module = types.ModuleType("peft.of_tomorrow")
    module.dispatch_default = dispatch
    with pytest.raises(ImportError, match=r"peft.of_tomorrow.dispatch_default of PEFT .* has the"):
        checked(module, "dispatch_default", ("target", "adapter_name"))
    with pytest.raises(ImportError, match=r"other of PEFT .* does not exist"):
        wrap(module, "other", (), lambda original: original)
    assert module.dispatch_default is dispatch


def test_wrap_everywhere_finds_what_was_imported_by_name(monkeypatch):
    import sys

    def original():
        return 1

    def twice(function):
        return lambda: 2 * function()

    owner, user = types.ModuleType("peft.owner_of_it"), types.ModuleType("peft.user_of_it")
    owner.f = user.f = original
    for module in (owner, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    wrap_everywhere(owner, "f", (), twice)
    wrap_everywhere(owner, "f", (), twice)
    assert owner.f() == user.f() == 2


def test_models_without_nf4_are_pefts_own():
    model = with_adapter(tiny_llama(), lora())
    kinds = {type(m) for m in model.modules() if isinstance(m, lora_layer.LoraLayer)}
    assert kinds == {lora_layer.Linear}
    with pytest.raises(NoMatchingPeftModuleError) as error:
        get_peft_model(tiny_llama(), lora(target_modules=["query"]))
    assert "linear layers are" not in str(error.value)
    merged = with_adapter(nn.Sequential(nn.Linear(4, 4)), lora(r=2)).merge_and_unload()
    assert isinstance(merged[0], nn.Linear)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_counts_are_those_of_the_dense_twin(settings, capsys):
    ours, theirs = peft_twins(lora(**settings), bias=True)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (ours, theirs):
        model.print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]
    assert count_parameters(ours)[1] == ours.get_nb_trainable_parameters()[1]


def test_a_mixed_model_counts_the_same():
    ours, theirs = (
        get_peft_model(model, lora(init_lora_weights=True), mixed=True) for model in twins()
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_a_plain_module_can_be_adapted_too():
    from qlora_native import quantize_model

    model = with_adapter(
        quantize_model(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), skip=[]),
        lora(target_modules=["0", "2"]),
    )
    assert model(torch.randn(3, 64)).shape == (3, 64)
    assert model.get_nb_trainable_parameters()[1] == 2 * (64 * 32 + 4 * 96) + 96
