"""DoRA on an NF4 base, against PEFT's on the dense twin."""

import pytest
import torch
from peft_models import (
    add_adapter,
    assert_near,
    assert_same_model,
    gradients,
    logits,
    lora,
    peft_twins,
    stretch_magnitudes,
    tokens,
    twins,
    with_adapter,
)
from torch import nn

from qlora_native import quantize_model, set_lora
from qlora_native.hf.peft import NF4LoraLinear


def layers(model: nn.Module) -> list[NF4LoraLinear]:
    return [module for module in model.modules() if isinstance(module, NF4LoraLinear)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 7}, "target_modules": ["q_proj", "down_proj"]},
        {"bias": "lora_only"},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_logits_and_gradients_are_those_of_peft_on_the_dense_twin(settings):
    ours, theirs = peft_twins(lora(use_dora=True, **settings), bias="bias" in settings)
    magnitudes = {n: p for n, p in ours.named_parameters() if "lora_magnitude_vector" in n}
    wanted = dict(theirs.named_parameters())
    assert magnitudes
    for name, magnitude in magnitudes.items():
        assert_near(magnitude.detach(), wanted[name].detach())  # ‖W + sBA‖, B is not zero
    stretch_magnitudes(ours, theirs)
    assert_same_model(ours, theirs, tokens())
    assert any("magnitude" in name for name in gradients(ours, tokens()))


def test_a_new_adapter_starts_at_the_base():
    nf4, _ = twins()
    before = logits(nf4, tokens())
    model = with_adapter(nf4, lora(use_dora=True, init_lora_weights=True))
    assert_near(logits(model, tokens()), before)


def test_a_row_of_zeros_merges_to_zeros_whatever_the_magnitude():
    nf4, _ = twins()
    model = with_adapter(nf4, lora(use_dora=True))
    layer = layers(model)[0]
    layer.lora_magnitude_vector["default"].weight.data.fill_(5.0)
    layer.lora_B["default"].weight.data[3] = 0
    layer.base_layer.weight.data[3] = 0x77  # the code of 0
    merged = layer.merged_weight("default")
    assert (merged[3] == 0).all()
    assert merged.isfinite().all()


def test_with_dropout_evaluation_is_the_same_and_training_has_the_mean_of_many_masks():
    ours, theirs = peft_twins(lora(use_dora=True, lora_dropout=0.5, target_modules=["q_proj"]))
    assert_near(logits(ours.eval(), tokens()), logits(theirs.eval(), tokens()))
    layer = layers(ours)[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.7)
    x = torch.randn(1, layer.in_features).expand(20_000, -1)
    evaluated = layer(x[:1])
    layer.train()
    torch.manual_seed(0)
    y = layer(x).detach().double()
    # Each element of x is in or out on its own: the mean over the masks is the value without.
    error = (y.mean(0) - evaluated[0].double()).abs()
    assert bool((error < 6 * y.std(0) / len(x) ** 0.5).all())
    assert y.std(0).min() > 0.01


def test_the_norms_of_the_base_are_kept_and_forgotten_with_it():
    ours = with_adapter(twins()[0], lora(use_dora=True))
    layer = layers(ours)[0]
    norms = layer.weight_norms_squared
    assert layer.weight_norms_squared is norms
    assert not any("norm" in key for key in layer.state_dict())
    assert_near(norms, layer.base_layer.dequantize().square().sum(1))
    wanted = logits(ours, tokens())

    # Another base, brought by load_state_dict, has other norms.
    other = with_adapter(twins()[0], lora(use_dora=True))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "weight_absmax" in name or "weight_nested" in name:
                parameter.copy_(parameter.roll(1))
    assert not torch.equal(logits(other, tokens()), wanted)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(logits(other, tokens()), wanted)

    # So has one that is loaded into the base alone, or written in place.
    base = layer.base_layer
    stored = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        base.weight.fill_(0x11)
    assert_near(layer.weight_norms_squared, base.dequantize().square().sum(1))
    base.load_state_dict(stored)
    assert torch.equal(layer.weight_norms_squared, norms)

    ours.to(torch.bfloat16).to(torch.float32)
    assert layer.weight_norms_squared.dtype == torch.float32
    assert torch.equal(layer.weight_norms_squared, norms)
    moved = layer.to("meta")
    assert moved.weight_norms_squared.is_meta


def test_both_kinds_of_adapters_live_side_by_side():
    pair = peft_twins(lora(use_dora=True))
    for model in pair:
        add_adapter(model, "plain", lora(r=3))
    assert_same_model(*pair, tokens())
    dora = logits(pair[0], tokens())
    for model in pair:
        model.set_adapter("plain")
    assert_same_model(*pair, tokens())
    set_lora(pair[0], "default")
    assert torch.equal(logits(pair[0], tokens()), dora)

    pair[0].base_model.set_adapter(["default", "plain"])
    with pytest.raises(NotImplementedError, match=r"\['default', 'plain'\] are active"):
        pair[0](input_ids=tokens())


def test_merges_of_several_go_one_after_another_as_peft_s():
    pair = peft_twins(lora(use_dora=True))
    for model in pair:
        add_adapter(model, "plain", lora(r=3))
        add_adapter(model, "second", lora(r=2, use_dora=True), seed=9)
        stretch_magnitudes(model)
        model.merge_adapter(["plain", "default", "second"])
    assert_near(*(logits(model, tokens()) for model in pair))


def test_magnitudes_train_and_the_base_does_not():
    model = with_adapter(
        twins()[0], lora(use_dora=True, init_lora_weights=True, target_modules=["q_proj"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = layers(model)[0].lora_magnitude_vector["default"].weight.detach().clone()
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(layers(model)[0].lora_magnitude_vector["default"].weight, before)


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        linear.weight[5] = 0
    model = with_adapter(
        quantize_model(nn.Sequential(linear), skip=[]),
        lora(use_dora=True, target_modules=["0"], init_lora_weights=True),
    )
    y = model(torch.randn(4, 64))
    y.sum().backward()
    assert not y[:, 5].any()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.merge_adapter(safe_merge=True)
