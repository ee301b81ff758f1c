"""What cannot be right on NF4 raises and says so, and the model is as it was."""

import dataclasses
import functools

import pytest
import torch
from peft import (
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    replace_lora_weights_loftq,
)
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.hotswap import hotswap_adapter
from peft_models import (
    add_adapter,
    anatomy,
    assert_untouched,
    logits,
    lora,
    quietly,
    tiny_llama,
    tokens,
    twins,
    with_adapter,
)
from safetensors.torch import load_file, save_file

from qlora_native import add_lora, quantize_model
from qlora_native.hf import load_lora, save_lora

BAD_NUMBERS = {
    "r": [
        (lora(r=0), "r is 0, want an integer from 1 to 64"),
        (lora(r=-3), "r is -3"),
        (lora(r=33), r"k_proj: r is 33, want an integer from 1 to 32 for a layer \[32, 64\]"),
        (lora(rank_pattern={"down_proj": 65}), r"down_proj: r is 65.*1 to 64.*\[64, 96\]"),
    ],
    "lora_dropout": [
        (lora(lora_dropout=1.0), "lora_dropout is 1.0, want 0 <= p < 1"),
        (lora(lora_dropout=-0.1), "lora_dropout is -0.1"),
    ],
    "lora_alpha": [(lora(lora_alpha=float("nan")), "lora_alpha is nan")],
}


@pytest.mark.parametrize(
    ("config", "message"), [case for cases in BAD_NUMBERS.values() for case in cases]
)
def test_numbers_out_of_range(config, message):
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert_untouched(model, before)


UNSUPPORTED = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "mica": {"init_lora_weights": "mica"},
    "use_qalora": {"use_qalora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3, 4]},
    "velora_config": {"velora_config": VeloraConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "kasa_config": {"kasa_config": KasaConfig()},
    "use_bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
    "ephemeral_gpu_offload": {
        "use_dora": True,
        "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True),
    },
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_variants_and_initialisations_that_need_a_dense_weight(name):
    settings = dict(UNSUPPORTED[name])
    init = settings.pop("init_lora_weights", False)
    config = quietly(lora, **settings, target_modules=["q_proj", "up_proj"])
    config.init_lora_weights = init  # now, as LoraConfig looks for the packages that it takes
    model, _ = twins()
    before, wanted = anatomy(model), logits(model, tokens())
    with pytest.raises(NotImplementedError, match=name):
        quietly(get_peft_model, model, config)
    assert_untouched(model, before)
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model, tokens()), wanted)


def test_every_variant_that_peft_knows_is_supported_or_refused():
    """A variant that a later PEFT brings is refused as well, by its field's metadata."""
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants <= {"use_dora", "arrow_config", *UNSUPPORTED}


def test_arrow_is_refused():
    from peft import ArrowConfig

    model = with_adapter(twins()[0], lora(), adapter_name="task")
    before = anatomy(model)
    config = LoraConfig(arrow_config=ArrowConfig(top_k=1), r=4, target_modules="all-linear")
    with pytest.raises((NotImplementedError, ValueError), match="arrow"):
        model.add_adapter("router", config)
    assert_untouched(model, before)


def test_a_second_adapter_that_cannot_be_leaves_the_first_alone():
    model = with_adapter(twins()[0], lora(target_modules=["q_proj"]))
    before, wanted = anatomy(model), logits(model, tokens())
    for config, error in (
        (lora(r=40), ValueError),
        (lora(init_lora_weights="olora"), NotImplementedError),
        (lora(modules_to_save=["up_proj"]), NotImplementedError),
        (lora(target_modules=["nothing"]), NoMatchingPeftModuleError),
    ):
        with pytest.raises(error):
            add_adapter(model, "second", config)
        assert_untouched(model, before)
        assert list(model.peft_config) == ["default"]
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert list(layer.scaling) == ["default"]
        assert layer.active_adapters == ["default"]
    assert torch.equal(logits(model, tokens()), wanted)
    add_adapter(model, "second", lora())


def test_unknown_targets_are_told_what_there_is():
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(
        NoMatchingPeftModuleError,
        match=r"query.*linear layers are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, "
        "up_proj, v_proj",
    ):
        get_peft_model(model, lora(target_modules=["query", "value"]))
    assert_untouched(model, before)
    with pytest.raises(NoMatchingPeftModuleError, match="down_proj"):
        inject_adapter_in_model(lora(target_modules=["query"]), model)
    assert_untouched(model, before)


def test_one_unknown_target_among_others_is_warned_of():
    with pytest.warns(UserWarning, match="'query', which match no module.*down_proj, gate_proj"):
        with_adapter(twins()[0], lora(target_modules=["q_proj", "query"]))


@pytest.mark.parametrize("names", [["up_proj"], ["mlp"], ["lm_head", "layers.0.self_attn.q_proj"]])
def test_a_4_bit_layer_in_modules_to_save(names):
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(NotImplementedError, match=r"modules_to_save has .*NF4Linear"):
        get_peft_model(model, lora(target_modules=["v_proj"], modules_to_save=names))
    assert_untouched(model, before)


def test_layers_that_were_replicated_for_nothing_are_gone_again():
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(ValueError, match="r is 50"):
        get_peft_model(model, lora(r=50, layer_replication=[[0, 2], [1, 2]]))
    assert_untouched(model, before)
    assert model.config.num_hidden_layers == 2


def test_a_4_bit_weight_in_target_parameters():
    model, _ = twins()
    before = anatomy(model)
    config = lora(target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(NotImplementedError, match=r"target_parameters names 'weight'.*NF4Linear"):
        get_peft_model(model, config)
    assert_untouched(model, before)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_for_another_base_lists_the_shapes(tmp_path, whole):
    with_adapter(quantize_model(tiny_llama(hidden_size=128)), lora()).save_pretrained(tmp_path)
    model, _ = twins()
    if not whole:
        model = with_adapter(model, lora())
    before = anatomy(model)
    load = model.load_adapter if not whole else functools.partial(PeftModel.from_pretrained, model)
    with pytest.raises(RuntimeError, match=r"\[4, 128\].*\[4, 64\]"):
        load(tmp_path, "other")
    assert_untouched(model, before)
    if not whole:
        assert list(model.peft_config) == ["default"]


def test_an_adapter_for_a_base_with_more_layers_names_what_does_not_fit(tmp_path):
    deeper = quantize_model(tiny_llama(num_hidden_layers=3))
    with_adapter(deeper, lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"2 tensors .*layers\.2\.self_attn\.q_proj\.lora_A"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_untouched(model, before)


def test_loading_over_an_adapter_that_is_there_changes_it_whole_or_not_at_all(tmp_path):
    other = with_adapter(twins()[0], lora())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    other.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    last = max(tensors)
    bad_shape = {**tensors, last: torch.zeros(3, 3)}
    bad_layer = {**tensors, last.replace("layers.1", "layers.7"): tensors[last].clone()}
    model = with_adapter(twins()[0], lora())
    before = anatomy(model)
    for bad, message in ((bad_shape, "size mismatch"), (bad_layer, r"layers\.7")):
        save_file(bad, file)
        with pytest.raises((RuntimeError, ValueError), match=message):
            model.load_adapter(tmp_path, "default")
        assert_untouched(model, before)
    save_file(tensors, file)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, tokens()), logits(other, tokens()))


def test_a_models_own_load_adapter_leaves_nothing_out_either(tmp_path):
    deeper = quantize_model(tiny_llama(num_hidden_layers=3))
    with_adapter(deeper, lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"2 tensors .*layers\.2\.self_attn\.q_proj\.lora_A"):
        model.load_adapter(str(tmp_path))
    assert_untouched(model, before)


@pytest.mark.parametrize(("hidden", "heads"), [(32, 2), (128, 4)])
def test_an_adapter_for_another_base_is_not_swapped_in(tmp_path, hidden, heads):
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    another = quantize_model(tiny_llama(hidden_size=hidden, **shape))
    with_adapter(another, lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = with_adapter(twins()[0], lora(target_modules=["q_proj"]))
    before = anatomy(model)
    message = rf"4 tensors.*q_proj\.lora_A\.default\.weight is \[4, {hidden}\], want \['r', 64\]"
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert_untouched(model, before)


def test_a_models_own_add_adapter_and_load_adapter_leave_it_as_it_was(tmp_path):
    with_adapter(twins()[0], lora()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model, _ = twins()
    before, attributes = anatomy(model), dict(vars(model))
    with pytest.raises(ValueError, match="r is 40"):
        model.add_adapter(lora(r=40))
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|metadata"):
        model.load_adapter(str(tmp_path))
    assert_untouched(model, before)
    assert vars(model) == attributes
    model.add_adapter(lora())


def test_a_truncated_adapter_leaves_the_model_as_it_was(tmp_path):
    with_adapter(twins()[0], lora()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model, _ = twins()
    before = anatomy(model)
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|metadata"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["4-bit", "dense"])
def test_native_adapters_are_not_put_among_pefts(tmp_path, kind):
    model = with_adapter(twins()[kind == "dense"], lora())
    before = anatomy(model)
    for call in (
        functools.partial(add_lora, r=2, adapter_name="other"),
        functools.partial(save_lora, directory=tmp_path / "never"),
        functools.partial(load_lora, directory=tmp_path / "never"),
    ):
        with pytest.raises(ValueError, match=r"q_proj is a layer of PEFT.*save_pretrained"):
            call(model)
    assert_untouched(model, before)
    assert not (tmp_path / "never").exists()


def test_pefts_adapters_are_not_put_among_native_ones(tmp_path):
    with_adapter(twins()[0], lora()).save_pretrained(tmp_path)
    model = add_lora(twins()[0], r=2)
    before = anatomy(model)
    for call in (
        functools.partial(get_peft_model, model, lora()),
        functools.partial(PeftModel.from_pretrained, model, tmp_path),
        functools.partial(model.add_adapter, lora()),
    ):
        with pytest.raises(ValueError, match=r"adapters of add_lora.*q_proj"):
            call()
        assert_untouched(model, before)


def test_loftq_s_replacement_refuses(tmp_path):
    model = with_adapter(twins()[0], lora())
    tiny_llama().save_pretrained(tmp_path)
    before = anatomy(model)
    with pytest.raises(ValueError, match="bnb"):
        replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
    assert_untouched(model, before)


def test_fan_in_fan_out_is_corrected_with_a_warning():
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        model = with_adapter(twins()[0], lora(fan_in_fan_out=True))
    wanted = with_adapter(twins()[0], lora())
    assert torch.equal(logits(model, tokens()), logits(wanted, tokens()))
    assert not model.peft_config["default"].fan_in_fan_out
