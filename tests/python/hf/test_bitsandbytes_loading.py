"""`from_pretrained` of checkpoints that transformers and bitsandbytes wrote."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from bitsandbytes_checkpoints import WITHOUT_BITSANDBYTES, save_with_bitsandbytes
from hf_models import tiny_gpt2, tiny_llama, tiny_mixtral
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_native import NF4Linear
from qlora_native.hf import NF4Config
from qlora_native.hf.bitsandbytes import loading
from qlora_native.hf.quantizer import NF4HfQuantizer
from support import over_nesting, run_python, same_bits

over_storages = pytest.mark.parametrize(
    "storage", [torch.uint8, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of one model in nested scales, and its dequantised weights."""
    folder = tmp_path_factory.mktemp("bitsandbytes") / "llama"
    return folder, save_with_bitsandbytes(tiny_llama(torch.bfloat16), folder)


@pytest.fixture
def copied(checkpoint, tmp_path):
    """The same, to change."""
    return shutil.copytree(checkpoint[0], tmp_path / "copied")


def load(folder, auto_class=AutoModelForCausalLM, config=None, **settings):
    return auto_class.from_pretrained(folder, quantization_config=config or NF4Config(), **settings)


def nf4_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def assert_has_weights(model, expected):
    """The layers are those that bitsandbytes has in 4 bits, and their weights its bits."""
    layers = nf4_layers(model)
    assert layers.keys() == expected.keys()
    for name, dense in expected.items():
        assert same_bits(layers[name].dequantize(dense.dtype), dense), name


# ---- bit for bit


@over_nesting
@over_storages
def test_weights_are_those_of_bitsandbytes(tmp_path, storage, double_quant):
    model = tiny_llama(torch.bfloat16)
    expected = save_with_bitsandbytes(model, tmp_path / "a", nested=double_quant, storage=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "a")
    assert_has_weights(loaded, expected)
    for name, parameter in loaded.named_parameters():
        if parameter.is_floating_point():  # biases, norms, embeddings, the head
            assert same_bits(parameter.data, model.get_parameter(name).data), name
        else:
            assert not parameter.requires_grad
    assert loaded.config.quantization_config == NF4Config(
        double_quant=double_quant, compute_dtype=torch.float32
    )


@over_nesting
@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_any_block_size(tmp_path, block_size, double_quant):
    model = tiny_llama(hidden_size=256, intermediate_size=512, attention_bias=False)
    expected = save_with_bitsandbytes(
        model, tmp_path / "a", nested=double_quant, block_size=block_size
    )
    loaded = load(tmp_path / "a")
    assert_has_weights(loaded, expected)
    assert loaded.config.quantization_config.block_size == block_size
    assert {layer.block_size for layer in nf4_layers(loaded).values()} == {block_size}


def test_shards_whose_border_is_within_a_layer(tmp_path):
    expected = save_with_bitsandbytes(
        tiny_llama(torch.bfloat16), tmp_path / "a", max_shard_size="10KB"
    )
    files = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {name: files[f"{name}.weight"] for name in expected}
    assert any(
        files[f"{name}.weight.quant_state.bitsandbytes__nf4"] != file
        for name, file in parts.items()
    )
    assert_has_weights(load(tmp_path / "a"), expected)


def test_logits_are_those_of_the_dequantised_model(checkpoint):
    folder, expected = checkpoint
    loaded = load(folder, config=NF4Config(compute_dtype=torch.bfloat16)).train()
    dense = tiny_llama(torch.bfloat16).train()
    for name, weight in expected.items():
        dense.get_submodule(name).weight.data = weight
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(
        loaded(tokens).logits, dense(tokens).logits, rtol=2.0**-7, atol=2.0**-7
    )


def test_layers_that_are_offloaded_to_the_disk(checkpoint, tmp_path):
    folder, _ = checkpoint
    tokens = torch.arange(24).view(2, 12)
    expected = load(folder)(tokens).logits
    devices = dict.fromkeys(["embed_tokens", "layers.0", "norm", "rotary_emb"], "cpu")
    devices = {f"model.{name}": device for name, device in devices.items()}
    devices |= {"model.layers.1": "disk", "lm_head": "cpu"}
    offloaded = load(folder, device_map=devices, offload_folder=tmp_path / "disk")
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(offloaded(tokens).logits, expected)


def test_a_gpt2_whose_layers_are_transposed(tmp_path):
    model = tiny_gpt2()
    expected = save_with_bitsandbytes(model, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert_has_weights(loaded, expected)
    dense = loaded.dequantize()
    for name, weight in expected.items():
        assert same_bits(dense.get_submodule(name).weight.data, weight.t().contiguous())


def test_layers_that_were_skipped_stay_dense(tmp_path):
    model = tiny_llama()
    skip = ["lm_head", "q_proj", "model.layers.1.mlp"]
    expected = save_with_bitsandbytes(model, tmp_path / "a", llm_int8_skip_modules=skip)
    loaded = load(tmp_path / "a")
    assert_has_weights(loaded, expected)
    assert type(loaded.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert loaded.config.quantization_config.skip == skip


def test_experts_that_bitsandbytes_left_dense_are_named(tmp_path):
    model = tiny_mixtral(torch.bfloat16)
    expected = save_with_bitsandbytes(model, tmp_path / "a")
    assert not any("experts" in name for name in expected)
    with pytest.warns(
        UserWarning, match=r"has the experts dense: model\.layers\.0\.mlp\.experts, "
    ):
        loaded = load(tmp_path / "a")
    assert_has_weights(loaded, expected)
    name = "model.layers.1.mlp.experts.down_proj"
    assert same_bits(loaded.get_parameter(name).data, model.get_parameter(name).data)


# ---- other classes than the one that was saved


def test_the_bare_model_and_a_classifier(checkpoint):
    folder, expected = checkpoint
    bare = {name.removeprefix("model."): weight for name, weight in expected.items()}
    assert_has_weights(load(folder, AutoModel), bare)
    classifier = load(folder, AutoModelForSequenceClassification, num_labels=3)
    assert_has_weights(classifier, expected)
    assert type(classifier.score) is torch.nn.Linear
    assert classifier.score.weight.requires_grad


def test_a_bare_model_in_a_class_with_a_head(tmp_path):
    expected = save_with_bitsandbytes(tiny_llama().model, tmp_path / "a")
    assert_has_weights(load(tmp_path / "a"), {f"model.{n}": w for n, w in expected.items()})


def test_a_model_whose_checkpoints_have_other_names_than_its_modules(tmp_path):
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**text, **heads}).to_dict(),
        text_config=transformers.LlamaConfig(**text, num_attention_heads=4).to_dict(),
        image_token_id=95,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    expected = save_with_bitsandbytes(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight.absmax" in stored
    assert "model.language_model.layers.0.mlp.up_proj" in expected
    loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "a", quantization_config=NF4Config(), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_has_weights(loaded, expected)


# ---- dtypes and settings


def test_the_compute_dtype_is_the_checkpoints_unless_one_is_given(tmp_path):
    save_with_bitsandbytes(tiny_llama(), tmp_path / "a", bnb_4bit_compute_dtype=torch.bfloat16)
    for given, expected in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        loaded = load(tmp_path / "a", config=NF4Config(compute_dtype=given))
        assert {layer.compute_dtype for layer in nf4_layers(loaded).values()} == {expected}


def test_dense_weights_are_cast_and_4_bit_ones_are_not(checkpoint):
    folder, expected = checkpoint
    loaded = load(folder, dtype=torch.float16)
    assert_has_weights(loaded, expected)
    dtypes = {p.dtype for p in loaded.parameters() if p.is_floating_point()}
    assert dtypes == {torch.float16}


@pytest.mark.parametrize(
    ("setting", "value", "stored"),
    [("block_size", 128, "64"), ("double_quant", False, "True"), ("skip", ["q_proj"], "None")],
)
def test_a_setting_that_the_checkpoint_contradicts_is_warned_of(checkpoint, setting, value, stored):
    folder, expected = checkpoint
    with pytest.warns(UserWarning, match=rf"NF4Config has {setting}=.*{setting}={stored}: that"):
        loaded = load(folder, config=NF4Config(**{setting: value}))
    assert_has_weights(loaded, expected)


# ---- the model afterwards


def test_it_is_saved_as_one_of_ours_and_has_no_trace_of_bitsandbytes(checkpoint, tmp_path):
    folder, expected = checkpoint
    loaded = load(folder)
    assert isinstance(loaded.hf_quantizer, NF4HfQuantizer)
    assert loaded.hf_quantizer.get_weight_conversions() == []  # as for an adapter
    assert loaded.quantization_method == NF4Config().quant_method
    loaded.save_pretrained(tmp_path / "ours")
    assert "bitsandbytes" not in (tmp_path / "ours" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_has_weights(again, expected)
    for name, parameter in loaded.named_parameters():
        assert same_bits(again.get_parameter(name).data, parameter.data)


def test_it_dequantises_to_a_model_that_is_saved_as_any_other(checkpoint, tmp_path):
    folder, expected = checkpoint
    dense = load(folder).dequantize()
    assert not hasattr(dense.config, "quantization_config")
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, weight in expected.items():
        assert same_bits(dense.get_submodule(name).weight.data, weight)
        assert same_bits(again.get_submodule(name).weight.data, weight)


# ---- with and without bitsandbytes


def test_plain_from_pretrained_stays_bitsandbytes_where_it_is_installed(checkpoint):
    import bitsandbytes as bnb

    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert not nf4_layers(model)


LOAD_AND_STORE = """
import qlora_native.hf
from qlora_native import NF4Linear
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}{settings})
layers = [(n, m) for n, m in model.named_modules() if isinstance(m, NF4Linear)]
save_file({{name: layer.dequantize(model.dtype) for name, layer in layers}}, {to!r})
assert sys.modules["bitsandbytes"] is None
"""


@pytest.mark.parametrize(
    "settings", ["", ", quantization_config=qlora_native.hf.NF4Config()"], ids=["plain", "config"]
)
def test_it_loads_without_bitsandbytes(checkpoint, tmp_path, settings):
    folder, expected = checkpoint
    to = str(tmp_path / "dense.safetensors")
    code = LOAD_AND_STORE.format(folder=str(folder), settings=settings, to=to)
    done = run_python(WITHOUT_BITSANDBYTES + code)
    assert done.returncode == 0, done.stderr
    found = load_file(to)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], weight) for name, weight in expected.items())


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "'fp4', want 'nf4'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, r"LLM.int8\(\)"),
    ],
    ids=["fp4", "int8"],
)
def test_fp4_and_int8_are_refused_by_name(copied, changes, kind):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= changes
    config["quantization_config"] |= {f"_{k}": v for k, v in changes.items() if k[:4] == "load"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match=kind):
        load(copied)


def test_an_fp4_checkpoint_is_refused_without_bitsandbytes(tmp_path):
    save_with_bitsandbytes(tiny_llama(), tmp_path / "a", quant_type="fp4")
    code = (
        "import qlora_native.hf, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'a')!r})\n"
    )
    done = run_python(WITHOUT_BITSANDBYTES + code)
    assert "NotImplementedError" in done.stderr
    assert "'fp4', want 'nf4'" in done.stderr


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight.quant_map"), "has .* want .*quant_map"),
        (lambda t: t.pop(f"{LAYER}.weight"), "has .* want .*'weight'"),
        (lambda t: t[f"{LAYER}.weight.nested_absmax"].fill_(torch.nan), "has a NaN or Inf"),
        (lambda t: t[f"{LAYER}.weight.quant_map"].neg_(), "is not the NF4 levels"),
        (
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:9].clone()}),
            r"is torch.uint8 \[9, 1\], want torch.uint8 \[4096, 1\]",
        ),
        (
            lambda t: t.update(
                {
                    f"{LAYER}.weight{part}": t[f"model.layers.0.mlp.down_proj.weight{part}"].clone()
                    for part in ("", ".absmax", ".quant_state.bitsandbytes__nf4")
                }
            ),
            r"is of a layer \[64, 128\], want \[128, 64\]",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{LAYER}.weight.")],
            r"is torch.uint8 \[4096, 1\], want a float: no scales",
        ),
    ],
)
def test_a_layer_that_is_damaged_is_named(copied, edit, message):
    change(copied, edit)
    with pytest.raises(ValueError, match=rf"(?s){LAYER}.*{message}"):
        load(copied)


def test_a_truncated_file_is_named(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(copied)


def test_layers_of_different_kinds_are_refused(checkpoint, tmp_path, copied):
    save_with_bitsandbytes(tiny_llama(torch.bfloat16), tmp_path / "a", nested=False)
    plain = load_file(tmp_path / "a" / "model.safetensors")

    def mix(tensors):
        for name in [name for name in tensors if name.startswith(f"{LAYER}.")]:
            del tensors[name]
        tensors.update({n: t for n, t in plain.items() if n.startswith(f"{LAYER}.")})

    change(copied, mix)
    with pytest.raises(ValueError, match=rf"layers differ: .*{LAYER} has blocks of 64 and plain"):
        load(copied)


# ---- stepping in


def test_another_signature_of_transformers_is_an_error(monkeypatch):
    def merge_quantization_configs(cls, config):
        return config

    monkeypatch.setattr(
        AutoHfQuantizer, "merge_quantization_configs", classmethod(merge_quantization_configs)
    )
    with pytest.raises(ImportError, match=r"merge_quantization_configs takes \(config\), want"):
        loading.install()


def test_stepping_in_twice_is_once():
    before = AutoHfQuantizer.__dict__["merge_quantization_configs"]
    loading.install()
    assert AutoHfQuantizer.__dict__["merge_quantization_configs"] is before
