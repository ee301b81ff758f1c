"""Adapters go from here to plain PEFT and back, bit for bit."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft_models import (
    add_adapter,
    assert_near,
    assert_same_bits,
    assert_same_model,
    base_bits,
    logits,
    lora,
    tokens,
    twins,
    with_adapter,
)
from safetensors.torch import load_file

from qlora_native.hf.peft import NF4LoraLinear

CONFIGS = {
    "lora": lora(),
    "names": lora(target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias": lora(bias="lora_only"),
    "dense copies": lora(modules_to_save=["lm_head"]),
    "tokens": lora(trainable_token_indices=[3, 7]),
}


def trained(model):
    """Random numbers in place of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_made_here_loads_on_the_dense_twin_and_the_other_way_round(name, tmp_path):
    has_bias = name == "bias"
    for here, there in ((0, 1), (1, 0)):
        source = trained(with_adapter(twins(has_bias)[here], CONFIGS[name])).eval()
        folder = tmp_path / str(here)
        source.save_pretrained(folder)
        target = PeftModel.from_pretrained(twins(has_bias)[there], folder).eval()
        assert_same_bits(get_peft_model_state_dict(source), get_peft_model_state_dict(target))
        assert_near(logits(target, tokens()), logits(source, tokens()))


PLAIN_PEFT = """
    import sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base, adapter, ids = sys.argv[1:4]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(ids)).logits, sys.argv[4])
    model.save_pretrained(sys.argv[5])
    assert not any(name.startswith("qlora_native") for name in sys.modules)
"""


def test_a_process_without_this_library_loads_it_and_writes_the_same_file(tmp_path):
    nf4, dense = twins()
    dense.save_pretrained(tmp_path / "base")
    model = trained(with_adapter(nf4, lora(use_rslora=True))).eval()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens(), tmp_path / "ids")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "ids", "logits", "again")]
    code = textwrap.dedent(PLAIN_PEFT)
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)
    assert_near(torch.load(tmp_path / "logits"), logits(model, tokens()))
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_loading_gives_the_bits_that_were_saved(tmp_path, low_cpu_mem_usage, use_dora):
    source = trained(with_adapter(twins()[0], lora(use_dora=use_dora))).eval()
    source.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(
        twins()[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    ).eval()
    assert_same_bits(dict(get_peft_model_state_dict(model)), saved)
    ours, theirs = logits(model, tokens()), logits(source, tokens())
    if use_dora and low_cpu_mem_usage:
        # The factors lie where the file has them, and MKL chooses a kernel for the products of
        # DoRA's norms by their alignment: the same bits in another order of summation.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(ours, theirs)
    assert any(p.requires_grad for p in model.parameters())


def test_load_adapter_brings_a_second_one_beside_the_first(tmp_path):
    source = trained(with_adapter(twins()[0], lora(r=6, target_modules=["v_proj"]))).eval()
    source.save_pretrained(tmp_path)
    model = with_adapter(twins()[0], lora()).eval()
    bits, first = base_bits(model), logits(model, tokens())
    model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model, tokens()), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens()), logits(source, tokens()))
    assert_same_bits(base_bits(model), bits)
    mixed = logits(model, tokens(), adapter_names=["second", "default", "second"])
    assert_near(mixed[1], first[1])


def test_several_adapters_are_saved_each_in_its_folder(tmp_path):
    model = with_adapter(twins()[0], lora()).eval()
    add_adapter(model, "other", lora(r=2))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(twins()[0], tmp_path).eval()
    again.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        for each in (model, again):
            each.set_adapter(name)
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


# ---- transformers' own add_adapter and load_adapter


def test_a_model_s_own_add_adapter_makes_the_same_layers(tmp_path):
    pair = twins()
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter(copy.deepcopy(lora()))
    assert sum(isinstance(m, NF4LoraLinear) for m in pair[0].modules()) == 14
    assert_same_model(*pair, tokens())
    for model in pair:
        torch.manual_seed(4)
        model.add_adapter(copy.deepcopy(lora(r=2)), adapter_name="other")
        model.set_adapter("other")
    assert_near(*(logits(model, tokens()) for model in pair))
    pair[0].disable_adapters()
    assert torch.equal(logits(pair[0], tokens()), logits(twins()[0], tokens()))


def test_a_model_s_own_load_adapter_reads_what_peft_wrote(tmp_path):
    source = trained(with_adapter(twins()[0], lora())).eval()
    source.save_pretrained(tmp_path)
    model = twins()[0]
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model.eval(), tokens()), logits(source, tokens()))


def test_native_save_and_load_read_and_write_the_same(tmp_path):
    from qlora_native.hf import load_lora

    source = trained(with_adapter(twins()[0], lora())).eval()
    source.save_pretrained(tmp_path)
    native = load_lora(twins()[0], tmp_path).eval()
    assert torch.equal(logits(native, tokens()), logits(source, tokens()))


def test_a_resumed_training_goes_on_with_the_same_bits(tmp_path):
    def step(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        return model

    model = step(with_adapter(twins()[0], lora()))
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(twins()[0], tmp_path, is_trainable=True)
    model.zero_grad()
    assert_same_bits(
        get_peft_model_state_dict(step(model)), get_peft_model_state_dict(step(resumed))
    )
