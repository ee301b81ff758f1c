"""quantize_model: what it replaces, in which order, and what it refuses."""

import gc
import re
import weakref

import pytest
import torch
from torch import nn

from qlora_native import NF4Linear, quantize_model
from support import NAMES, Model, nf4_layer, same_bits, state_bits


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]


def test_every_linear_layer_but_the_head_becomes_nf4():
    model = Model()
    dense = {name: model.get_submodule(name) for name in NAMES}
    head = model.lm_head
    assert quantize_model(model) is model
    assert quantized_names(model) == NAMES
    assert model.lm_head is head
    for name, linear in dense.items():
        layer = model.get_submodule(name)
        assert state_bits(layer) == state_bits(NF4Linear.from_linear(linear))
    assert model(torch.arange(5)[None]).shape == (1, 5, 50)


def test_the_options_reach_every_layer():
    model = quantize_model(Model(), block_size=32, double_quant=False, compute_dtype=torch.bfloat16)
    for name in NAMES:
        layer = model.get_submodule(name)
        assert (layer.block_size, layer.double_quant) == (32, False)
        assert layer.compute_dtype == torch.bfloat16
        assert layer.training


def test_a_model_in_evaluation_stays_in_evaluation():
    model = quantize_model(Model().eval())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        ((), set()),
        (("lm_head",), {"lm_head"}),
        (("blocks.1.up",), {"blocks.1.up"}),
        (("down",), {f"blocks.{i}.down" for i in range(3)}),
        (("blocks.1",), {"blocks.1.up", "blocks.1.down"}),
        (("1", "lm_head"), {"blocks.1.up", "blocks.1.down", "lm_head"}),
    ],
)
def test_skip_takes_whole_names_and_parts_between_dots(skip, skipped):
    model = quantize_model(Model(), skip=skip)
    assert set(quantized_names(model)) == {*NAMES, "lm_head"} - skipped


@pytest.mark.parametrize("entry", ["head", "block", "up.", "blocks.1.u", "lm_heads", "Blocks"])
def test_a_skip_that_matches_nothing_is_refused(entry):
    model = Model()
    with pytest.raises(ValueError, match=f"skip has {re.escape(repr(entry))}, which matches no"):
        quantize_model(model, skip=["lm_head", entry])
    assert quantized_names(model) == []


def test_the_default_skip_needs_no_head():
    model = nn.Sequential(nn.Linear(8, 8))
    assert quantized_names(quantize_model(model)) == ["0"]


@pytest.mark.parametrize("skip", ["lm_head", "0", ""])
def test_a_skip_that_is_one_string_is_refused(skip):
    with pytest.raises(ValueError, match="want a list of names"):
        quantize_model(Model(), skip=skip)


def test_progress_is_called_after_each_layer():
    calls = []
    quantize_model(Model(), progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, 6, name) for i, name in enumerate(NAMES)]


def test_a_dense_weight_is_gone_before_the_next_layer_is_quantised(monkeypatch):
    model = Model()
    weights = [weakref.ref(model.get_submodule(name).weight) for name in NAMES]
    alive_at_quantising = []
    quantise = NF4Linear.from_linear

    def counting(linear, **options):
        alive_at_quantising.append(sum(weight() is not None for weight in weights))
        return quantise(linear, **options)

    monkeypatch.setattr(NF4Linear, "from_linear", counting)
    gc.disable()  # without help from the collector of cycles
    try:
        quantize_model(model)
    finally:
        gc.enable()
    assert alive_at_quantising == [6, 5, 4, 3, 2, 1]
    assert all(weight() is None for weight in weights)


def test_tied_weights_are_refused_and_nothing_is_quantised():
    model = Model()
    model.lm_head.weight = model.embed.weight
    assert len(quantized_names(quantize_model(model))) == 6  # the head is skipped
    model = Model()
    model.lm_head.weight = model.embed.weight
    with pytest.raises(
        ValueError, match=r"lm_head.weight is also embed.weight; .*add 'lm_head' to skip"
    ):
        quantize_model(model, skip=())
    assert quantized_names(model) == []


def test_a_layer_that_is_used_under_two_names_is_refused():
    model = nn.Module()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    with pytest.raises(ValueError, match=r"a.weight is also b.weight"):
        quantize_model(model)


def test_subclasses_of_linear_stay_dense_with_a_warning():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Special(8, 8))
    with pytest.warns(UserWarning, match="leaves subclasses of nn.Linear dense: 1$"):
        quantize_model(model)
    assert quantized_names(model) == ["0"]
    assert type(model[1]) is Special


def test_nothing_to_quantise_is_an_error():
    for model in (nn.Sequential(nn.ReLU()), nn.Sequential(nf4_layer(8, 8))):
        with pytest.raises(ValueError, match=r"the model has no nn.Linear to quantise"):
            quantize_model(model)
    with pytest.raises(ValueError, match=r"no nn.Linear to quantise"):
        quantize_model(Model(), skip=["blocks", "lm_head"])


def test_a_model_that_is_one_layer_is_refused():
    with pytest.raises(ValueError, match="quantize_model: the model is itself the layer"):
        quantize_model(nn.Linear(8, 8))


@pytest.mark.parametrize("options", [{"block_size": 48}, {"compute_dtype": torch.int8}])
def test_a_wrong_option_leaves_the_model_dense(options):
    model = Model()
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        quantize_model(model, **options)
    assert quantized_names(model) == []


def test_a_nan_is_refused_and_its_layer_named():
    model = Model()
    model.blocks[1].up.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.1.up: .*NaN or Inf in block 1, elements 64 to"):
        quantize_model(model)
    assert quantized_names(model) == NAMES[:2]  # those before it
    assert type(model.blocks[1].up) is nn.Linear


def test_a_quantised_model_round_trips_through_its_state_dict():
    model = quantize_model(Model())
    with torch.device("meta"):
        empty = Model()
    quantize_model(empty)
    empty.load_state_dict(model.state_dict(), assign=True)
    tokens = torch.arange(7)[None]
    assert same_bits(empty(tokens), model(tokens))


def test_a_dense_checkpoint_does_not_load_into_a_quantised_model():
    with pytest.raises(RuntimeError, match=r"blocks.0.up.weight.* want uint8"):
        quantize_model(Model()).load_state_dict(Model().state_dict())


def test_matrices_outside_linear_layers_are_named_in_a_warning():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.weights = nn.Parameter(torch.zeros(4, 8, 8))

    model = nn.ModuleDict({"experts": Experts(), "token": nn.Embedding(4, 8)})
    with pytest.warns(UserWarning, match=r"leaves 1,024 bytes .* dense: experts\.weights$"):
        quantize_model(model)
