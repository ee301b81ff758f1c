"""merge_lora of a PeftModel: PEFT's merge, with a report."""

import peft
import pytest
import torch
from peft_models import (
    add_adapter,
    anatomy,
    assert_same_bits,
    assert_untouched,
    base_bits,
    logits,
    lora,
    tokens,
    twins,
    with_adapter,
)
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_native import NF4Linear, merge_lora
from qlora_native.hf.peft import NF4LoraLinear, merge_report


def bfloat16_model(**settings):
    return with_adapter(twins()[0].bfloat16(), lora(**settings))


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def nf4_lora_layers(model: nn.Module) -> dict[str, NF4LoraLinear]:
    base = model.base_model.model
    return {n: m for n, m in base.named_modules() if isinstance(m, NF4LoraLinear)}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_report_is_of_what_pefts_merge_has_made(tmp_path, use_dora):
    model = bfloat16_model(use_dora=use_dora)
    before = logits(model, tokens()).double()
    sums = {
        name: (layer.base_layer.dequantize().double(), layer.merged_weight("default").double())
        for name, layer in nf4_lora_layers(model).items()
    }
    report = merge_lora(model, batch=batch())
    merged = report.model
    assert not any(isinstance(m, NF4Linear | NF4LoraLinear) for m in merged.modules())
    assert (report.into, [layer.name for layer in report.layers]) == ("bfloat16", list(sums))
    for layer in report.layers:
        w, exact = sums[layer.name]
        weight = merged.get_submodule(layer.name).weight.double()
        assert layer.lost_norm == pytest.approx((weight - exact).norm().item(), rel=1e-4)
        assert layer.update_norm == pytest.approx((exact - w).norm().item(), rel=1e-4)
    difference = (logits(merged, tokens()).double() - before).abs().max().item()
    assert report.outputs.max_difference == difference > 0.0
    assert report.outputs.perplexity_before > 1.0
    merged.save_pretrained(tmp_path)
    assert "quant" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(dict(again.state_dict()), dict(merged.state_dict()))


def test_adapters_are_merged_by_name():
    model = bfloat16_model()
    add_adapter(model, "other", lora(r=7, lora_alpha=3, target_modules=["q_proj"]))
    layers = nf4_lora_layers(model)
    name = next(name for name in layers if name.endswith("q_proj"))
    expected = layers[name].merged_weight(["default", "other"]).bfloat16()
    report = merge_lora(model, names=["default", "other"], batch=batch())
    assert torch.equal(report.model.get_submodule(name).weight, expected)
    assert report.outputs.rms_difference < 0.05 * report.outputs.rms_logits


def test_dense_layers_are_measured_too_and_others_are_named():
    model = bfloat16_model(target_modules=["q_proj", "lm_head", "embed_tokens"])
    head = model.base_model.model.lm_head
    exact = head.base_layer.weight.double() + head.get_delta_weight("default").double()
    report = merge_lora(model)
    assert report.layers[-1].name == "lm_head"
    lost = (report.model.lm_head.weight.double() - exact).norm().item()
    assert report.layers[-1].lost_norm == pytest.approx(lost, rel=1e-5)
    assert report.notes == ("merged by PEFT and not measured: model.embed_tokens",)


def test_a_merge_that_fails_at_its_end_leaves_the_model_as_it_was(monkeypatch):
    model = bfloat16_model(target_modules=["q_proj", "lm_head"])
    head = model.base_model.model.lm_head.base_layer.weight.clone()
    bits, shape, wanted = base_bits(model), anatomy(model), logits(model, tokens())

    def fail(*_):
        raise MemoryError("no room for the logits")

    monkeypatch.setattr(merge_report, "compare_outputs", fail)
    with pytest.raises(MemoryError, match="no room"):
        merge_lora(model, batch=batch())
    assert_untouched(model, shape)
    assert_same_bits(base_bits(model), bits)
    assert torch.equal(model.base_model.model.lm_head.base_layer.weight, head)
    assert torch.equal(logits(model, tokens()), wanted)


def test_a_factor_that_is_not_finite_is_named_before_anything_is_changed():
    model = bfloat16_model()
    name, layer = list(nf4_lora_layers(model).items())[3]
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    shape = anatomy(model)
    with pytest.raises(ValueError, match=rf"merge_lora: {name}: lora_B\.default\.weight has a NaN"):
        merge_lora(model)
    assert_untouched(model, shape)


def test_what_pefts_merge_cannot_do_is_refused():
    model = bfloat16_model()
    for options in ({"into": "nf4"}, {"reversible": True}, {"dtype": torch.float16}):
        with pytest.raises(
            ValueError, match=r"merge_lora: the model is a PeftModel.*merge_adapter"
        ):
            merge_lora(model, **options)
    with pytest.raises(ValueError, match="there is no adapter 'third'; there are: 'default'"):
        merge_lora(model, names="third")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged already; unmerge_adapter takes that back"):
        merge_lora(model)
    tuned = peft.get_peft_model(
        twins()[1], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="of PEFT has no merge"):
        merge_lora(tuned)


def test_an_update_of_a_tied_head_is_noted():
    model = twins()[0]
    model.lm_head.weight = model.model.embed_tokens.weight
    model = with_adapter(model, lora(target_modules=["lm_head", "q_proj"]))
    embedding = model.get_input_embeddings().weight.detach().clone()
    report = merge_lora(model)
    assert not torch.equal(report.model.get_input_embeddings().weight, embedding)
    assert report.notes == (
        "lm_head is tied to model.embed_tokens: PEFT merges the update into both",
    )
