"""An NF4Linear with the face of an nn.Linear: what PEFT's tuners read, and may not write."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_native import NF4Linear
from qlora_native.hf.peft.nf4_as_linear import NF4AsLinear, ReadOnlyWeightError, hide, show
from support import nf4_layer, over_dtypes, same_bits, state_bits


@pytest.fixture
def layer():
    layer = nf4_layer(48, 64)
    show(layer, torch.float32)
    return layer


def test_shows_a_linear_layer_and_hides_it(layer):
    bits, names = state_bits(layer), [name for name, _ in layer.named_parameters()]
    assert isinstance(layer, NF4Linear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 48)
    x = torch.randn(3, 64)
    y = layer(x)
    hide(layer)
    assert type(layer) is NF4Linear
    assert not isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.uint8
    assert same_bits(layer(x), y)
    assert state_bits(layer) == bits
    assert [name for name, _ in layer.named_parameters()] == names
    assert vars(layer).keys() == vars(nf4_layer(48, 64)).keys()


@over_dtypes
def test_the_weight_reads_as_the_dense_one(dtype):
    layer = nf4_layer(48, 64)
    dense = layer.dequantize(dtype)
    show(layer, dtype)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dtype, dense.device)
    assert not weight.requires_grad
    for read in (
        lambda w: w.clone(),
        lambda w: w.data.clone(),
        lambda w: w.detach() * 1,
        lambda w: w.float(),
        lambda w: w.T.contiguous(),
        lambda w: w[3:5, 7:],
        lambda w: w + 1,
        lambda w: 1 - w,
        lambda w: torch.norm(w.float(), dim=1),
        lambda w: torch.cat([w, w]),
        lambda w: torch.zeros_like(w),
        lambda w: torch.zeros(48, 64, dtype=dtype).copy_(w),
        lambda w: F.linear(torch.ones(2, 64, dtype=dtype), w),
    ):
        assert same_bits(read(weight).clone(), read(dense))


def test_a_product_with_it_has_gradients(layer):
    x, scale = torch.randn(3, 64, requires_grad=True), torch.randn(48, 1, requires_grad=True)
    dense = layer.dequantize()
    F.linear(x, layer.weight * scale).square().sum().backward()
    gradients = x.grad.clone(), scale.grad.clone()
    x.grad = scale.grad = None
    F.linear(x, dense * scale).square().sum().backward()
    assert same_bits(gradients[0], x.grad)
    assert same_bits(gradients[1], scale.grad)


WRITES = {
    "data = ": lambda w: setattr(w, "data", torch.zeros(48, 64)),
    "data += ": lambda w: w.data.__iadd__(1),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(48, 64)),
    "add_": lambda w: w.add_(1),
    "[...] = ": lambda w: w.__setitem__(0, 0.0),
    "T[...] = ": lambda w: w.T.__setitem__(0, 0.0),
    "row.zero_": lambda w: w[3].zero_(),
    "split": lambda w: w.split(16)[1].zero_(),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "out=": lambda w: torch.add(torch.zeros(48, 64), 1, out=w),
    "init": lambda w: nn.init.zeros_(w),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad = ": lambda w: setattr(w, "requires_grad", True),
    "grad = ": lambda w: setattr(w, "grad", torch.zeros(48, 64)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_the_weight_raises(layer, write):
    bits = state_bits(layer)
    with pytest.raises(ReadOnlyWeightError, match=r"NF4 layer.*4 bits"):
        write(layer.weight)
    assert state_bits(layer) == bits


@pytest.mark.parametrize(
    "weight",
    [nn.Parameter(torch.zeros(48, 64)), torch.zeros(48, 64), None],
    ids=["parameter", "tensor", "none"],
)
def test_replacing_the_weight_raises(layer, weight):
    bits = state_bits(layer)
    with pytest.raises(ReadOnlyWeightError):
        layer.weight = weight
    assert state_bits(layer) == bits


def test_another_layers_weight_is_refused_and_its_own_taken(layer):
    other = nf4_layer(48, 64)
    show(other, torch.float32)
    bits = state_bits(layer)
    with pytest.raises(ReadOnlyWeightError):
        layer.weight = other.weight
    layer.weight = layer.weight
    assert state_bits(layer) == bits


def test_what_must_not_be_refused(layer):
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    # Codes may be replaced, as FSDP2 and load_state_dict(assign=True) do.
    codes = nn.Parameter(layer._parameters["weight"].clone(), requires_grad=False)
    layer.weight = codes
    assert layer._parameters["weight"] is codes
    layer.load_state_dict(nf4_layer(48, 64).state_dict(), assign=True)


def test_the_weights_dtype_goes_with_the_model(layer):
    bits = state_bits(layer)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert same_bits(layer.weight.clone(), layer.dequantize(torch.bfloat16))
    layer.to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.float().weight.dtype == torch.float32
    assert {k: v for k, v in state_bits(layer).items() if k != "bias"} == {
        k: v for k, v in bits.items() if k != "bias"
    }


def test_copies_and_pickles(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is NF4AsLinear
        assert state_bits(other) == state_bits(layer)
        assert same_bits(other.weight.clone(), layer.weight.clone())
