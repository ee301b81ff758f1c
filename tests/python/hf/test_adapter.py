"""Adapters travel between this library and PEFT without a change."""

import copy
import json
import struct
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_native import (
    LoRALinear,
    NF4Linear,
    add_lora,
    delete_lora,
    merge_lora,
    quantize_model,
    set_lora,
)
from qlora_native.hf import load_lora, save_lora

TOKENS = torch.arange(2 * 12).reshape(2, 12) * 5 % 96


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def make_dense_twin(quantized):
    """The same model with dense layers that hold the dequantised weights."""
    twin = copy.deepcopy(quantized)
    layers = [(name, m) for name, m in twin.named_modules() if isinstance(m, NF4Linear)]
    for name, layer in layers:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data.copy_(layer.dequantize(torch.float32))
        twin.set_submodule(name, dense)
    return twin


def randomize_lora_b(model):
    """B starts at zero; an adapter that does nothing would prove nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.1)
            elif name.endswith(("magnitude", "magnitude_vector.default.weight")):
                parameter *= torch.rand_like(parameter) + 0.5
    return model


def factors_of(model, adapter_name="default"):
    """Copies of every parameter of an adapter, by name without the adapter's."""
    return {
        name.replace(f".adapters.{adapter_name}.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f".adapters.{adapter_name}." in name
    }


def same_factors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.fixture
def quantized():
    return quantize_model(make_llama())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj"]])
def test_peft_loads_what_is_saved_here(quantized, tmp_path, use_rslora, target_modules):
    dense = make_dense_twin(quantized)
    base_logits = logits(quantized)
    add_lora(quantized, r=4, lora_alpha=6, use_rslora=use_rslora, target_modules=target_modules)
    randomize_lora_b(quantized)
    save_lora(quantized, tmp_path)

    expected = logits(quantized)
    by_peft = peft.PeftModel.from_pretrained(dense, tmp_path)
    assert (expected - base_logits).abs().max() > 0.01
    torch.testing.assert_close(logits(by_peft), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saves_loads_here(quantized, tmp_path, use_rslora):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=use_rslora,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"model.layers.1.self_attn.q_proj": 2},
        alpha_pattern={"up_proj": 3},
        init_lora_weights=False,
    )
    torch.manual_seed(2)
    by_peft = peft.get_peft_model(make_dense_twin(quantized), config).eval()
    by_peft.save_pretrained(tmp_path)

    load_lora(quantized, tmp_path).eval()
    torch.testing.assert_close(logits(quantized), logits(by_peft), rtol=1e-4, atol=1e-5)
    layers = {name: m for name, m in quantized.named_modules() if isinstance(m, LoRALinear)}
    assert len(layers) == 6
    assert layers["model.layers.1.self_attn.q_proj"].r == 2
    assert layers["model.layers.0.self_attn.q_proj"].r == 4
    assert layers["model.layers.0.mlp.up_proj"].lora_alpha == 3
    assert all(layer.lora_dropout == 0.1 for layer in layers.values())
    trained = {name for name, p in quantized.named_parameters() if p.requires_grad}
    assert trained == {
        f"{name}.adapters.default.lora_{factor}" for name in layers for factor in "ab"
    }


def test_round_trip_is_exact_on_a_fresh_and_on_an_equipped_model(quantized, tmp_path):
    fresh, equipped = copy.deepcopy(quantized), add_lora(copy.deepcopy(quantized), r=4)
    save_lora(randomize_lora_b(add_lora(quantized, r=4)), tmp_path)
    expected = logits(quantized)
    assert torch.equal(logits(load_lora(fresh, tmp_path)), expected)
    assert not torch.equal(logits(equipped), expected)
    assert torch.equal(logits(load_lora(equipped, tmp_path)), expected)


def test_layers_of_different_rank_and_alpha_are_saved(quantized, tmp_path):
    dense = make_dense_twin(quantized)
    fresh = copy.deepcopy(quantized)
    add_lora(quantized, r=4, lora_alpha=8)
    name = "model.layers.1.mlp.gate_proj"
    base = quantized.get_submodule(name).base
    quantized.set_submodule(name, LoRALinear(base, r=8, lora_alpha=4).eval())
    save_lora(randomize_lora_b(quantized), tmp_path)

    expected = logits(quantized)
    assert torch.equal(logits(load_lora(fresh, tmp_path)), expected)
    by_peft = peft.PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(by_peft), expected, rtol=1e-4, atol=1e-5)


def test_files_have_pefts_form(quantized, tmp_path):
    save_lora(add_lora(quantized, r=4), tmp_path / "new" / "folder", "some/base")
    folder = tmp_path / "new" / "folder"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 2 * 2 * 7
        prefix = "base_model.model.model.layers.0.mlp.down_proj"
        assert file.get_slice(f"{prefix}.lora_A.weight").get_shape() == [4, 160]
        assert file.get_slice(f"{prefix}.lora_B.weight").get_shape() == [64, 4]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert peft.LoraConfig.from_pretrained(folder).r == 4


def test_whole_names_are_used_where_short_ones_would_hit_too_much(quantized, tmp_path):
    dense = make_dense_twin(quantized)
    target = "model.layers.1.self_attn.q_proj"
    save_lora(randomize_lora_b(add_lora(quantized, r=4, target_modules=[target])), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [target]
    by_peft = peft.PeftModel.from_pretrained(dense, tmp_path)
    torch.testing.assert_close(logits(by_peft), logits(quantized), rtol=1e-4, atol=1e-5)


def test_names_that_peft_could_not_tell_apart_are_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "outer": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    model["a"] = LoRALinear(model["a"], r=2)
    with pytest.raises(ValueError, match=r"these as well, which have no LoRA: outer\.a"):
        save_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_model_without_lora_and_mixed_dropout(quantized, tmp_path):
    with pytest.raises(ValueError, match="has no LoRALinear"):
        save_lora(quantized, tmp_path)
    add_lora(quantized, r=4)
    quantized.model.layers[0].mlp.up_proj.adapters["default"].lora_dropout = 0.5
    with pytest.raises(ValueError, match=r"lora_dropout are \[0\.0, 0\.5\], want one value"):
        save_lora(quantized, tmp_path)


def tensors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_factors_keep_their_bits_from_here_to_peft_and_back(
    quantized, tmp_path, use_rslora, use_dora
):
    dense, fresh = make_dense_twin(quantized), copy.deepcopy(quantized)
    options = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora, "use_dora": use_dora}
    randomize_lora_b(add_lora(quantized, **options, adapter_name="mine"))
    save_lora(quantized, tmp_path / "ours", adapter_name="mine")
    by_peft = peft.PeftModel.from_pretrained(dense, tmp_path / "ours")
    torch.testing.assert_close(logits(by_peft), logits(quantized), rtol=1e-4, atol=1e-5)
    by_peft.save_pretrained(tmp_path / "peft")

    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    assert len(ours) == (3 if use_dora else 2) * 2 * 7
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    load_lora(fresh, tmp_path / "peft", "back")
    assert same_factors(factors_of(fresh, "back"), factors_of(quantized, "mine"))
    assert torch.equal(logits(fresh), logits(quantized))


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_peft_trains_computes_the_same_here(quantized, tmp_path, use_dora):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
    by_peft = peft.get_peft_model(make_dense_twin(quantized), config)
    optimizer = torch.optim.SGD([p for p in by_peft.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        by_peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    by_peft.eval().save_pretrained(tmp_path)
    base_logits = logits(quantized)
    load_lora(quantized, tmp_path)
    assert (logits(quantized) - base_logits).abs().max() > 0.01
    torch.testing.assert_close(logits(quantized), logits(by_peft), rtol=1e-4, atol=1e-5)


# ---- several adapters


def test_several_adapters_are_saved_and_loaded_by_name(quantized, tmp_path):
    fresh = copy.deepcopy(quantized)
    add_lora(quantized, r=4, adapter_name="a")
    add_lora(quantized, r=2, target_modules=["up_proj"], adapter_name="b", use_dora=True)
    randomize_lora_b(quantized)
    for name in ("a", "b"):
        save_lora(quantized, tmp_path / name, adapter_name=name)
    load_lora(fresh, tmp_path / "b", "second")
    load_lora(fresh, tmp_path / "a", "first")
    for ours, theirs in (("a", "first"), ("b", "second")):
        assert same_factors(factors_of(fresh, theirs), factors_of(quantized, ours))
        set_lora(quantized, ours)
        set_lora(fresh, theirs)
        assert torch.equal(logits(fresh), logits(quantized))
    set_lora(quantized, ["b", "a"])
    set_lora(fresh, ["second", "first"])
    assert torch.equal(logits(fresh), logits(quantized))


def test_save_asks_which_of_several(quantized, tmp_path):
    add_lora(quantized, r=4, adapter_name="a")
    add_lora(quantized, r=4, adapter_name="b")
    with pytest.raises(ValueError, match=r"adapter_name is None, .* several adapters: 'a', 'b'"):
        save_lora(quantized, tmp_path)
    for wrong in ("c", "__base__"):
        with pytest.raises(ValueError, match=f"no adapter '{wrong}'; there are: 'a', 'b'"):
            save_lora(quantized, tmp_path, adapter_name=wrong)
    assert not list(tmp_path.iterdir())
    set_lora(quantized, None)
    save_lora(delete_lora(quantized, "a"), tmp_path)


def test_target_names_look_past_the_layers_of_other_adapters(quantized, tmp_path):
    add_lora(quantized, r=4, adapter_name="everywhere")
    target = "model.layers.1.self_attn.q_proj"
    add_lora(quantized, r=2, target_modules=[target], adapter_name="one")
    save_lora(quantized, tmp_path, adapter_name="one")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [target]
    assert config["r"] == 2


def test_a_rank_is_not_given_to_a_layer_whose_name_ends_alike(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        return nn.ModuleDict({"a": nn.Linear(8, 8), "outer": inner})

    model = add_lora(make(), r=2)
    model["a"] = LoRALinear(model["a"].base, r=4, lora_alpha=3)
    save_lora(model, tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert get_pattern_key(config.rank_pattern, "a") == "^a"
    assert get_pattern_key(config.rank_pattern, "outer.a") == "outer.a"
    loaded = load_lora(make(), tmp_path)
    assert same_factors(factors_of(loaded), factors_of(model))
    assert (loaded["a"].r, loaded["outer"]["a"].r) == (4, 2)


# ---- loading over an adapter that is there


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_hot_swap_writes_the_factors_where_they_lie(quantized, tmp_path, use_dora):
    def adapter(seed):
        model = add_lora(copy.deepcopy(quantized), r=4, use_dora=use_dora)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                nn.init.normal_(parameter, std=0.1)
        save_lora(model, tmp_path / str(seed))
        return model

    models = [adapter(seed) for seed in range(3)]
    served = load_lora(quantized, tmp_path / "0", "served").requires_grad_(False)
    parameters = {name: (p, p.data_ptr()) for name, p in served.named_parameters()}
    base = {n: p.clone() for n, p in served.named_parameters() if ".adapters." not in n}
    for seed in (1, 2, 0):
        assert load_lora(served, tmp_path / str(seed), "served") is served
        assert torch.equal(logits(served), logits(models[seed]))
        for name, parameter in served.named_parameters():
            assert parameters[name] == (parameter, parameter.data_ptr())
            assert not parameter.requires_grad
            if name in base:
                assert torch.equal(parameter, base[name])


def test_a_hot_swap_compiles_nothing_again(tmp_path):
    counter = CompileCounter()
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    for seed in range(3):
        other = randomize_lora_b(add_lora(copy.deepcopy(model), r=4))
        nn.init.normal_(other[0].lora_a, std=float(seed + 1))
        save_lora(other, tmp_path / str(seed))
    load_lora(model, tmp_path / "0")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, 64)
    outputs = []
    for seed in range(3):
        load_lora(model, tmp_path / str(seed))
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], model(x))
    assert not torch.equal(outputs[0], outputs[1])
    assert counter.frame_count == 1


def test_factors_are_converted_to_the_dtype_of_those_that_are_there(quantized, tmp_path):
    save_lora(randomize_lora_b(add_lora(copy.deepcopy(quantized), r=4)), tmp_path)
    in_16_bits = add_lora(quantized, r=4).to(torch.bfloat16)
    load_lora(in_16_bits, tmp_path)
    factors = factors_of(in_16_bits)
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}
    saved = tensors_in(tmp_path)["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert torch.equal(factors["model.layers.0.mlp.up_proj.lora_b"], saved.bfloat16())
    save_lora(in_16_bits, tmp_path)
    saved = tensors_in(tmp_path)["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert torch.equal(factors["model.layers.0.mlp.up_proj.lora_b"], saved)


def test_a_save_that_fails_leaves_the_older_adapter(quantized, tmp_path, monkeypatch):
    save_lora(add_lora(quantized, r=4), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomize_lora_b(quantized)

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_lora(quantized, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_merged_model_is_not_loaded_into(quantized, tmp_path):
    save_lora(randomize_lora_b(add_lora(quantized, r=4)), tmp_path)
    merge_lora(quantized, reversible=True)
    for name in ("default", "other"):
        with pytest.raises(ValueError, match="load_lora: adapters are merged; call unmerge_lora"):
            load_lora(quantized, tmp_path, name)


def test_unknown_settings_are_named(quantized, tmp_path):
    save_lora(add_lora(copy.deepcopy(quantized), r=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_new": 3, "use_old": False}))
    with pytest.warns(UserWarning, match="not known here and have no effect: use_new=3$"):
        load_lora(quantized, tmp_path)


class TestLoadRefuses:
    """Every refusal names what differs and leaves the model as it was."""

    @pytest.fixture
    def folder(self, quantized, tmp_path):
        save_lora(randomize_lora_b(add_lora(copy.deepcopy(quantized), r=4)), tmp_path)
        return tmp_path

    @pytest.fixture(autouse=True)
    def model_is_left_as_it_was(self, quantized, folder):
        quantized.lm_head.requires_grad_(True)  # load_lora would freeze it
        before = logits(quantized)
        yield
        assert torch.equal(logits(quantized), before)
        assert not any(isinstance(module, LoRALinear) for module in quantized.modules())
        assert quantized.lm_head.weight.requires_grad

    def edit_tensors(self, folder, edit):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def edit_config(self, folder, **changes):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_keys_and_shapes_that_do_not_fit(self, quantized, folder):
        q = "base_model.model.model.layers.0.self_attn.q_proj"

        def edit(tensors):
            del tensors[f"{q}.lora_B.weight"]
            tensors["base_model.model.lm_head.weight"] = torch.zeros(2)
            tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(4, 8)
            tensors["base_model.model.nowhere.lora_B.weight"] = torch.zeros(8, 4)
            name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
            tensors[name] = tensors[name][:3].contiguous()

        self.edit_tensors(folder, edit)
        with pytest.raises(ValueError, match="does not fit the model") as error:
            load_lora(quantized, folder)
        assert set(str(error.value).splitlines()[1:]) == {
            "  base_model.model.lm_head.weight: not a factor of a LoRA layer",
            "  model.layers.0.self_attn.q_proj: lora_B.weight is missing",
            "  nowhere: the model has no such module",
            "  model.layers.1.mlp.up_proj: lora_A is [3, 64], want [4, 64]",
        }

    def test_a_module_that_is_no_linear_layer(self, quantized, folder):
        def edit(tensors):
            for factor in "AB":
                tensors[f"base_model.model.model.norm.lora_{factor}.weight"] = torch.zeros(4, 4)

        self.edit_tensors(folder, edit)
        with pytest.raises(ValueError, match=r"model\.norm: base is LlamaRMSNorm, want"):
            load_lora(quantized, folder)

    def test_layers_that_only_the_model_has(self, quantized, folder):
        def edit(tensors):
            for factor in "AB":
                del tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{factor}.weight"]

        self.edit_tensors(folder, edit)
        equipped = add_lora(copy.deepcopy(quantized), r=4)
        with pytest.raises(ValueError, match=r"0\.mlp\.up_proj: the file has no such layer"):
            load_lora(equipped, folder)

    def test_another_scaling(self, quantized, folder):
        equipped = add_lora(copy.deepcopy(quantized), r=4, lora_alpha=32)
        before = logits(equipped)
        with pytest.raises(ValueError, match=r"is \(4, 16, False, False\), .* is \(4, 32, F"):
            load_lora(equipped, folder)
        assert torch.equal(logits(equipped), before)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"use_dora": True}, "0.self_attn.q_proj: lora_magnitude_vector is missing"),
            ({"use_dora": "yes"}, "use_dora='yes', want true or false"),
            ({"lora_bias": True}, "lora_bias=True, want False"),
            ({"kasa_config": {"a": 1}}, "kasa_config=.*want None"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq', with which PEFT trains"),
            ({"r": 0}, r"self_attn.q_proj: r is 0, want an integer from 1 to 64 for a layer"),
            ({"r": 33}, r"k_proj: r is 33, want an integer from 1 to 32 for a layer \[32, 64\]"),
            ({"r": "4"}, "r='4', want an integer"),
            ({"r": 4.0}, r"r=4\.0, want an integer"),
            ({"r": True}, "r=True, want an integer"),
            ({"lora_alpha": None}, "lora_alpha=None, want a number"),
            ({"lora_alpha": float("nan")}, "lora_alpha=nan, want a number"),
            ({"lora_dropout": "0"}, "lora_dropout='0', want a number"),
            ({"rank_pattern": [1]}, r"rank_pattern=\[1\], want an object"),
            ({"rank_pattern": {"q_proj": "8"}}, r"rank_pattern\['q_proj'\]='8', want an integer"),
            ({"alpha_pattern": {"(": 8}}, r"alpha_pattern with the key '\(', which is no regular"),
            ({"bias": "all"}, "bias='all', want 'none'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*want None"),
            ({"peft_type": "LOHA"}, "peft_type='LOHA', want 'LORA'"),
            ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
            ({"r": 8}, r"lora_A is \[4, 64\], want \[8, 64\]"),
        ],
    )
    def test_a_config_that_means_something_else(self, quantized, folder, change, message):
        self.edit_config(folder, **change)
        with pytest.raises(ValueError, match=message):
            load_lora(quantized, folder)

    def test_names_in_place_of_layers(self, quantized, folder):
        def edit(tensors):
            q = "base_model.model.model.layers.0.self_attn.q_proj"
            for end in ("lora_A.weight", "lora_B.weight"):
                tensors[f"{q}.adapters.default.{end}"] = tensors[f"{q}.{end}"].clone()
                tensors[f"{q}.base.{end}"] = tensors.pop(f"{q}.{end}")
                tensors[f"base_model.model...{end}"] = torch.zeros(4, 4)
                tensors[f"base_model.model.config.{end}"] = torch.zeros(4, 4)

        self.edit_tensors(folder, edit)
        equipped = add_lora(copy.deepcopy(quantized), r=4)
        before = logits(equipped)
        for name in ("default", "new"):
            with pytest.raises(ValueError, match="does not fit the model") as error:
                load_lora(equipped, folder, name)
            lines = str(error.value).splitlines()
            layer = "model.layers.0.self_attn.q_proj"
            assert f"  {layer}.base: the base of a LoRA layer, want {layer}" in lines
            assert "  config: the model has no such module" in lines
            assert any(line.startswith(f"  {layer}.adapters.default: ") for line in lines)
            assert torch.equal(logits(equipped), before)

    def test_an_adapter_for_another_base(self, quantized, folder):
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=160,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        other = quantize_model(LlamaForCausalLM(config))
        with pytest.raises(ValueError, match="does not fit the model") as error:
            load_lora(other, folder)
        lines = str(error.value).splitlines()
        assert "  model.layers.0.mlp.up_proj: lora_A is [4, 64], want [4, 32]" in lines
        assert "  model.layers.0.mlp.down_proj: lora_B is [64, 4], want [32, 4]" in lines
        assert "  model.layers.1.mlp.up_proj: the model has no such module" in lines
        assert not any(isinstance(module, LoRALinear) for module in other.modules())

    def test_codes_in_place_of_factors(self, quantized, folder):
        def edit(tensors):
            for key in tensors:
                tensors[key] = tensors[key].to(torch.int8)

        self.edit_tensors(folder, edit)
        with pytest.raises(ValueError, match=r"lora_A\.weight: torch\.int8, want floating-point"):
            load_lora(quantized, folder)

    def test_a_magnitude_where_the_config_knows_of_none(self, quantized, folder):
        def edit(tensors):
            q = "base_model.model.model.layers.0.self_attn.q_proj"
            tensors[f"{q}.lora_magnitude_vector"] = torch.ones(64)

        self.edit_tensors(folder, edit)
        with pytest.raises(ValueError, match="vector is there, but use_dora is false"):
            load_lora(quantized, folder)

    @pytest.mark.parametrize("name", ["a.b", "", "__base__", "items", None])
    def test_a_name_that_none_can_have(self, quantized, folder, name):
        with pytest.raises(ValueError, match="load_lora: adapter_name is"):
            load_lora(quantized, folder, name)

    def test_settings_of_another_adapter_of_that_name(self, quantized, folder):
        equipped = add_lora(copy.deepcopy(quantized), r=4, adapter_name="a")
        add_lora(equipped, r=4, use_dora=True, adapter_name="b")
        load_lora(equipped, folder, "a")
        before = factors_of(equipped, "b")
        with pytest.raises(ValueError, match=r"is \(4, 16, False, False\), .* 16, False, True\)"):
            load_lora(equipped, folder, "b")
        assert same_factors(factors_of(equipped, "b"), before)

    @pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
    def test_a_truncated_file(self, quantized, folder, cut):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match="cannot be read"):
            load_lora(quantized, folder)

    @pytest.mark.parametrize(
        "header",
        [
            b"[]",
            b"{",
            b'{"a": 1}',
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}',
            b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775807], "data_offsets": [0, 0]}}',
            b"{" * 100_000,
        ],
        ids=range(10),
    )
    def test_a_hostile_file(self, quantized, folder, header):
        content = struct.pack("<Q", len(header)) + header + bytes(4)
        (folder / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read|does not fit the model"):
            load_lora(quantized, folder)

    def test_a_header_longer_than_the_file(self, quantized, folder):
        for length in (100, 2**40, 2**64 - 1):
            content = struct.pack("<Q", length) + b"{}"
            (folder / "adapter_model.safetensors").write_bytes(content)
            with pytest.raises(ValueError, match="cannot be read"):
                load_lora(quantized, folder)

    def test_a_hostile_config(self, quantized, folder):
        path = folder / "adapter_config.json"
        for text in ("[]", "3", "[" * 100_000, '{"r": 1e999}', "\ud800"):
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            with pytest.raises(ValueError, match="adapter_config"):
                load_lora(quantized, folder)

    def test_missing_and_broken_files(self, quantized, folder):
        with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config\.json"):
            load_lora(quantized, folder / "elsewhere")
        (folder / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
        with pytest.raises(ValueError, match="cannot be read"):
            load_lora(quantized, folder)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match="is not JSON"):
            load_lora(quantized, folder)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(ValueError, match="has no r"):
            load_lora(quantized, folder)
        (folder / "adapter_model.safetensors").unlink()
        self.edit_config(folder, r=4, lora_alpha=16)
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
            load_lora(quantized, folder)


def test_merging_here_and_merging_by_peft_agree(quantized, tmp_path):
    dense = make_dense_twin(quantized)
    save_lora(randomize_lora_b(add_lora(quantized, r=4)), tmp_path)
    by_peft = peft.PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    merge_lora(quantized)
    for name, weight in by_peft.state_dict().items():
        torch.testing.assert_close(quantized.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_a_shared_layer_is_loaded_in_all_its_places(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
        model["b"] = model["a"]
        return model

    trained = add_lora(make(), r=2)
    randomize_lora_b(trained)
    save_lora(trained, tmp_path)
    loaded = load_lora(make(), tmp_path)
    assert isinstance(loaded["a"], LoRALinear)
    assert loaded["b"] is loaded["a"]
    assert torch.equal(loaded["a"].lora_b, trained["a"].lora_b)


def test_an_adapter_beside_a_changed_base_is_refused(quantized, tmp_path):
    save_lora(add_lora(quantized, r=2), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["init_lora_weights"] = "pissa_niter_4"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4'"):
        load_lora(quantized, tmp_path)
