"""Checkpoints that are damaged, hostile or of another model: an error that names the tensor."""

import json
import re
import struct

import hf_models
import pytest
import torch
from hf_models import build, nf4_names, saved
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from qlora_native.hf import NF4Config

WEIGHT = "model.layers.1.mlp.up_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.down_proj"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def in_4_bits(folder):
    return load(folder, quantization_config=NF4Config())


def edit(folder, change) -> None:
    """Write the checkpoint of `folder` again after `change` has had its tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def dense(tmp_path):
    hf_models.tiny_llama().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def four_bit(tmp_path):
    saved(hf_models.tiny_llama(), tmp_path / "dense").save_pretrained(tmp_path / "4-bit")
    return tmp_path / "4-bit"


@pytest.fixture
def four_bit_mixture(tmp_path):
    saved(hf_models.tiny_mixtral(), tmp_path / "dense").save_pretrained(tmp_path / "4-bit")
    return tmp_path / "4-bit"


# ---- dense checkpoints


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_with_a_nan_is_named(value, dense):
    edit(dense, lambda tensors: tensors[WEIGHT][3].fill_(value))
    with pytest.raises(ValueError, match=re.escape(f"\n  {WEIGHT}: nf4_quantize: ")) as error:
        in_4_bits(dense)
    assert str(error.value).count("\n") == 1  # and no other weight is
    load(dense)  # transformers itself does not mind


def test_every_weight_that_is_wrong_is_named(dense):
    def change(tensors):
        tensors[WEIGHT][0, 0] = torch.nan
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 32)

    edit(dense, change)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be loaded:") as error:
        in_4_bits(dense)
    assert f"{WEIGHT}: " in str(error.value)
    assert "q_proj.weight: NF4Linear: the dense weight is [64, 32], want [64, 64]" in str(
        error.value
    )


def test_an_expert_with_a_nan_is_named(tmp_path):
    model = hf_models.tiny_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=re.escape(f"{EXPERTS}: down_proj[2]: nf4_quantize: ")):
        saved(model, tmp_path)


def test_an_expert_that_is_missing_is_named(tmp_path):
    hf_models.tiny_mixtral().save_pretrained(tmp_path)
    edit(
        tmp_path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight")
    )
    with pytest.raises(ValueError, match=re.escape(EXPERTS)) as error:
        in_4_bits(tmp_path)
    assert "the checkpoint has {'.experts.*.w2.weight': 3}, want 4 of each" in str(error.value)
    assert str(error.value).count("\n") == 1


def test_an_expert_of_another_shape_is_named(tmp_path):
    hf_models.tiny_mixtral().save_pretrained(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    with pytest.raises(ValueError, match=re.escape("down_proj[2] is [64, 64], want [64, 128]")):
        in_4_bits(tmp_path)


def test_a_dtype_that_has_no_4_bit_form_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"q_proj.weight: nf4_quantize: w is torch.float64, want"):
        saved(hf_models.tiny_llama(torch.float64), tmp_path)


def test_a_weight_that_is_missing_is_named(dense):
    edit(dense, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(ValueError, match=re.escape(f"{WEIGHT}: is not in the checkpoint")):
        in_4_bits(dense)


def test_a_layer_that_the_checkpoint_never_had_is_named(tmp_path):
    """It would start at random, which no 4-bit layer can: it has to be skipped, and is trained."""
    config = BertConfig(**hf_models.SIZES, num_attention_heads=4)
    build("BertModel", config).save_pretrained(tmp_path)
    name = "cls.predictions.transform.dense"
    with pytest.raises(ValueError, match=re.escape(f"{name}.weight: is not in the checkpoint")):
        AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    skip = ["cls", "embeddings"]
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=NF4Config(skip=skip))
    assert model.get_submodule(name).weight.std() > 0


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    hf_models.tiny_gpt2().save_pretrained(tmp_path)
    config = hf_models.tiny_llama().config
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight: is not in the"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, config=config, quantization_config=NF4Config()
        )


# ---- 4-bit checkpoints


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (WEIGHT, torch.zeros(128, 16, dtype=torch.uint8), "is torch.uint8 [128, 16], want "),
        (WEIGHT, torch.zeros(64, 128, dtype=torch.uint8), "is torch.uint8 [64, 128], want "),
        (WEIGHT, torch.zeros(128, 64), "is torch.float32 [128, 64], want torch.uint8 [128, 32]"),
        (WEIGHT, torch.zeros(128, 32), "is torch.float32 [128, 32], want torch.uint8 [128, 32]"),
        (WEIGHT, torch.zeros(128, 32, dtype=torch.int8), "is torch.int8 [128, 32], want "),
        (WEIGHT, None, "is not in the checkpoint"),
        (f"{WEIGHT}_absmax", torch.zeros(64, dtype=torch.uint8), "is torch.uint8 [64], want "),
        (f"{WEIGHT}_absmax", torch.zeros(128, 4, dtype=torch.uint8), "want torch.uint8 [128]"),
        (
            f"{WEIGHT}_nested_absmax",
            torch.zeros(1),
            "is torch.float32 [1], want torch.uint8 [1, 4]",
        ),
        (f"{WEIGHT}_nested_absmax", None, "is not in the checkpoint"),
        (f"{WEIGHT}_nested_offset", torch.zeros(3, dtype=torch.uint8), "[3], want"),
        (f"{WEIGHT}_nested_offset", None, "is not in the checkpoint"),
    ],
)
def test_a_tensor_of_a_4_bit_layer_that_does_not_fit_is_named(name, tensor, message, four_bit):
    def change(tensors):
        tensors.pop(name) if tensor is None else tensors.update({name: tensor})

    edit(four_bit, change)
    with pytest.raises(ValueError, match=re.escape(f"\n  {name}: ")) as error:
        load(four_bit)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 1


def test_codes_without_scales_are_named(four_bit):
    edit(four_bit, lambda tensors: tensors.pop(f"{WEIGHT}_absmax"))
    with pytest.raises(ValueError, match=re.escape(f"{WEIGHT}_absmax: is not in the checkpoint")):
        load(four_bit)


@pytest.mark.parametrize("suffix", ["", "_absmax", "_nested_absmax", "_nested_offset"])
def test_a_tensor_of_4_bit_experts_that_does_not_fit_is_named(suffix, four_bit_mixture):
    name = EXPERTS + suffix
    edit(four_bit_mixture, lambda tensors: tensors.update({name: tensors[name][1:]}))
    with pytest.raises(ValueError, match=re.escape(f"\n  {name}: is torch.uint8 [3")):
        load(four_bit_mixture)


def test_a_scale_that_is_no_number_is_named(four_bit):
    nan = torch.tensor([torch.nan]).view(torch.uint8)
    name = f"{WEIGHT}_nested_offset"
    edit(four_bit, lambda tensors: tensors.update({name: nan}))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: has a scale that is NaN"):
        load(four_bit)


def test_a_scale_of_an_expert_that_is_no_number_is_named(four_bit_mixture):
    inf = torch.tensor([torch.inf]).view(torch.uint8)
    name = f"{EXPERTS}_nested_absmax"
    edit(four_bit_mixture, lambda tensors: tensors[name][3, 0].copy_(inf))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: has a scale that is NaN"):
        load(four_bit_mixture)


def test_codes_in_place_of_another_tensor_are_named(four_bit):
    name = "model.layers.0.input_layernorm.weight"
    codes = torch.ones(64, dtype=torch.uint8)
    edit(four_bit, lambda tensors: tensors.update({name: codes}))
    with pytest.raises(ValueError, match=re.escape(f"{name}: is torch.uint8 [64], want a float")):
        load(four_bit)


def test_another_block_size_than_the_files_is_refused(four_bit):
    config = json.loads((four_bit / "config.json").read_text())
    config["quantization_config"]["block_size"] = 128
    (four_bit / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"q_proj\.weight_absmax: is torch\.uint8 \[64\], want"):
        load(four_bit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 10**30}, "block_size is 1000"),
        ({"compute_dtype": "load"}, "compute_dtype is 'load'"),
        ({"skip": {"a": 1}}, "skip is {'a': 1}"),
        ({"new": 1}, "the configuration has 'new'"),
    ],
)
def test_a_hostile_configuration_is_refused(settings, message, four_bit):
    config = json.loads((four_bit / "config.json").read_text())
    config["quantization_config"] |= settings
    (four_bit / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(four_bit)


def test_a_4_bit_checkpoint_without_4_bit_layers_is_refused(dense):
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = NF4Config().to_dict()
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no layer to hold in 4 bits, by what its check"):
        load(dense)


# ---- damaged files


@pytest.mark.parametrize("which", ["dense", "four_bit"])
def test_a_truncated_file_is_refused_with_the_tensor_that_is_cut_off(which, request):
    folder = request.getfixturevalue(which)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:start])
    begin, end = header[WEIGHT]["data_offsets"]
    file.write_bytes(whole[: start + (begin + end) // 2])
    options = {} if which == "four_bit" else {"quantization_config": NF4Config()}
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        load(folder, **options)
    assert "is no whole safetensors file" in str(error.value)
    assert f"{WEIGHT!r} ends beyond the file" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 9) + b'{"a":[1]}',
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, dense):
    (dense / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        in_4_bits(dense)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 100]},
        {"dtype": "F32", "shape": [64, 64], "data_offsets": [100, 0]},
        {"dtype": "F32", "shape": [64, 64], "data_offsets": [2**60, 2**60 + 16384]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16384]},
        {"dtype": "F32", "shape": [-1, 64], "data_offsets": [0, 16384]},
        {"dtype": "F9", "shape": [64, 64], "data_offsets": [0, 16384]},
    ],
)
def test_a_hostile_header_is_refused(tensor, dense):
    header = json.dumps({"model.norm.weight": tensor}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(16384)
    (dense / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        in_4_bits(dense)


def test_a_model_that_was_refused_leaves_the_next_alone(dense, tmp_path):
    with pytest.raises(ValueError, match="matches no module"):
        load(dense, quantization_config=NF4Config(skip=["nowhere"]))
    assert torch.get_default_dtype() == torch.float32
    assert nf4_names(in_4_bits(dense))
    assert AutoModel.from_pretrained(dense).device.type == "cpu"
