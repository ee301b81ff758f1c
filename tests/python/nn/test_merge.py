"""merge_lora and unmerge_lora: the numbers, the report, and that nothing is left half-done."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from qlora_native import (
    LoRALinear,
    MergeReport,
    NF4Linear,
    add_lora,
    merge_lora,
    nf4_quantize,
    quantize_model,
    set_lora,
    unmerge_lora,
)
from qlora_native.nn import merge as merge_module
from qlora_native.nn.dense import dequantize_layers
from support import (
    NAMES,
    Approximate,
    Model,
    assert_near,
    assert_within,
    lora_layer,
    make_base,
    nf4_layer,
    over_bases,
    over_dtypes,
    same_bits,
    state_bits,
)

TOKENS = torch.arange(14).view(2, 7)


def make_model(quantised: bool = True, dtype: torch.dtype = torch.float32, **options) -> Model:
    """A model with updates that are not zero, of the size that training leaves."""
    model = Model().to(dtype)
    if quantised:
        quantize_model(model)
    add_lora(model, **{"r": 4, "target_modules": ["up", "down"], **options})
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.02)
    return model.eval()


def exact_sum(layer: LoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
    """W and W + ΔW in fp64."""
    base = layer.base
    w = (base.dequantize() if isinstance(base, NF4Linear) else base.weight).double()
    return w, w + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()


# ---- the weights


@over_bases
@over_dtypes
def test_the_sum_is_done_in_fp32_and_rounded_once(kind, dtype):
    base = make_base(kind)
    model = nn.Sequential(LoRALinear(base, r=3, lora_alpha=5))
    nn.init.normal_(model[0].lora_b)
    layer = model[0]
    w = Approximate(exact_sum(layer)[0])
    expected = w + Approximate(layer.lora_b) @ Approximate(layer.lora_a) * layer.scaling
    merge_lora(model, dtype)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == dtype
    assert_within(model[0].weight, expected.rounded_to(dtype))
    assert same_bits(model[0].bias, base.bias.to(dtype))
    assert model[0].bias.data_ptr() != base.bias.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quantised", [False, True])
def test_a_merged_model_is_dense_and_gives_the_same_numbers(quantised):
    model = make_model(quantised, lora_dropout=0.5)
    expected = model(TOKENS)
    assert merge_lora(model).model is model
    assert not any(isinstance(m, LoRALinear | NF4Linear) for m in model.modules())
    assert not any(module.training for module in model.modules())
    assert_near(model(TOKENS), expected)


def test_a_merged_16_bit_model_runs_in_16_bits():
    model = make_model(dtype=torch.bfloat16)
    expected = model(TOKENS)
    report = merge_lora(model)
    assert report.into == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    error = (model(TOKENS) - expected).float().norm() / expected.float().norm()
    assert error < 0.02  # a few roundings to 8 bits in each of the layers


def test_the_dtype_is_that_of_most_weights_and_not_of_the_first():
    model = make_model(dtype=torch.bfloat16)
    model.embed.float()
    for block in model.blocks:
        block.norm.float()
    model.lm_head = nn.Linear(32, 500, bias=False, dtype=torch.float16)
    merge_lora(model)
    assert model.blocks[0].up.weight.dtype == model.blocks[0].up.bias.dtype == torch.float16
    model = make_model(quantised=False, dtype=torch.bfloat16)
    merge_lora(model.float())  # a dense base keeps its own
    assert model.blocks[0].up.weight.dtype == torch.float32


def test_four_bit_layers_without_an_update_become_dense_too():
    model = make_model(target_modules=["up"], dtype=torch.bfloat16)
    expected = {n: model.get_submodule(n).dequantize(torch.bfloat16) for n in NAMES[1::2]}
    report = merge_lora(model)
    assert report.dequantized == tuple(NAMES[1::2])
    assert [layer.name for layer in report.layers] == NAMES[::2]
    for name, weight in expected.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert same_bits(model.get_submodule(name).weight, weight)
    assert "3 more 4-bit layers without an update became dense." in str(report)


def test_merging_at_the_start_gives_the_base():
    model = nn.Sequential(nn.Linear(40, 24))
    before = state_bits(model)
    report = merge_lora(add_lora(model, r=2))
    assert state_bits(model) == before
    assert report.layers[0].lost_of_update is None
    assert report.layers[0].lost_norm == report.layers[0].lost_of_weight == 0.0


def test_a_shared_layer_stays_shared():
    model = nn.Module()
    model.a = nf4_layer(8, 8)
    model.b = model.a
    add_lora(model, r=2)
    assert len(merge_lora(model).layers) == 1
    assert type(model.a) is nn.Linear
    assert model.a is model.b


def test_a_tied_weight_parts_and_the_report_says_so():
    model = Model()
    model.lm_head.weight = model.embed.weight
    add_lora(model, r=2, target_modules=["lm_head"])
    nn.init.normal_(model.lm_head.lora_b)
    embedding = model.embed.weight.clone()
    expected = model(TOKENS)
    report = merge_lora(model)
    assert_near(model(TOKENS), expected)
    assert same_bits(model.embed.weight, embedding)
    assert report.notes == (
        "lm_head.weight was also embed.weight, which keeps its value: the two are no longer tied",
    )
    assert "Note: lm_head.weight was also" in str(report)


def test_hooks_of_accelerate_move_to_the_merged_layer():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model = nn.Sequential(lora_layer(nf4_layer(8, 8)))
    add_hook_to_module(model[0], Doubling())
    x = torch.randn(3, 8)
    expected = model(x)
    merge_lora(model)
    assert_near(model(x), expected)


# ---- several adapters


def make_two_adapters(dtype: torch.dtype = torch.float32, **second) -> Model:
    """`first` beside every layer, `second` of another rank and scaling beside the `up`s alone."""
    model = make_model(dtype=dtype, adapter_name="first")
    settings = {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["up"], **second}
    add_lora(model, adapter_name="second", **settings)
    for block in model.blocks:
        nn.init.normal_(block.up.adapters["second"].lora_b, std=0.02)
    return model.eval()


def test_the_adapter_in_force_is_merged():
    for name in ("first", "second"):
        model = make_two_adapters()
        set_lora(model, name)
        expected, exact = model(TOKENS), model.blocks[0].up.merged_weight(name)
        report = merge_lora(model, batch=TOKENS)
        assert same_bits(model.blocks[0].up.weight, exact)
        assert_near(model(TOKENS), expected)
        assert report.outputs.max_difference == (model(TOKENS) - expected).abs().max().item()
        if name == "second":  # of which the others have nothing
            assert [layer.name for layer in report.layers] == NAMES[::2]
            assert report.dequantized == tuple(NAMES[1::2])


@pytest.mark.parametrize("in_force", ["first", None, ["first", "second"]])
def test_an_adapter_is_merged_by_name_whatever_is_in_force(in_force):
    model = make_two_adapters()
    set_lora(model, "second")
    expected = model(TOKENS)
    set_lora(model, in_force)
    outputs = merge_lora(model, names="second", batch=TOKENS).outputs
    assert_near(model(TOKENS), expected)
    assert outputs.max_difference == (model(TOKENS) - expected).abs().max().item()


@pytest.mark.parametrize("use_dora", [False, True])
def test_several_adapters_are_added_up_each_with_its_scaling(use_dora):
    model = make_two_adapters(use_dora=use_dora)
    up, down = model.blocks[0].up, model.blocks[0].down
    w, first, second = up.base.dequantize(), up.adapters["first"], up.adapters["second"]
    assert first.scaling != second.scaling
    update = second.scaling * second.lora_b.double() @ second.lora_a.double()
    if use_dora:
        scaled = w + update
        update = scaled * (second.magnitude / scaled.norm(dim=1))[:, None] - w
    exact = w + first.scaling * first.lora_b.double() @ first.lora_a.double() + update
    only_first = down.merged_weight("first")
    report = merge_lora(model, names=["first", "second"], batch=TOKENS)
    assert_near(model.blocks[0].up.weight.double(), exact, 1e-6)
    assert same_bits(model.blocks[0].down.weight, only_first)
    assert report.layers[0].update_norm == pytest.approx((exact - w).norm().item(), rel=1e-4)
    # Before and after are the same sums in another order.
    assert 0.0 < report.outputs.max_difference < 1e-4 * report.outputs.rms_logits


def test_a_row_of_zeros_stays_zero_whatever_the_magnitude():
    layer = nn.Linear(64, 8)
    layer.weight.data[3] = 0
    model = add_lora(nn.Sequential(NF4Linear.from_linear(layer)), r=2, use_dora=True)
    model[0].adapters["default"].magnitude.data.fill_(5.0)
    assert (model[0].merged_weight("default")[3] == 0).all()
    x = torch.randn(3, 64)
    expected = model(x)
    merge_lora(model)
    assert_near(model(x), expected)


def test_a_merge_of_several_adapters_can_be_taken_back():
    model = make_two_adapters()
    set_lora(model, "first")
    stored, before = state_bits(model), model(TOKENS)
    merge_lora(model, names="second", reversible=True)
    assert isinstance(model.blocks[0].down, LoRALinear)
    merged = model(TOKENS)
    assert same_bits(unmerge_lora(model)(TOKENS), before)
    assert state_bits(model) == stored
    set_lora(model, "second")  # the `down`s are their bases alone then
    assert_near(model(TOKENS), merged)


def test_what_is_in_force_outlives_a_merge_that_is_refused():
    model = make_two_adapters()
    set_lora(model, "second")
    model.blocks[2].up.adapters["first"].lora_b.data[0, 0] = torch.nan
    before = model(TOKENS)
    with pytest.raises(ValueError, match=r"blocks\.2\.up: lora_b of 'first' has a NaN"):
        merge_lora(model, names=["second", "first"], batch=TOKENS)
    assert same_bits(model(TOKENS), before)
    merge_lora(model)  # a NaN in an adapter that is not merged does not matter
    assert_near(model(TOKENS), before)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("third", "merge_lora: there is no adapter 'third'; there are: 'first', 'second'"),
        (["first", "first"], "want different adapters' names"),
        ([], "want different adapters' names"),
        ("__base__", "want different adapters' names"),
    ],
)
def test_names_that_cannot_be_merged(names, message):
    model = make_two_adapters()
    with pytest.raises(ValueError, match=message):
        merge_lora(model, names=names)
    assert isinstance(model.blocks[0].up, LoRALinear)


def test_with_no_one_adapter_in_force_a_name_is_wanted():
    model = make_two_adapters()
    set_lora(model, ["first", "second"])
    with pytest.raises(ValueError, match="a list of names in force, one for each element"):
        merge_lora(model)
    set_lora(model, None)
    with pytest.raises(ValueError, match=r"no adapter in force; .* 'first', 'second'"):
        merge_lora(model)


# ---- back into NF4


def test_merging_into_nf4_quantises_the_sum_and_says_what_is_lost():
    model = make_model()
    layer = model.blocks[0].up
    expected = nf4_quantize(layer.merged_weight("default"), 64, True)
    with pytest.warns(UserWarning, match=r"merge_lora: quantising .* again to NF4 .* by up to"):
        report = merge_lora(model, into="nf4", batch=TOKENS)
    merged = model.blocks[0].up
    assert type(merged) is NF4Linear
    assert same_bits(merged.weight, expected.codes)
    assert same_bits(merged.dequantize(), expected.dequantize())
    assert report.into == "NF4"
    assert 0.1 < report.worst_lost_of_update < 100.0
    assert f"{report.worst_lost_of_update:.2e}" in str(report)
    assert report.outputs.rms_difference > 0.0


@pytest.mark.parametrize(("block_size", "double_quant"), [(32, True), (128, False)])
def test_merging_into_nf4_keeps_how_a_layer_was_quantised(block_size, double_quant):
    options = {"block_size": block_size, "double_quant": double_quant}
    base = nf4_layer(24, 40, compute_dtype=torch.bfloat16, **options)
    model = nn.Sequential(lora_layer(base), lora_layer(nn.Linear(24, 8)))
    with pytest.warns(UserWarning, match="NF4"):
        merge_lora(model, into="nf4")
    merged = model[0]
    assert (merged.block_size, merged.double_quant) == (block_size, double_quant)
    assert merged.compute_dtype == torch.bfloat16
    assert same_bits(merged.bias, base.bias)
    assert not same_bits(merged.weight, base.weight)
    assert type(model[1]) is nn.Linear


def test_a_merge_into_dense_weights_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_lora(make_model())


# ---- the report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_report_measures_what_rounding_has_lost(dtype):
    model = make_model(dtype=dtype)
    sums = {name: exact_sum(model.get_submodule(name)) for name in NAMES}
    report = merge_lora(model)
    assert [layer.name for layer in report.layers] == NAMES
    for layer in report.layers:
        w, exact = sums[layer.name]
        merged = model.get_submodule(layer.name).weight.double()
        assert layer.shape == tuple(w.shape)
        update, lost = (exact - w).norm().item(), (merged - exact).norm().item()
        assert lost > 0.0
        assert layer.weight_norm == pytest.approx(w.norm().item(), rel=1e-6)
        assert layer.update_norm == pytest.approx(update, rel=1e-4)
        assert layer.lost_norm == pytest.approx(lost, rel=1e-3)
        assert layer.lost_of_update == pytest.approx(lost / update, rel=1e-3)
        assert layer.lost_of_weight == pytest.approx(lost / w.norm().item(), rel=1e-3)
        # At most half a unit in the last place of each element.
        assert lost <= torch.finfo(dtype).eps / 2 * exact.norm() * 1.001


def test_a_weight_is_measured_in_runs_of_rows(monkeypatch):
    from qlora_native.nn import merge_report

    whole = merge_lora(make_model(dtype=torch.bfloat16)).layers
    monkeypatch.setattr(merge_report, "_ELEMENTS", 100)
    torch.manual_seed(0)  # the same model again
    in_runs = merge_lora(make_model(dtype=torch.bfloat16)).layers
    for one, other in zip(whole, in_runs, strict=True):
        assert other.lost_norm == pytest.approx(one.lost_norm, rel=1e-6)
        assert other.update_norm == pytest.approx(one.update_norm, rel=1e-6)


def test_the_worst_layers_come_first():
    model = make_model(dtype=torch.bfloat16)
    with torch.no_grad():
        model.blocks[1].down.lora_b.mul_(1e-3)  # of which rounding loses most
        model.blocks[2].up.lora_b.zero_()  # which has nothing to lose
    report = merge_lora(model)
    worst = report.worst(len(NAMES))
    assert worst[0].name == "blocks.1.down"
    assert worst[-1].name == "blocks.2.up"
    assert worst[-1].lost_of_update is None
    shares = [layer.lost_of_update for layer in worst[:-1]]
    assert shares == sorted(shares, reverse=True)
    assert report.worst_lost_of_update == shares[0]
    table = str(report).splitlines()
    assert table[2].startswith("layer ")
    assert table[3].startswith("blocks.1.down  32×64")
    assert len({len(line) for line in table[2:9]}) == 1


def test_a_long_report_shows_its_ten_worst_layers():
    model = add_lora(nn.Sequential(*(nn.Linear(8, 8) for _ in range(12))), r=1)
    text = str(merge_lora(model))
    assert "the worst 10 of 12" in text
    assert len(text.splitlines()) == 13


def test_the_report_is_json():
    model = make_model(dtype=torch.bfloat16)
    model.blocks[0].up.lora_b.data.zero_()
    report = merge_lora(model, batch=TOKENS)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["into"] == "bfloat16"
    assert content["layers"][0]["lost_of_update"] is None
    assert content["layers"][1]["lost_of_update"] == report.layers[1].lost_of_update
    assert content["layers"][1]["shape"] == [32, 64]
    assert content["outputs"]["perplexity_after"] == report.outputs.perplexity_after
    assert "model" not in content


# ---- logits and perplexity


def test_logits_and_perplexity_are_measured_before_and_after():
    model = make_model(dtype=torch.bfloat16, lora_dropout=0.5).train()
    before = model.eval()(TOKENS).double()
    report = merge_lora(model.train(), batch=TOKENS)
    assert all(module.training for module in model.modules())
    after = model.eval()(TOKENS).double()
    outputs = report.outputs
    assert 0.0 < outputs.max_difference == (after - before).abs().max().item()
    rms = (after - before).square().mean().sqrt().item()
    assert outputs.rms_difference == pytest.approx(rms, rel=1e-9)
    assert outputs.rms_logits == pytest.approx(before.square().mean().sqrt().item(), rel=1e-9)
    for logits, measured in ((before, "perplexity_before"), (after, "perplexity_after")):
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert getattr(outputs, measured) == pytest.approx(loss.exp().item(), rel=1e-5)
    assert f"perplexity {outputs.perplexity_before:.6g} -> " in str(report)


class ByName(nn.Module):
    """Called by name, and answers with a dict, as transformers' models are and do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": None, "logits": self.model(input_ids)}


def perplexity_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).exp()


def test_labels_and_the_attention_mask_say_what_counts():
    mask = torch.ones_like(TOKENS)
    mask[0, 4:] = 0
    labels = TOKENS.masked_fill(torch.arange(7) < 3, -100)
    for batch, counted in (
        ({"input_ids": TOKENS}, TOKENS),
        ({"input_ids": TOKENS, "attention_mask": mask}, TOKENS.masked_fill(mask == 0, -100)),
        ({"input_ids": TOKENS, "attention_mask": mask, "labels": labels}, labels),
    ):
        model = ByName()
        expected = perplexity_of(model(TOKENS)["logits"], counted).item()
        outputs = merge_lora(model, batch=batch).outputs
        assert outputs.perplexity_before == pytest.approx(expected, rel=1e-5)


def test_an_encoder_decoders_logits_are_for_the_label_of_their_own_position():
    from types import SimpleNamespace

    model = ByName()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    logits = model(TOKENS)["logits"]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
    outputs = merge_lora(model, batch={"input_ids": TOKENS, "labels": TOKENS}).outputs
    assert outputs.perplexity_before == pytest.approx(loss.exp().item(), rel=1e-5)


def test_without_labels_there_is_no_perplexity():
    model = nn.Sequential(lora_layer(nf4_layer(8, 16)))
    outputs = merge_lora(model, batch=torch.randn(3, 16)).outputs
    assert outputs.perplexity_before is outputs.perplexity_after is None
    assert outputs.rms_logits > 0.0
    model = ByName()
    all_masked = {"input_ids": TOKENS, "labels": torch.full_like(TOKENS, -100)}
    assert merge_lora(model, batch=all_masked).outputs.perplexity_before is None


def test_a_hopeless_perplexity_is_infinite_and_not_an_overflow():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert merge_lora(model, batch=TOKENS).outputs.perplexity_before == math.inf


# ---- unmerging


@over_bases
@over_dtypes
def test_unmerging_gives_every_bit_back(kind, dtype):
    model = make_model(kind == "nf4", dtype)
    stored, before = state_bits(model), model(TOKENS)
    report = merge_lora(model, reversible=True, batch=TOKENS)
    assert state_bits(model) == stored  # a merged model saves what an unmerged one does
    merged = model(TOKENS)
    assert not same_bits(merged, before)
    relative = (merged - before).float().norm() / before.float().norm()
    assert relative < 8 * torch.finfo(dtype).eps
    assert report.outputs.max_difference == (merged - before).double().abs().max().item()
    assert unmerge_lora(model) is model
    assert state_bits(model) == stored
    assert same_bits(model(TOKENS), before)


def test_a_held_weight_is_what_a_merge_would_store():
    torch.manual_seed(0)
    held = make_model(dtype=torch.bfloat16)
    torch.manual_seed(0)
    merged = make_model(dtype=torch.bfloat16)
    report = merge_lora(held, reversible=True)
    assert merge_lora(merged).layers == report.layers
    assert same_bits(held.blocks[0].up.held_weight, merged.blocks[0].up.weight)
    assert same_bits(held(TOKENS), merged(TOKENS))


def test_a_held_merge_leaves_the_other_layers_alone_and_follows_casts():
    model = make_model(target_modules=["up"])
    report = merge_lora(model, reversible=True)
    assert report.dequantized == ()
    assert isinstance(model.blocks[0].down, NF4Linear)
    model.bfloat16()
    assert model.blocks[0].up.held_weight.dtype == torch.bfloat16
    assert model(TOKENS).dtype == torch.bfloat16
    unmerge_lora(model)
    assert "held_weight" not in dict(model.named_buffers())


def test_a_held_merge_computes_in_the_dtypes_of_its_base():
    x = torch.randn(3, 16)
    for options in ({}, {"compute_dtype": torch.bfloat16}):
        model = nn.Sequential(lora_layer(nf4_layer(8, 16, **options)))
        expected = model(x)
        merge_lora(model, torch.bfloat16, reversible=True)
        assert model(x).dtype == expected.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == (torch.float32 if options else torch.bfloat16)
        assert_near(model(x), expected, 0.02)


def test_a_held_merge_is_not_merged_again_nor_unmerged_twice():
    model = make_model()
    merge_lora(model, reversible=True)
    with pytest.raises(ValueError, match=r"merge_lora: blocks\.0\.up is merged already"):
        merge_lora(model)
    unmerge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora: the model has no layer merged"):
        unmerge_lora(model)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"into": "int8"}, "into is 'int8', want 'dense' or 'nf4'"),
        ({"into": "nf4", "reversible": True}, "a reversible merge holds dense weights"),
        ({"dtype": torch.int8}, "dtype is torch.int8, want float32, bfloat16 or float16"),
        ({"batch": {"input_ids": "text"}}, None),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, message):
    model = make_model()
    modules, stored = dict(model.named_modules()), state_bits(model)
    with pytest.raises(ValueError if message else Exception, match=message):
        merge_lora(model, **arguments)
    assert dict(model.named_modules()) == modules
    assert state_bits(model) == stored


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_named_before_anything_is_changed(factor, value):
    model = make_model()
    with torch.no_grad():
        getattr(model.blocks[1].down, factor)[1, 2] = value
    modules = dict(model.named_modules())
    message = rf"merge_lora: blocks\.1\.down: {factor} of 'default' has a NaN or Inf"
    for options in ({}, {"into": "nf4"}, {"reversible": True}):
        with pytest.raises(ValueError, match=message):
            merge_lora(model, **options)
        assert dict(model.named_modules()) == modules
        assert not any(m.holds_merged for m in model.modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("reversible", [False, True])
def test_a_weight_out_of_the_dtypes_range_leaves_the_model_as_it_was(reversible):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].down.lora_b.fill_(1e6)
    modules, stored, before = dict(model.named_modules()), state_bits(model), model(TOKENS)
    message = r"blocks\.1\.down: the merged weight in torch\.float16 has a NaN or Inf"
    with pytest.raises(ValueError, match=message):
        merge_lora(model, torch.float16, reversible=reversible)
    assert dict(model.named_modules()) == modules
    assert state_bits(model) == stored
    assert same_bits(model(TOKENS), before)


@pytest.mark.parametrize("options", [{}, {"into": "nf4"}, {"reversible": True}])
def test_a_merge_that_fails_at_its_end_leaves_the_model_as_it_was(options, monkeypatch):
    model = make_model(target_modules=["up"])
    modules, stored, before = dict(model.named_modules()), state_bits(model), model(TOKENS)

    def fail(*_):
        raise MemoryError("no room for the logits")

    monkeypatch.setattr(merge_module, "compare_outputs", fail)
    with pytest.raises(MemoryError, match="no room"):
        merge_lora(model, batch=TOKENS, **options)
    assert dict(model.named_modules()) == modules
    assert state_bits(model) == stored
    assert same_bits(model(TOKENS), before)


def test_an_output_without_logits_is_refused_before_the_merge():
    class Silent(ByName):
        def forward(self, input_ids):
            return "nothing"

    model = Silent()
    with pytest.raises(ValueError, match="the model's output on the batch is str, want a tensor"):
        merge_lora(model, batch={"input_ids": TOKENS})
    assert any(isinstance(m, LoRALinear) for m in model.modules())


def test_an_offloaded_layer_is_refused():
    model = make_model()
    model.blocks[2].up.to("meta")
    with pytest.raises(ValueError, match=r"blocks\.2\.up has parameters on the meta device"):
        merge_lora(model)
    assert isinstance(model.blocks[0].up, LoRALinear)


def test_a_sharded_layer_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    place = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for operation in (merge_lora, dequantize_layers):
            message = rf"{operation.__name__}: .* is a DTensor .*before fully_shard"
            with pytest.raises(ValueError, match=message):
                operation(model)
    finally:
        dist.destroy_process_group()


def test_a_model_without_lora_or_that_is_one_layer_is_refused():
    with pytest.raises(ValueError, match="merge_lora: the model has no LoRALinear"):
        merge_lora(Model())
    layer = lora_layer(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="merge_lora: the model is itself the layer to replace"):
        merge_lora(layer)


def test_a_report_of_no_layers_has_no_worst():
    report = MergeReport(into="bfloat16", base="", layers=())
    assert report.worst_lost_of_update is None
    assert report.worst() == ()
    assert "Merged 0 layers" in str(report)
