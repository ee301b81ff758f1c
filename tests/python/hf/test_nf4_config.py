"""NF4Config: its settings, what it refuses, and its way through JSON."""

import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from qlora_native.hf import NF4Config
from qlora_native.hf.quantizer import NF4HfQuantizer

SETTINGS = [
    {},
    {"block_size": 256},
    {"double_quant": False},
    {"compute_dtype": torch.bfloat16},
    {"skip": []},
    {"block_size": 32, "compute_dtype": torch.float16, "skip": ["lm_head", "layers.0"]},
]


def test_the_defaults():
    config = NF4Config()
    assert (config.block_size, config.double_quant) == (64, True)
    assert (config.compute_dtype, config.skip) == (None, None)
    assert config.quant_method == "qlora_nf4"


@pytest.mark.parametrize("settings", SETTINGS)
def test_json_and_back(settings):
    config = NF4Config(**settings)
    text = json.dumps(config.to_dict())
    assert AutoQuantizationConfig.from_dict(json.loads(text)) == config
    assert json.loads(config.to_json_string()) == json.loads(text)
    for name, value in settings.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("settings", SETTINGS[1:])
def test_configurations_that_differ_are_not_equal(settings):
    assert NF4Config(**settings) != NF4Config()


def test_a_model_configuration_keeps_it(tmp_path):
    config = LlamaConfig(quantization_config=NF4Config(compute_dtype=torch.bfloat16, skip=["x"]))
    config.save_pretrained(tmp_path)
    loaded = LlamaConfig.from_pretrained(tmp_path).quantization_config
    assert loaded == {
        "quant_method": "qlora_nf4",
        "block_size": 64,
        "double_quant": True,
        "compute_dtype": "bfloat16",
        "skip": ["x"],
    }
    quantizer = AutoHfQuantizer.from_config(loaded)
    assert isinstance(quantizer, NF4HfQuantizer)
    assert quantizer.quantization_config == NF4Config(compute_dtype=torch.bfloat16, skip=["x"])


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(name):
    assert NF4Config(compute_dtype=name).compute_dtype is torch.bfloat16


def test_names_may_come_in_a_tuple_and_are_copied():
    names = ["lm_head"]
    config = NF4Config(skip=names)
    names.append("x")
    assert config.skip == ["lm_head"]
    assert NF4Config(skip=("a", "b")).skip == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 48}, "NF4Config: block_size is 48, want one of"),
        ({"block_size": "64"}, "block_size is 64"),
        ({"block_size": True}, "block_size is True"),
        ({"double_quant": 1}, "double_quant is 1, want a bool"),
        ({"compute_dtype": torch.float64}, "compute_dtype is torch.float64, want float32,"),
        ({"compute_dtype": "half "}, "compute_dtype is 'half '"),
        ({"compute_dtype": "nn"}, "compute_dtype is 'nn'"),
        ({"skip": "lm_head"}, "skip is 'lm_head', want a list of names or None"),
        ({"skip": ["lm_head", 3]}, "skip is .*, want a list of names"),
        ({"skip": 3}, "skip is 3, want a list of names"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NF4Config(**settings)
    with pytest.raises(ValueError, match=message):
        NF4Config.from_dict(settings)


def test_an_unknown_key_is_refused_by_name():
    saved = NF4Config().to_dict()
    with pytest.raises(ValueError, match=r"the configuration has 'rotation', 'seed', want only"):
        NF4Config.from_dict({**saved, "rotation": "hadamard", "seed": 1})
    with pytest.raises(ValueError, match="quant_method is 'fp8', want 'qlora_nf4'"):
        NF4Config.from_dict({**saved, "quant_method": "fp8"})


def test_keywords_replace_settings_and_the_rest_is_handed_back():
    config, rest = NF4Config.from_dict(
        {"block_size": 32}, return_unused_kwargs=True, block_size=128, device_map="auto"
    )
    assert config == NF4Config(block_size=128)
    assert rest == {"device_map": "auto"}
    with pytest.raises(ValueError, match="block_size is 3"):
        NF4Config.from_dict({}, block_size=3)
