"""NF4Linear's bytes: saving, loading, copying, moving and casting."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from qlora_native import NF4Linear
from support import nf4_layer, over_dtypes, over_nesting, same_bits, state_bits

x = torch.linspace(-1, 1, 3 * 40).view(3, 40)


@over_nesting
@pytest.mark.parametrize("k", [40, 41])
def test_a_state_dict_loads_strictly_and_bit_for_bit(k, double_quant):
    layer = nf4_layer(24, k, double_quant=double_quant)
    other = NF4Linear(k, 24, double_quant=double_quant)
    result = other.load_state_dict(layer.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert state_bits(other) == state_bits(layer)
    assert same_bits(other.dequantize(), layer.dequantize())
    assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_the_state_is_the_weight_and_the_bias():
    assert list(nf4_layer(24, 40).state_dict()) == [
        "weight",
        "weight_absmax",
        "weight_nested_absmax",
        "weight_nested_offset",
        "bias",
    ]
    assert list(nf4_layer(24, 40, bias=False, double_quant=False).state_dict()) == [
        "weight",
        "weight_absmax",
    ]


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"block_size": 32}, "size mismatch for weight_absmax"),
        ({"block_size": 128}, "size mismatch for weight_absmax"),
        ({"double_quant": False}, "weight_nested_absmax"),
        ({"n": 40, "k": 24}, r"size mismatch for weight: .*\[40, 12\].*\[24, 20\]"),
        ({"n": 12}, "size mismatch for weight"),
        ({"bias": False}, "Missing key.*bias"),
    ],
    ids=["block 32", "block 128", "nesting", "transposed", "rows", "bias"],
)
def test_the_state_of_another_layer_is_refused(other, complaint):
    layer = nf4_layer(24, 40)
    source = nf4_layer(**{"n": 24, "k": 40, **other})
    with pytest.raises(RuntimeError, match=f"(?s){complaint}"):
        layer.load_state_dict(source.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@over_dtypes
def test_a_dense_weight_is_refused(dtype, assign):
    layer = nf4_layer(24, 40)
    before = state_bits(layer)
    dense = nn.Linear(40, 24).to(dtype)
    wanted = f'"weight" is {dtype} [24, 40], want uint8; a dense weight is quantised by'
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=re.escape(wanted)):
            layer.load_state_dict(dense.state_dict(), strict=strict, assign=assign)
    assert state_bits(layer) == before


def test_a_dense_weight_inside_a_model_is_refused_by_its_whole_name():
    model = nn.Sequential(nn.Sequential(nf4_layer(24, 40)))
    dense = nn.Sequential(nn.Sequential(nn.Linear(40, 24)))
    with pytest.raises(RuntimeError, match=re.escape('"0.0.weight" is torch.float32 [24, 40]')):
        model.load_state_dict(dense.state_dict())


def test_scales_of_another_dtype_are_refused():
    layer = nf4_layer(24, 40, double_quant=False)
    state = layer.state_dict()
    state["weight_absmax"] = state["weight_absmax"].view(torch.float32).view(-1)
    with pytest.raises(RuntimeError, match=r'"weight_absmax" is torch.float32'):
        layer.load_state_dict(state)


def test_a_state_with_a_key_too_few_or_many_is_refused():
    layer = nf4_layer(24, 40)
    state = layer.state_dict()
    for key in ("weight", "weight_absmax", "weight_nested_offset"):
        fewer = {name: value for name, value in state.items() if name != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            layer.load_state_dict(fewer)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**state, "weight.quant_map": torch.zeros(16)})


@over_nesting
def test_copies_and_pickles_keep_the_bits_and_share_nothing(double_quant):
    layer = nf4_layer(24, 40, double_quant=double_quant, compute_dtype=torch.bfloat16).eval()
    for copied in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved(layer), weights_only=False),
    ):
        assert state_bits(copied) == state_bits(layer)
        assert same_bits(copied(x), layer(x))
        assert repr(copied) == repr(layer)
        assert copied.training == layer.training
        copied.weight.zero_()
        assert (layer.weight != 0).any()


def saved(thing) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def test_a_state_dict_survives_torch_save_with_weights_only():
    layer = nf4_layer(24, 40)
    loaded = torch.load(saved(layer.state_dict()), weights_only=True)
    other = NF4Linear(40, 24)
    other.load_state_dict(loaded)
    assert state_bits(other) == state_bits(layer)


def test_a_state_dict_survives_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = nf4_layer(24, 41)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = NF4Linear(41, 24)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert state_bits(other) == state_bits(layer)


CASTS = {
    "to(bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "to(float16)": lambda layer: layer.to(torch.float16),
    "to(cpu, float64)": lambda layer: layer.to("cpu", torch.float64),
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "float": lambda layer: layer.float(),
    "cpu": lambda layer: layer.cpu(),
}


@over_nesting
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_changes_the_bias_and_no_byte_of_the_weight(cast, double_quant):
    layer = nf4_layer(24, 40, double_quant=double_quant)
    before = state_bits(layer)
    layer = cast(layer)
    after = state_bits(layer)
    for name in before:
        if name != "bias":
            assert after[name] == before[name]
    assert layer(x.half()).dtype == torch.float16  # whatever the bias is kept in


REPLACEMENTS = {
    "a parameter": lambda layer, name, t: setattr(layer, name, nn.Parameter(t, False)),
    "the data of a parameter": lambda layer, name, t: setattr(getattr(layer, name), "data", t),
    "the bytes": lambda layer, name, t: getattr(layer, name).copy_(t),
    "a plain attribute": lambda layer, name, t: (delattr(layer, name), setattr(layer, name, t)),
}


@over_nesting
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_what_replaces_a_stored_tensor_is_used_by_the_next_call(replace, double_quant):
    layer = nf4_layer(24, 40, double_quant=double_quant)
    other = nf4_layer(24, 40, double_quant=double_quant)
    layer(x)
    for name, parameter in other.named_parameters():
        with torch.no_grad():
            replace(layer, name, parameter.detach().clone())
    assert same_bits(layer(x), other(x))


def test_a_weight_whose_memory_was_freed_is_refused():
    layer = nf4_layer(24, 40)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[24, 20\] has no memory"):
        layer(x)


def test_data_of_another_size_is_refused():
    layer = nf4_layer(24, 40)
    layer(x)
    layer.weight.data = layer.weight.data[:23]
    with pytest.raises(ValueError, match=r"codes of shape \[23, 20\] has 460 elements, want 480"):
        layer(x)


def test_moving_to_meta_keeps_shapes_and_a_product_there_has_the_right_shape():
    layer = nf4_layer(24, 40)
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    layer = layer.to("meta")
    assert {name: p.shape for name, p in layer.named_parameters()} == shapes
    y = layer(torch.randn(2, 3, 40, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 24)
    assert layer.dequantize(torch.bfloat16).shape == (24, 40)
    with pytest.raises(ValueError, match="x is on cpu, the weight is on meta"):
        layer(x)


@over_nesting
@pytest.mark.parametrize("as_default", [False, True])
def test_a_layer_made_on_meta_is_filled_by_assignment(as_default, double_quant):
    layer = nf4_layer(24, 40, double_quant=double_quant)
    if as_default:
        with torch.device("meta"):
            empty = NF4Linear(40, 24, double_quant=double_quant)
    else:
        empty = NF4Linear(40, 24, double_quant=double_quant, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert state_bits(empty) == state_bits(layer)
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in empty.parameters())
    assert same_bits(empty(x), layer(x))


def test_assignment_refuses_the_state_of_another_layer():
    empty = NF4Linear(40, 24, device="meta")
    for other in (nf4_layer(40, 24), nf4_layer(24, 40, block_size=32), nn.Linear(40, 24)):
        with pytest.raises(RuntimeError, match=r"size mismatch|want uint8"):
            empty.load_state_dict(other.state_dict(), assign=True)


def test_a_bias_that_was_trained_loads_frozen():
    layer = nf4_layer(24, 40)
    state = {name: p.detach() for name, p in layer.state_dict().items()}
    state["bias"] = nn.Parameter(torch.ones(24))
    for assign in (False, True):
        other = NF4Linear(40, 24)
        other.load_state_dict(state, assign=assign)
        assert not other.bias.requires_grad
        assert (other.bias == 1).all()


def test_the_default_dtype_is_that_of_the_bias_alone():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = NF4Linear(40, 24)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.uint8
    assert layer(x).dtype == torch.float32
