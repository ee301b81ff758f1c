"""dense_dtype and dequantize_layers: from 4-bit layers back to dense ones."""

import pytest
import torch
from torch import nn

from qlora_native import NF4Linear, add_lora, quantize_model
from qlora_native.nn.dense import dense_dtype, dequantize_layers
from support import NAMES, Model, nf4_layer, over_dtypes, same_bits, state_bits


@over_dtypes
def test_every_4_bit_layer_becomes_the_dense_one_that_it_stands_for(dtype):
    model = quantize_model(Model().to(dtype)).eval()
    expected = {name: model.get_submodule(name).dequantize(dtype) for name in NAMES}
    others = {n: p for n, p in model.named_parameters() if "up" not in n and "down" not in n}
    x = torch.arange(7)[None]
    before = model(x)
    assert dequantize_layers(model) == NAMES
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert not layer.training
        assert same_bits(layer.weight, weight)
        assert layer.bias is None or layer.bias.dtype == dtype
        assert not any(p.requires_grad for p in layer.parameters())
    assert all(model.get_parameter(name) is parameter for name, parameter in others.items())
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


def test_a_dtype_can_be_asked_for_and_a_shared_layer_stays_shared():
    model = nn.ModuleDict({"a": nf4_layer(8, 8)})
    model["b"] = model["a"]
    assert dequantize_layers(model, torch.float16) == ["a"]
    assert model["a"] is model["b"]
    assert model["a"].weight.dtype == model["a"].bias.dtype == torch.float16


def test_a_model_without_4_bit_layers_is_left_as_it_is():
    model = Model()
    before = state_bits(model)
    assert dequantize_layers(model) == []
    assert state_bits(model) == before


def test_what_cannot_be_dequantised_is_refused_before_anything_is_replaced():
    model = nn.Sequential(nf4_layer(8, 8), nf4_layer(8, 8))
    with pytest.raises(ValueError, match=r"dequantize_layers: dtype is torch\.int8"):
        dequantize_layers(model, torch.int8)
    model[1].to("meta")
    with pytest.raises(ValueError, match="dequantize_layers: 1 has parameters on the meta device"):
        dequantize_layers(model)
    assert isinstance(model[0], NF4Linear)
    with pytest.raises(ValueError, match="the model is itself the layer to replace"):
        dequantize_layers(model[0])


def test_the_dtype_is_that_of_most_weights_that_are_no_adapters():
    model = quantize_model(Model().bfloat16())
    assert dense_dtype(model) == torch.bfloat16
    for block in model.blocks:
        block.norm.float()
    assert dense_dtype(model) == torch.bfloat16
    add_lora(model, r=32, use_dora=True, target_modules=["up", "down"])
    assert dense_dtype(model) == torch.bfloat16  # there are more factors, in fp32
    assert dense_dtype(model.float()) == torch.float32


def test_a_model_of_nothing_but_codes_goes_by_its_config():
    model = nn.Sequential(nf4_layer(8, 8, bias=False))
    assert dense_dtype(model) == torch.float32
    for configured in (torch.bfloat16, "bfloat16"):
        model.config = type("Config", (), {"dtype": configured})()
        assert dense_dtype(model) == torch.bfloat16
