"""A merged model of transformers: dense, without a trace of the quantiser, saved and loaded."""

import json
import sys

import pytest
import torch
from hf_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2_moe, tiny_t5
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from qlora_native import (
    LoRALinear,
    NF4Linear,
    add_lora,
    merge_lora,
    quantize_model,
    unmerge_lora,
)
from qlora_native.hf import NF4Config
from qlora_native.hf.dense import forget_quantization
from qlora_native.nn import NF4Experts
from support import same_bits, state_bits

TOKENS = torch.arange(1, 21).view(2, 10)
BATCH = {"input_ids": TOKENS}
MAKERS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
    "qwen2_moe": tiny_qwen2_moe,
    "t5": tiny_t5,
}
# Some of the 4-bit layers, so that others have no update.
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "qwen2_moe": ["q_proj", "v_proj"],
    "t5": ["q", "v", "wi"],
}


def loaded_in_4_bits(folder, model: nn.Module, saved_in_4_bits: bool = False) -> nn.Module:
    auto = AutoModelForSeq2SeqLM if hasattr(model, "decoder") else AutoModelForCausalLM
    model.save_pretrained(folder / "original")
    loaded = auto.from_pretrained(folder / "original", quantization_config=NF4Config())
    if saved_in_4_bits:
        loaded.save_pretrained(folder / "4-bit")
        loaded = auto.from_pretrained(folder / "4-bit")
    return loaded


def with_lora(model: nn.Module, **options) -> nn.Module:
    add_lora(model, **{"r": 4, **options})
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.02)
    return model


def traces(model: nn.Module) -> set[str]:
    """Whatever has quantisation in its name, of the model's parts, configs, and their JSON."""
    owners = list(model.modules())
    owners += [m.config for m in owners if hasattr(m, "config")]
    names = {name for owner in owners for name in vars(owner) if "quant" in name}
    return names | {"JSON"} if "quant" in json.dumps(model.config.to_dict(), default=str) else names


@pytest.mark.parametrize("saved_in_4_bits", [False, True], ids=["quantised", "4-bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_merged_model_is_a_plain_one(kind, dtype, saved_in_4_bits, tmp_path):
    original = MAKERS[kind](dtype)
    model = loaded_in_4_bits(tmp_path, original, saved_in_4_bits)
    with_lora(model, target_modules=TARGETS[kind])
    assert traces(model)
    batch = {**BATCH, "labels": TOKENS} if kind == "t5" else BATCH
    report = merge_lora(model, batch=batch)
    assert traces(model) == set()
    assert not any(isinstance(m, NF4Linear | NF4Experts | LoRALinear) for m in model.modules())
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in original.named_modules()
    }
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in original.named_parameters()
    }
    limit = 1e-4 if dtype == torch.float32 else 0.2
    assert report.outputs.max_difference < limit * report.outputs.rms_logits
    assert report.outputs.perplexity_after == pytest.approx(
        report.outputs.perplexity_before, rel=limit / 2
    )
    model.save_pretrained(tmp_path / "merged")
    again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert state_bits(again) == state_bits(model)
    files = (tmp_path / folder / "model.safetensors" for folder in ("original", "merged"))
    names = [set(load_file(file)) for file in files]
    assert names[0] == names[1]
    assert again.dtype == again.config.dtype == dtype
    settings = [
        json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("original", "merged")
    ]
    assert settings[0] == settings[1]


def test_a_merged_model_can_be_quantised_and_trained_again(tmp_path):
    model = with_lora(loaded_in_4_bits(tmp_path, tiny_llama()))
    merge_lora(model)
    quantize_model(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert state_bits(again) == state_bits(model)
    assert merge_lora(with_lora(again)).layers


def test_a_merge_that_is_held_or_fails_leaves_a_quantised_model(tmp_path):
    model = with_lora(loaded_in_4_bits(tmp_path, tiny_llama()))
    before, stored = traces(model), state_bits(model)
    merge_lora(model, reversible=True)
    assert traces(model) == before
    unmerge_lora(model)
    model.model.layers[1].mlp.up_proj.lora_b.data[0, 0] = 1e38
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the merged weight in"):
        merge_lora(model, torch.float16)
    assert traces(model) == before
    model.model.layers[1].mlp.up_proj.lora_b.data[0, 0] = 0.0
    assert state_bits(model).keys() == stored.keys()


def test_a_model_that_cannot_be_marked_is_left(monkeypatch):
    model = add_lora(quantize_model(tiny_llama()), r=2)
    before = state_bits(model)
    monkeypatch.setitem(sys.modules, "qlora_native.hf.dense", None)
    with pytest.raises(ImportError):
        merge_lora(model)
    assert state_bits(model) == before
    assert model.is_quantized


def test_a_model_merged_into_nf4_is_a_4_bit_checkpoint(tmp_path):
    model = with_lora(loaded_in_4_bits(tmp_path, tiny_llama()))
    with pytest.warns(UserWarning, match="quantising the merged weights again"):
        merge_lora(model, into="nf4")
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert any(isinstance(m, NF4Linear) for m in again.modules())
    assert state_bits(again) == state_bits(model)


def test_a_head_that_was_tied_is_saved_with_its_update(tmp_path):
    model = loaded_in_4_bits(tmp_path, tiny_llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with_lora(model, target_modules=["lm_head", "q_proj"])
    embedding = model.model.embed_tokens.weight.clone()
    report = merge_lora(model, batch=BATCH)
    assert "no longer tied" in report.notes[0]
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_bits(again.model.embed_tokens.weight, embedding)
    assert same_bits(again.lm_head.weight, model.lm_head.weight)
    assert not same_bits(again.lm_head.weight, embedding)


def test_a_head_that_stays_tied_is_saved_once(tmp_path):
    model = with_lora(loaded_in_4_bits(tmp_path, tiny_llama(tie_word_embeddings=True)))
    merge_lora(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_part_of_a_larger_module_forgets_too(tmp_path):
    holder = nn.ModuleDict({"policy": with_lora(loaded_in_4_bits(tmp_path, tiny_llama()))})
    merge_lora(holder)
    assert traces(holder["policy"]) == set()


def test_a_plain_model_is_left_as_it_is():
    model = tiny_llama()
    attributes, config = dict(vars(model)), model.config.to_dict()
    assert forget_quantization(model) is model
    assert (dict(vars(model)), model.config.to_dict()) == (attributes, config)
    assert isinstance(forget_quantization(nn.Linear(2, 2)), nn.Linear)
    assert isinstance(model, LlamaForCausalLM)
