"""4-bit checkpoints: written, read again bit for bit, and taken back to dense ones."""

import copy
import json
import pickle

import hf_models
import pytest
import torch
from hf_models import nf4_names, saved
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from qlora_native import NF4Linear, add_lora, merge_lora, quantize_model
from qlora_native.hf import NF4Config
from support import run_python, same_bits, state_bits

KINDS = ("llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "t5", "bert", "llava")


@pytest.fixture
def no_quantising(monkeypatch):
    """Inside, quantising anything is an error."""

    def quantize(*_):
        raise AssertionError("a weight was quantised")

    monkeypatch.setattr("qlora_native.ops.quantize", quantize)
    monkeypatch.setattr("qlora_native.ops.codec.quantize", quantize)


def in_4_bits(kind: str, folder, dtype: torch.dtype = torch.bfloat16, **settings):
    return saved(getattr(hf_models, f"tiny_{kind}")(dtype), folder, **settings)


def keys(folder) -> set[str]:
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


@pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_with_equal_bits(kind, double_quant, max_shard_size, tmp_path, request):
    model = in_4_bits(kind, tmp_path / "dense", double_quant=double_quant)
    model.save_pretrained(tmp_path / "4-bit", max_shard_size=max_shard_size)
    files = list((tmp_path / "4-bit").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size != "10GB")
    request.getfixturevalue("no_quantising")
    loaded, info = type(model).from_pretrained(tmp_path / "4-bit", output_loading_info=True)
    assert not any(info.values())
    assert nf4_names(loaded) == nf4_names(model)
    assert state_bits(loaded) == state_bits(model)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.quantization_config == NF4Config(double_quant=double_quant)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    loaded.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "4-bit")


def test_the_fixture_would_see_a_weight_that_is_quantised(tmp_path, no_quantising):
    with pytest.raises((AssertionError, RuntimeError)):
        in_4_bits("llama", tmp_path)


def test_what_the_files_hold(tmp_path):
    in_4_bits("mixtral", tmp_path / "dense").save_pretrained(tmp_path / "4-bit")
    prefix = "model.layers.0.mlp.experts.down_proj"
    experts = {name for name in keys(tmp_path / "4-bit") if name.startswith(prefix)}
    scales = ("_absmax", "_nested_absmax", "_nested_offset")
    assert experts == {prefix, *(prefix + scale for scale in scales)}
    config = json.loads((tmp_path / "4-bit" / "config.json").read_text())
    assert config["quantization_config"] == NF4Config().to_dict()
    with safe_open(tmp_path / "4-bit" / "model.safetensors", framework="pt") as opened:
        assert opened.get_tensor(prefix).shape == (4, 64, 64)
        assert opened.get_tensor("model.layers.1.self_attn.q_proj.weight").dtype == torch.uint8


def test_the_file_says_which_layers_are_4_bit(tmp_path):
    """Whatever the class that loads it would have left dense."""
    model = in_4_bits("bert", tmp_path / "dense")
    assert "bert.pooler.dense" in nf4_names(model)
    model.save_pretrained(tmp_path / "4-bit")
    bare = AutoModel.from_pretrained(tmp_path / "4-bit")
    assert nf4_names(bare) == [name.removeprefix("bert.") for name in nf4_names(model)]

    model = in_4_bits("llama", tmp_path / "llama", skip=["lm_head", "mlp"])
    model.save_pretrained(tmp_path / "4-bit llama")
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto_class.from_pretrained(tmp_path / "4-bit llama")
        names = {name.removeprefix("model.") for name in nf4_names(loaded)}
        assert names == {name.removeprefix("model.") for name in nf4_names(model)}


def test_a_state_dict_in_place_of_files(tmp_path):
    model = in_4_bits("llama", tmp_path / "dense")
    config = type(model.config).from_dict(model.config.to_dict())
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert state_bits(loaded) == state_bits(model)


def test_the_settings_of_the_file_win_with_a_warning(tmp_path):
    in_4_bits("llama", tmp_path / "dense", block_size=32).save_pretrained(tmp_path / "4-bit")
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "4-bit", quantization_config=NF4Config(block_size=128)
        )
    assert loaded.model.layers[0].mlp.up_proj.block_size == 32


def test_a_copy_and_a_pickle_are_whole(tmp_path):
    model = in_4_bits("mixtral", tmp_path / "dense")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert state_bits(other) == state_bits(model)
        assert other.num_parameters() == model.num_parameters()
        assert other.dequantize().num_parameters() == model.num_parameters()
        assert nf4_names(model)


# ---- quantize_model


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_model_of_quantize_model_is_saved_as_a_4_bit_checkpoint(kind, tmp_path):
    model = quantize_model(getattr(hf_models, f"tiny_{kind}")(), block_size=128)
    assert state_bits(model) == state_bits(in_4_bits(kind, tmp_path, torch.float32, block_size=128))
    model.save_pretrained(tmp_path / "4-bit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "4-bit")
    assert state_bits(loaded) == state_bits(model)
    assert loaded.config.quantization_config == NF4Config(block_size=128, skip=["lm_head"])
    assert not nf4_names(model.dequantize())


def test_a_checkpoint_with_native_adapters_is_for_load_state_dict_alone(tmp_path):
    model = add_lora(quantize_model(hf_models.tiny_llama()), r=2)
    with pytest.warns(UserWarning, match=r"save_pretrained: model\.layers\.0.* have an adapter"):
        model.save_pretrained(tmp_path / "4-bit")
    again = add_lora(quantize_model(hf_models.tiny_llama()), r=2)
    again.load_state_dict(load_file(tmp_path / "4-bit" / "model.safetensors"), strict=False)
    assert state_bits(again) == state_bits(model)
    with pytest.raises(ValueError, match=r"no layer to hold in 4 bits|is not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "4-bit")


def test_a_model_with_peft_s_layers_inside_is_not_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = quantize_model(hf_models.tiny_llama())
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"save_pretrained: model\.layers\.0.* have an adapter"):
        model.save_pretrained(tmp_path / "4-bit")


def test_a_merged_model_is_saved(tmp_path):
    model = add_lora(quantize_model(hf_models.tiny_llama()), r=2)
    merge_lora(model)
    model.save_pretrained(tmp_path / "dense")
    assert state_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) == state_bits(model)


def test_trainer_is_told_of_native_adapters():
    model = quantize_model(hf_models.tiny_llama())
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_qat_trainable
    add_lora(model, r=2)
    assert model.hf_quantizer.is_qat_trainable


# ---- dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantised_model_is_a_plain_one(kind, dtype, tmp_path):
    original = getattr(hf_models, f"tiny_{kind}")(dtype)
    model = saved(original, tmp_path / "dense")
    four_bit = copy.deepcopy(model)
    assert model.dequantize() is model
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == {
        n: (type(m), m.training) for n, m in original.named_modules()
    }
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in original.named_parameters()
    }
    for name in nf4_names(four_bit):
        layer, dense = four_bit.get_submodule(name), model.get_submodule(name)
        if isinstance(layer, NF4Linear):
            weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
            assert same_bits(weight.data, layer.dequantize(dtype))
        else:
            for e in range(4):
                weight = dense.down_proj[e]
                weight = weight.T if layer.is_transposed else weight
                part = NF4Linear(layer.weight_shapes["down_proj"][1], weight.shape[0], bias=False)
                part._set_weight(layer.tensors("down_proj", e))
                assert same_bits(weight.data, part.dequantize(dtype))
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        assert not hasattr(model, attribute)
    model.save_pretrained(tmp_path / "plain")
    assert keys(tmp_path / "plain") == keys(tmp_path / "dense")
    settings = (tmp_path / "plain" / "config.json").read_text()
    assert "quant" not in settings
    type(model).from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "dense")
    assert json.loads(settings) == json.loads((tmp_path / "dense" / "config.json").read_text())
    assert state_bits(type(model).from_pretrained(tmp_path / "plain")) == state_bits(model)


def test_plain_transformers_loads_it_without_this_library(tmp_path):
    model = in_4_bits("llama", tmp_path / "dense", torch.float32).dequantize()
    model.save_pretrained(tmp_path / "plain")
    ids = torch.arange(5)[None]
    torch.save(model(ids).logits, tmp_path / "logits.pt")
    done = run_python(f"""
import sys, torch, transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "plain")!r})
assert torch.equal(model(torch.arange(5)[None]).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert not any("qlora" in name for name in sys.modules)
""")
    assert done.returncode == 0, done.stderr


def test_a_4_bit_checkpoint_is_refused_without_this_library(tmp_path):
    in_4_bits("llama", tmp_path / "dense").save_pretrained(tmp_path / "4-bit")
    done = run_python(f"""
import transformers
transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "4-bit")!r})
""")
    assert done.returncode != 0
    assert "qlora_nf4" in done.stderr


def test_dequantising_to_another_dtype_converts_all(tmp_path):
    model = in_4_bits("llama", tmp_path / "dense", torch.float32).dequantize(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_merged_weight_in_place_of_the_dequantised_one(tmp_path):
    model = in_4_bits("gpt2", tmp_path, torch.float32)
    layer = model.transformer.h[0].attn.c_attn
    weight = torch.randn(layer.weight_shape)
    dense = layer.to_dense(torch.bfloat16, weight)
    assert type(dense) is Conv1D
    assert (dense.nx, dense.nf) == (layer.in_features, layer.out_features)
    assert same_bits(dense.weight.data, weight.T.bfloat16().contiguous())
    assert same_bits(dense.bias.data, layer.bias.bfloat16())
    with pytest.raises(ValueError, match=r"NF4Conv1D: the dense weight is \[64, 192\], want"):
        layer.to_dense(torch.bfloat16, weight.T)
    plain = NF4Linear(8, 4)
    assert type(plain.to_dense(torch.float32)) is nn.Linear
