"""NF4HfQuantizer: its answers to the loader's questions, where no loading is needed to ask."""

import os
import subprocess
import sys

import hf_models
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hf_models import saved
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_native import NF4Linear, _core, add_lora, quantize_model
from qlora_native.hf import NF4Config, parameter_count
from qlora_native.hf.layers import put_nf4_layers
from qlora_native.hf.quantizer import NF4HfQuantizer
from support import assert_near, run_python, same_bits, state_bits


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("backend", [True, False])
def test_without_a_device_map_the_model_goes_to_the_gpu_if_it_can(gpu, backend, monkeypatch):
    monkeypatch.setattr(_core, "build_info", lambda: {"cuda": backend})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    quantizer = NF4HfQuantizer(NF4Config(), pre_quantized=False)
    assert quantizer.update_device_map(None) == ({"": 3} if gpu and backend else None)
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}
    assert quantizer.update_device_map("auto") == "auto"


def test_memory_is_left_for_the_dense_weight():
    quantizer = NF4HfQuantizer(NF4Config(), pre_quantized=False)
    assert quantizer.adjust_max_memory({0: 1000, "cpu": 500}) == {0: 900, "cpu": 450}


def test_the_size_of_4_bit_parameters_is_that_of_their_bytes():
    """What `device_map="auto"` and the allocator's warm-up count by: no estimate is needed."""
    model = quantize_model(hf_models.tiny_mixtral())
    sizes = [
        parameter.numel() * model.hf_quantizer.param_element_size(model, name, parameter)
        for name, parameter in model.named_parameters()
    ]
    assert sum(sizes) == sum(parameter.nbytes for parameter in model.parameters())


def test_hooks_of_accelerate_move_to_the_dense_layers(tmp_path):
    model = saved(hf_models.tiny_llama(), tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    hook = AlignDevicesHook("cpu", io_same_device=True)
    add_hook_to_module(layer, hook)
    expected = model(torch.arange(4)[None]).logits
    model.dequantize()
    assert model.model.layers[0].mlp.up_proj._hf_hook is hook
    torch.testing.assert_close(model(torch.arange(4)[None]).logits, expected)


def test_no_trace_is_left_in_memory_either(tmp_path):
    model = saved(hf_models.tiny_llama(), tmp_path)
    before = {key for key in vars(model.config) if "quant" in key}
    assert before == {"quantization_config", "_is_quantized"}
    model.dequantize()
    assert not [key for key in vars(model.config) if "quant" in key]
    assert model.float().dtype == torch.float32  # which a quantised model refuses
    with pytest.raises(ValueError, match="first quantize your model"):
        model.dequantize()


def test_a_base_beside_adapters_stays_frozen(tmp_path):
    model = add_lora(saved(hf_models.tiny_llama(), tmp_path), r=2)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ids = torch.arange(4)[None]
    expected = model(ids).logits
    model.dequantize()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert_near(model(ids).logits, expected)


def test_a_layer_with_two_names_stays_one_layer():
    with torch.device("meta"):
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    asked = []
    assert not put_nf4_layers(model, NF4Config(), lambda names: bool(asked.append(names)))
    assert asked == [["a", "b.c"]]
    placed = put_nf4_layers(model, NF4Config(), lambda names: True)
    assert list(placed) == ["a"]
    assert model["a"] is model["b"]["c"] is placed["a"]


def test_a_pickled_checkpoint_is_quantised_as_well(tmp_path):
    """`pytorch_model.bin`: transformers reads it as a whole, but the weights come out the same."""
    model = hf_models.tiny_llama()
    expected = state_bits(saved(model, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    assert state_bits(loaded) == expected


def test_half_precision_keeps_what_transformers_keeps_in_fp32(tmp_path):
    model = hf_models.tiny_t5()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.float16, quantization_config=NF4Config()
    )
    wo = loaded.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32
    assert same_bits(wo.weight, model.encoder.block[0].layer[1].DenseReluDense.wo.weight)
    ids = torch.arange(3, 9)[None]
    assert loaded(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_quantize_model_keeps_what_transformers_keeps_in_fp32():
    model = quantize_model(hf_models.tiny_t5(torch.bfloat16))
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert type(feed_forward.wo) is nn.Linear
    assert type(feed_forward.wi) is NF4Linear
    ids = torch.arange(3, 9)[None]
    assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_generation(tmp_path):
    model = saved(hf_models.tiny_llama(), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    tokens = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    dense = model.dequantize()
    assert torch.equal(
        tokens, dense.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    )


def test_another_num_parameters_is_refused(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda self, only_trainable=False: 0)
    with pytest.raises(ImportError, match=r"num_parameters has the parameters \['self', 'only_tr"):
        parameter_count.install()


def test_counting_is_taught_once():
    model = quantize_model(hf_models.tiny_llama())
    expected = model.num_parameters()
    parameter_count.install()
    assert model.num_parameters() == expected


def test_an_older_transformers_has_models_to_quantise(tmp_path):
    """They are not marked: it could not load what they save."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(
        "import torch\nclass PreTrainedModel(torch.nn.Sequential): pass\n"
    )
    done = run_python(
        """
import sys, torch, transformers
sys.modules["peft"] = None
from qlora_native import NF4Linear, quantize_model
model = transformers.PreTrainedModel(torch.nn.Linear(64, 64))
assert type(quantize_model(model)[0]) is NF4Linear
assert not hasattr(model, "hf_quantizer")
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )
    assert done.returncode == 0, done.stderr


def test_an_older_peft_is_named_and_leaves_models_alone(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("__version__ = '0.5.0'")
    done = run_python(
        """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from qlora_native import quantize_model
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
))
for _ in range(2):
    try:
        quantize_model(model)
    except ImportError as error:
        assert "qlora_native.hf needs peft 0.21 or newer" in str(error), error
    else:
        raise AssertionError
assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
""",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )
    assert done.returncode == 0, done.stderr


def test_without_transformers_adapters_still_work():
    done = run_python("""
import importlib.util, sys
find_spec = importlib.util.find_spec
missing = ("transformers", "peft")  # which needs it
importlib.util.find_spec = lambda name: None if name in missing else find_spec(name)
import qlora_native.hf
assert not [name for name in missing if name in sys.modules]
assert callable(qlora_native.hf.save_lora)
try:
    from qlora_native.hf import NF4Config
except ImportError as error:
    assert "needs transformers 5 or newer" in str(error), error
else:
    raise AssertionError
""")
    assert done.returncode == 0, done.stderr


def test_without_peft_transformers_is_at_home():
    done = run_python("""
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "peft" else find_spec(name)
import qlora_native.hf
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "qlora_nf4" in AUTO_QUANTIZER_MAPPING
assert PreTrainedModel.num_parameters.__wrapped__
""")
    assert done.returncode == 0, done.stderr


def test_importing_registers_it_for_plain_from_pretrained(tmp_path):
    saved(hf_models.tiny_llama(), tmp_path / "dense").save_pretrained(tmp_path / "4-bit")
    code = f"""
import qlora_native.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "4-bit")!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "NF4Linear", done.stderr
