"""PEFT on models that `from_pretrained(..., NF4Config())` has quantised, of several kinds."""

import copy

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft_models import (
    assert_near,
    assert_same_model,
    gradients,
    logits,
    lora,
    quietly,
    tiny_llama,
    tokens,
    with_adapter,
)
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_native import NF4Linear
from qlora_native.hf import NF4Config
from qlora_native.hf.peft import NF4LoraLinear

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 48}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 48}


def saved(model: nn.Module, path) -> str:
    model.save_pretrained(path)
    return str(path)


def loaded_twins(path: str, model_class=AutoModelForCausalLM) -> tuple[nn.Module, nn.Module]:
    """(the model on NF4, the dense one that it stands for), in evaluation mode."""
    nf4 = quietly(model_class.from_pretrained, path, quantization_config=NF4Config())
    dense = copy.deepcopy(nf4).dequantize()
    assert any(isinstance(m, NF4Linear) for m in nf4.modules())
    assert not any(isinstance(m, NF4Linear) for m in dense.modules())
    return nf4.eval(), dense.eval()


def test_the_three_lines_train_save_and_load_again(tmp_path):
    path = saved(tiny_llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert sum(isinstance(m, NF4LoraLinear) for m in model.modules()) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wanted = logits(model.eval(), tokens())
    model.save_pretrained(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, tokens()), wanted)
    auto = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", quantization_config=NF4Config()
    )
    assert torch.equal(logits(auto.eval(), tokens()), wanted)

    # The base as it is in 4 bits, adapters beside it in the file of PEFT.
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())
    four_bit = AutoModelForCausalLM.from_pretrained(saved(base, tmp_path / "nf4"))
    again = PeftModel.from_pretrained(four_bit, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, tokens()), wanted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_and_unload_leaves_no_trace_of_the_quantiser(tmp_path, use_dora):
    path = saved(tiny_llama().bfloat16(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=NF4Config(), dtype=torch.bfloat16
    )
    model = with_adapter(model, lora(target_modules=["q_proj", "up_proj"], use_dora=use_dora))
    wanted = model.base_model.model.model.layers[0].self_attn.q_proj.merged_weight("default")
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, wanted.bfloat16())
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "peft_config"):
        assert name not in vars(merged)
    assert "quantization" not in str(merged.config.to_dict())
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.dtype == torch.bfloat16
    state = again.state_dict()
    for key, tensor in merged.state_dict().items():
        assert torch.equal(state[key], tensor)


def test_gpt2_s_transposed_layers(tmp_path):
    torch.manual_seed(0)
    path = saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), tmp_path / "gpt2")
    for targets in ("all-linear", ["c_attn", "c_proj"], None):
        nf4, dense = loaded_twins(path)
        config = lora(target_modules=targets, fan_in_fan_out=True)
        ours, theirs = with_adapter(nf4, config), with_adapter(dense, config)
        assert ours.peft_config["default"].fan_in_fan_out
        assert_same_model(ours, theirs, tokens())

        ours.eval().save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(loaded_twins(path)[1], tmp_path / "adapter").eval()
        assert_near(logits(again, tokens()), logits(ours, tokens()))
        merged = [model.merge_and_unload() for model in (ours, theirs)]
        assert all(isinstance(layer.attn.c_attn, Conv1D) for layer in merged[0].transformer.h)
        for name, parameter in merged[1].named_parameters():
            if parameter.any():
                assert_near(merged[0].get_parameter(name).detach(), parameter.detach())


def test_t5(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    path = saved(transformers.T5ForConditionalGeneration(config), tmp_path)
    pair = [
        with_adapter(model, lora(task_type="SEQ_2_SEQ_LM"))
        for model in loaded_twins(path, transformers.AutoModelForSeq2SeqLM)
    ]
    mine, wanted = (gradients(model, tokens()) for model in pair)
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient.abs().max() > 0:
            assert_near(mine[name], gradient)


def test_experts_stay_what_they_are_beside_nf4_attention(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, **HEADS, **EXPERTS)
    path = saved(transformers.MixtralForCausalLM(config), tmp_path)
    pair = [with_adapter(model, lora(target_modules=["q_proj"])) for model in loaded_twins(path)]
    assert_same_model(*pair, tokens())


def test_dense_experts_in_target_parameters_are_peft_s_own(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, **HEADS, **EXPERTS)
    path = saved(transformers.MixtralForCausalLM(config), tmp_path)
    nf4, dense = loaded_twins(path)
    experts = nf4.model.layers[0].mlp.experts
    settings = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    if all(p.is_floating_point() for p in experts.parameters()):
        assert_same_model(with_adapter(nf4, settings), with_adapter(dense, settings), tokens())
    else:
        with pytest.raises(NotImplementedError, match="target_parameters names 'down_proj'"):
            with_adapter(nf4, settings)


def test_an_offloaded_model_is_refused(tmp_path):
    base = quietly(
        AutoModelForCausalLM.from_pretrained,
        saved(tiny_llama(), tmp_path / "dense"),
        quantization_config=NF4Config(),
    )
    path = saved(base, tmp_path / "nf4")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = AutoModelForCausalLM.from_pretrained(
        path, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    before = logits(model, tokens())
    with pytest.raises(NotImplementedError, match="offload"):
        get_peft_model(model, lora())
    assert torch.equal(logits(model, tokens()), before)
