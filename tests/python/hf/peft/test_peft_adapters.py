"""Several adapters on one NF4 base, and adapters that are merged into it, against PEFT's own."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    add_adapter,
    anatomy,
    assert_near,
    assert_same_bits,
    assert_same_model,
    assert_untouched,
    base_bits,
    gradients,
    logits,
    lora,
    peft_twins,
    quietly,
    stretch_magnitudes,
    tokens,
    twins,
    with_adapter,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_native import NF4Linear, merge_lora, set_lora
from qlora_native.hf.peft import NF4LoraLinear


def two_adapters(first: LoraConfig | None = None, second: LoraConfig | None = None):
    pair = peft_twins(first or lora())
    for model in pair:
        add_adapter(model, "other", second or lora(r=7, lora_alpha=3, target_modules=["q_proj"]))
    return pair


# ---- which are active


def test_a_second_adapter_is_added_frozen_and_switched_to():
    ours, theirs = two_adapters()
    assert_same_model(ours, theirs, tokens())
    before = logits(ours, tokens())
    for model in (ours, theirs):
        model.set_adapter("other")
    assert_same_model(ours, theirs, tokens())
    assert not torch.equal(logits(ours, tokens()), before)


def test_several_active_adapters_add_up():
    ours, theirs = two_adapters()
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert_same_model(ours, theirs, tokens())
    assert len(gradients(ours, tokens())) == 2 * (7 * 2 + 2)


def test_disabled_adapters_leave_the_base():
    nf4, _ = twins()
    wanted = logits(nf4, tokens())
    model = with_adapter(nf4, lora())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), wanted)
    assert not torch.equal(logits(model, tokens()), wanted)


def test_deleting_an_adapter_leaves_the_other():
    ours, theirs = two_adapters()
    for model in (ours, theirs):
        quietly(model.delete_adapter, "default")
    assert_same_model(ours, theirs, tokens())
    assert not any("default" in name for name in ours.state_dict())


def test_deleting_an_adapter_that_set_lora_has_put_in_force_gives_peft_s_active_one():
    model, _ = two_adapters()
    add_adapter(model, "third", lora(r=2))
    default = logits(model, tokens())
    set_lora(model, "third")
    third = logits(model, tokens())
    model.delete_adapter("other")
    assert torch.equal(logits(model, tokens()), third)
    with model.disable_adapter():
        model.delete_adapter("third")
    assert torch.equal(logits(model, tokens()), default)


@pytest.mark.parametrize(
    "settings",
    [
        {"combination_type": "linear"},
        {"combination_type": "cat"},
        {"combination_type": "svd"},
        {"combination_type": "ties", "density": 0.5},
        {"combination_type": "dare_linear_svd", "density": 0.5},
    ],
    ids=lambda settings: settings["combination_type"],
)
def test_weighted_adapters_are_those_of_peft(settings):
    ours, theirs = two_adapters(second=lora(r=4, lora_alpha=3))
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mixed", **settings)
        model.set_adapter("mixed")
    # The factors of a decomposition have free signs; their product has not.
    assert_near(logits(ours, tokens()), logits(theirs, tokens()), relative=1e-3)


def test_adapters_that_set_lora_put_in_force_are_those_of_set_adapter():
    model, _ = two_adapters()
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = logits(model, tokens())
    with model.disable_adapter():
        wanted[None] = logits(model, tokens())
    for name, result in wanted.items():
        set_lora(model, name)
        assert torch.equal(logits(model, tokens()), result)
    set_lora(model, ["other", "default", "__base__"])
    each = [wanted[name][i] for i, name in enumerate(("other", "default", None))]
    assert_near(logits(model, tokens()), torch.stack(each))


def test_the_later_of_set_lora_and_set_adapter_holds():
    model, _ = two_adapters()
    default = logits(model, tokens())
    set_lora(model, "other")
    other = logits(model, tokens())
    assert not torch.equal(default, other)
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, tokens()), other)  # switching off and on ends nothing
    with model.disable_adapter():
        set_lora(model, "default")
        model.disable_adapter_layers()  # again
    assert torch.equal(logits(model, tokens()), default)  # nor is what is said meanwhile lost
    set_lora(model, "other")
    add_adapter(model, "third", lora())
    assert torch.equal(logits(model, tokens()), other)  # nor does another adapter
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens()), default)


def test_an_adapter_switched_between_forward_and_recomputation_is_noticed():
    model, _ = two_adapters(second=lora())
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="another routing"):
        loss.backward()


def test_adapters_disabled_at_the_recomputation_are_noticed():
    model, _ = two_adapters()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with model.disable_adapter():
        logits(model, tokens())  # as for a reference model: nothing is recomputed
        with pytest.raises(RuntimeError, match="another routing"):
            loss.backward()
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with model.disable_adapter():
        logits(model, tokens())
    loss.backward()


# ---- hot-swap


def saved(model: nn.Module, path) -> str:
    model.save_pretrained(path)
    return str(path)


def test_hotswap_brings_the_other_adapter_and_leaves_the_base(tmp_path):
    nf4, _ = twins()
    second = with_adapter(nf4, lora(r=6, lora_alpha=5, init_lora_weights=False))
    wanted = logits(second, tokens())
    folder = saved(second, tmp_path / "second")
    model = with_adapter(second.unload(), lora())
    bits = base_bits(model)
    pointers = [p.data_ptr() for p in model.parameters() if p.dtype == torch.uint8]
    assert not torch.equal(logits(model, tokens()), wanted)
    hotswap_adapter(model, folder, adapter_name="default")
    assert torch.equal(logits(model, tokens()), wanted)
    assert_same_bits(base_bits(model), bits)
    assert pointers == [p.data_ptr() for p in model.parameters() if p.dtype == torch.uint8]


def test_hotswap_of_other_ranks_and_scalings_never_recompiles(tmp_path):
    nf4, _ = twins()
    folders, results = [], []
    for r, alpha in ((6, 5), (2, 9), (4, 4)):
        model = with_adapter(nf4, lora(r=r, lora_alpha=alpha))
        results.append(logits(model.eval(), tokens()))
        folders.append(saved(model, tmp_path / str(r)))
        nf4 = model.unload()
    model = with_adapter(nf4, lora()).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    logits(model, tokens())
    first = len(compilations)
    assert first >= 1
    for folder, wanted in zip(folders, results, strict=True):
        hotswap_adapter(model, folder, adapter_name="default")
        assert_near(logits(model, tokens()), wanted)
    assert len(compilations) == first


# ---- merging


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_is_peft_s_on_the_dense_twin_and_unmerge_restores_all_bits(use_dora, safe_merge):
    ours, theirs = peft_twins(lora(use_dora=use_dora), bias=True)
    stretch_magnitudes(ours, theirs)
    before, bits = logits(ours, tokens()), base_bits(ours)
    for model in (ours, theirs):
        model.merge_adapter(safe_merge=safe_merge)
    assert_near(logits(ours, tokens()), logits(theirs, tokens()))
    assert_near(logits(ours, tokens()), before)
    ours.unmerge_adapter()
    assert_same_bits(base_bits(ours), bits)
    assert torch.equal(logits(ours, tokens()), before)


def test_adapters_merge_one_after_another_and_by_name():
    ours, theirs = two_adapters()
    for model in (ours, theirs):
        model.merge_adapter(["other"])
        quietly(model.merge_adapter, ["default", "other"])
    assert_near(logits(ours, tokens()), logits(theirs, tokens()))
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.merged_adapters == ["other", "default"]
    for model in (ours, theirs):
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "other"])
    assert_same_model(ours, theirs, tokens())


def test_lora_bias_merges_where_there_is_a_bias_and_is_refused_elsewhere():
    ours, theirs = peft_twins(lora(lora_bias=True), bias=True)
    others = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, bias in ours.named_parameters():
            if name.endswith("lora_B.default.bias"):
                others[name].copy_(bias.normal_())
    for model in (ours, theirs):
        model.merge_adapter()
    assert_near(logits(ours, tokens()), logits(theirs, tokens()))
    merged = [model.merge_and_unload() for model in map(quietly_unmerged, (ours, theirs))]
    assert_near(*(logits(model, tokens()) for model in merged))

    model = quietly(with_adapter, twins()[0], lora(lora_bias=True))
    before = anatomy(model)
    with pytest.raises(RuntimeError, match="no bias to merge"):
        model.merge_and_unload()
    assert_untouched(model, before)


def quietly_unmerged(model):
    model.unmerge_adapter()
    return model


def test_safe_merge_finds_a_nan_and_leaves_the_model_unmerged():
    ours, _ = peft_twins(lora())
    layer = ours.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = float("nan")
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        before = anatomy(ours)
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        assert_untouched(ours, before)
        assert not any(m.merged for m in ours.modules() if isinstance(m, NF4LoraLinear))


def test_safe_merge_finds_what_is_finite_in_fp32_alone():
    model = with_adapter(twins()[0].to(torch.float16), lora(target_modules=["up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(300.0)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(m.merged for m in model.modules() if isinstance(m, NF4LoraLinear))


def test_safe_merge_finds_a_nan_in_a_dense_layer_and_leaves_the_nf4_ones_unmerged():
    ours, _ = peft_twins(lora(target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        ours.base_model.model.lm_head.lora_B["default"].weight[3, 1] = float("nan")
    before = anatomy(ours)
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert_untouched(ours, before)
    assert not any(m.merged for m in ours.modules() if isinstance(m, NF4LoraLinear))


def test_a_merged_model_refuses_adapter_names_and_set_lora():
    model, _ = two_adapters()
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(input_ids=tokens(), adapter_names=["default"] * 3)
    set_lora(model, "other")
    with pytest.raises(ValueError, match=r"'other' in force.*merged; call unmerge_adapter"):
        model(input_ids=tokens())


def test_a_merge_does_not_guess_between_set_lora_and_set_adapter():
    model, _ = two_adapters()
    set_lora(model.eval(), "other")
    wanted, before = logits(model, tokens()), anatomy(model)
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        functools.partial(merge_lora, model),
    ):
        with pytest.raises(
            ValueError, match=r"active adapters are \['default'\].*'other' in force"
        ):
            merge()
        assert_untouched(model, before)
    model.merge_adapter(adapter_names=["other"])
    model.unmerge_adapter()
    set_lora(model, "default")  # which is the active one
    model.merge_adapter()
    model.unmerge_adapter()
    assert_near(logits(model.merge_and_unload(adapter_names=["other"]), tokens()), wanted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_and_unload_leaves_a_dense_model_that_loads_in_transformers(tmp_path, use_dora):
    nf4, dense = twins()
    nf4, dense = nf4.bfloat16(), dense.bfloat16()
    config = lora(target_modules=["q_proj", "up_proj"], use_dora=use_dora)
    ours, theirs = (with_adapter(model, config) for model in (nf4, dense))
    stretch_magnitudes(ours, theirs)
    wanted = {
        name: layer.merged_weight(["default"]).bfloat16()
        for name, layer in ours.base_model.model.named_modules()
        if isinstance(layer, NF4LoraLinear)
    }
    dense_of = dict(theirs.base_model.model.named_modules())
    merged = ours.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    for name, module in merged.named_modules():
        assert not isinstance(module, NF4Linear)
        if isinstance(module, nn.Linear):
            assert module.weight.dtype == torch.bfloat16
            if name in wanted:
                assert torch.equal(module.weight, wanted[name])
            elif name != "lm_head":
                assert torch.equal(module.weight, dense_of[name].weight)
    assert not hasattr(merged, "hf_quantizer")
    assert not hasattr(merged, "peft_config")
    merged.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(dict(again.state_dict()), dict(merged.state_dict()))


def test_unload_gives_the_nf4_model_back():
    nf4, _ = twins()
    before, wanted = base_bits(nf4), logits(nf4, tokens())
    model = with_adapter(nf4, lora()).unload()
    assert_same_bits(base_bits(model), before)
    assert torch.equal(logits(model, tokens()), wanted)
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14

    # What is merged stays merged, as with PEFT's own layers; half a model in 4 bits cannot be.
    peft_model = get_peft_model(model, lora(target_modules=["q_proj"]))
    peft_model.merge_adapter()
    wanted = logits(peft_model, tokens())
    unloaded = peft_model.unload()
    assert_near(logits(unloaded, tokens()), wanted)
    assert not any(isinstance(m, NF4Linear) for m in unloaded.modules())


def test_a_mixed_model_merges_and_unloads_too():
    ours, theirs = (get_peft_model(model, lora(), mixed=True) for model in twins())
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) / 8 for k, v in theirs.state_dict().items() if "lora_" in k}
    for model in (ours, theirs):
        model.load_state_dict(state, strict=False)
    assert_same_model(ours, theirs, tokens())
    merged = [model.merge_and_unload() for model in (ours, theirs)]
    assert not any(isinstance(m, NF4Linear) for m in merged[0].modules())
    assert_near(*(logits(model, tokens()) for model in merged))

    nf4, _ = twins()
    wanted = logits(nf4, tokens())
    unloaded = get_peft_model(nf4, lora(), mixed=True).unload()
    assert torch.equal(logits(unloaded, tokens()), wanted)


def test_a_merged_model_follows_casts_and_saves_its_adapter(tmp_path):
    model = with_adapter(twins()[0], lora())
    wanted = logits(model, tokens())
    model.merge_adapter()
    assert not any("held" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert_near(logits(model.double().float(), tokens()), wanted)
