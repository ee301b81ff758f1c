"""Every tuner that PEFT ships, on a model with NF4 layers: right, or a loud error.

Right is what the same tuner of PEFT does on the dense twin, whose weights are the dequantised ones.
"""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from tuner_cases import (
    ALL_TYPES,
    CASES,
    TOLERANCE,
    adapted,
    dense_twin,
    logits,
    nf4_model,
    provide_kmeans,
    trained_step,
    tuner_class,
)

import qlora_native.hf  # noqa: F401
from qlora_native import NF4Linear
from qlora_native.hf.peft import tuners
from support import same_bits, state_bits

every_tuner = pytest.mark.parametrize("name", ALL_TYPES)


@pytest.fixture(autouse=True)
def _kmeans(monkeypatch):
    provide_kmeans(monkeypatch)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    """What the NF4 layers store, in the order in which they come."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return {f"{i}.{k}": v for i, x in enumerate(layers) for k, v in state_bits(x).items()}


def assert_close(actual, expected, tolerance=TOLERANCE):
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance * scale


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bits(actual[key], tensor), key


def test_a_case_for_each_tuner():
    new = set(ALL_TYPES) - set(CASES)
    assert not new, f"PEFT has tuners whose behaviour on NF4 layers nobody has looked at: {new}"


def test_the_lists_name_tuners_of_peft():
    assert set(ALL_TYPES) >= tuners.ON_NF4 | tuners.BY_LORA


@every_tuner
def test_forward_and_gradients_are_those_of_the_dense_twin(name, folder):
    model, twin = adapted(nf4_model(), name, folder), adapted(dense_twin(), name, folder)
    before = base_bytes(model)
    # What is saved: names, and the start, which some tuners compute from the base weights.
    assert_same_state(get_peft_model_state_dict(model), get_peft_model_state_dict(twin))
    assert_close(logits(model, name), logits(twin, name))
    loss, expected_loss = trained_step(model, name), trained_step(twin, name)
    assert_close(loss, expected_loss)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for key, gradient in gradients.items():
        assert torch.allclose(
            gradient, expected[key], rtol=0, atol=2 * TOLERANCE * expected[key].norm().item()
        ), key
    assert base_bytes(model) == before


@every_tuner
def test_trains(name, folder):
    model = adapted(nf4_model(), name, folder)
    before = base_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(trained_step(model, name))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert base_bytes(model) == before


@every_tuner
def test_saves_and_loads(name, folder, tmp_path):
    model = adapted(nf4_model(), name, folder)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nf4_model(), tmp_path)
    if not CASES[name].loads:  # whatever the base is, and we want to know when PEFT mends it
        twin = adapted(dense_twin(), name, folder)
        reloaded = PeftModel.from_pretrained(dense_twin(), tmp_path)
        assert not same_bits(logits(reloaded, name), logits(twin, name))
        assert_close(logits(loaded, name), logits(reloaded, name))
        return
    assert_same_state(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    expected = logits(model, name)
    assert same_bits(logits(loaded, name), expected)
    # And by plain PEFT on a dense model.
    assert_close(logits(PeftModel.from_pretrained(dense_twin(), tmp_path), name), expected)


@every_tuner
def test_disabled_it_is_the_base(name, folder):
    model = adapted(nf4_model(), name, folder)
    adapted_logits = logits(model, name)
    with model.disable_adapter():
        assert same_bits(logits(model, name), logits(nf4_model()))
    assert same_bits(logits(model, name), adapted_logits)


def merge_or_why_not(model):
    try:
        model.merge_adapter()
    except Exception as error:
        return type(error)
    return None


@every_tuner
def test_merges_and_unmerges_as_on_the_dense_twin(name, folder):
    model, twin = adapted(nf4_model(), name, folder), adapted(dense_twin(), name, folder)
    before, bits = logits(model, name), state_bits(model)
    refusal = merge_or_why_not(model)
    # On a dense model PEFT merges X-LoRA's adapters unweighted, which is another model.
    assert refusal is (NotImplementedError if name == "XLORA" else merge_or_why_not(twin))
    assert (refusal is None) == CASES[name].merges
    if refusal is None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        for key, layer in layers.items():
            own, other = layer.get_base_layer(), twin.get_submodule(key).get_base_layer()
            if name != "LORA":
                assert same_bits(own.weight, other.weight), key
        assert_close(logits(model, name), before, 2 * TOLERANCE)
        if not CASES[name].unmerges:
            with pytest.raises(NotImplementedError):
                model.unmerge_adapter()
            return
        model.unmerge_adapter()
    assert state_bits(model) == bits
    assert same_bits(logits(model, name), before)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.merges])
def test_merged_and_unloaded_it_is_dense(name, folder):
    model, twin = adapted(nf4_model(), name, folder), adapted(dense_twin(), name, folder)
    before = logits(model, name)
    targeted = [n for n, m in model.get_base_model().named_modules() if hasattr(m, "base_layer")]
    dense, expected = model.merge_and_unload(safe_merge=True), twin.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in dense.modules())
    for key in targeted:
        own, other = dense.get_submodule(key), expected.get_submodule(key)
        assert type(own) is type(other)
        assert_close(own.weight, other.weight)
    for module in dense.modules():
        assert not isinstance(module, NF4Linear) or type(module) is NF4Linear
    assert_close(logits(dense), before, 2 * TOLERANCE)


@pytest.mark.parametrize("name", [n for n in ALL_TYPES if hasattr(tuner_class(n), "unload")])
def test_unloaded_it_is_the_base(name, folder):
    model = adapted(nf4_model(), name, folder)
    base = nf4_model()
    unloaded = model.unload()
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in base.modules()]
    assert state_bits(unloaded) == state_bits(base)
    assert same_bits(logits(unloaded), logits(base))
