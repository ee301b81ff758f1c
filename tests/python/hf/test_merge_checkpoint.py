"""merge_into_checkpoint: the numbers, what is written, what it measures, and what it refuses."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hf_models import tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model

from qlora_native import LoRALinear, add_lora, nf4_quantize, quantize_model
from qlora_native.hf import NF4Config, merge_into_checkpoint, save_lora
from support import run_python, same_bits

TOKENS = torch.arange(20).view(2, 10)
LLAMA_LAYERS = 14  # of two blocks


def randomise(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Updates as training leaves them: no B is zero, no magnitude the norm of its row."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name or "lora_B" in name:
                parameter.normal_(std=std)
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    return model


def save_base(folder: Path, model: nn.Module, shards: bool = False) -> Path:
    """A checkpoint with a tokenizer's files and weights of another kind beside it."""
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "extra").mkdir()
    (folder / "extra" / "template.jinja").write_text("text")
    (folder / "extra" / "consolidated.00.pth").write_bytes(b"stale")
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base", tiny_llama())


def make_adapter(folder: Path, model: nn.Module | None = None, **options) -> Path:
    """Trained beside the 4-bit model."""
    model = quantize_model(tiny_llama() if model is None else model)
    save_lora(randomise(add_lora(model, **{"r": 4, **options})), folder)
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- the numbers


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_weights_are_those_of_peft_on_the_original_model(base, tmp_path, use_dora):
    adapter = make_adapter(tmp_path / "a", r=5, lora_alpha=7, use_rslora=True, use_dora=use_dora)
    merge_into_checkpoint(adapter, base, tmp_path / "merged")
    by_peft = peft.PeftModel.from_pretrained(tiny_llama(), adapter).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    original = dict(tiny_llama().named_parameters())
    changed = 0
    for name, weight in by_peft.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=1e-5, atol=1e-7)
        changed += not same_bits(merged.state_dict()[name], original[name])
    assert changed == LLAMA_LAYERS
    assert not same_bits(merged(TOKENS).logits, tiny_llama()(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_rounded_once(tmp_path, dtype):
    base = save_base(tmp_path / "base", tiny_llama(dtype))
    model = randomise(add_lora(quantize_model(tiny_llama(dtype)), r=4))
    merge_into_checkpoint(model, base, tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            weight = tensors_of(base)[f"{name}.weight"].double()
            exact = weight + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
            difference = (merged[f"{name}.weight"].double() - exact).abs()
            info = torch.finfo(dtype)
            assert (difference <= info.eps / 2 * exact.abs() * 1.0001 + info.tiny).all()
            assert merged[f"{name}.weight"].dtype == dtype


def test_several_adapters_are_added_up(base, tmp_path):
    first = make_adapter(tmp_path / "first", r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    second = make_adapter(tmp_path / "second", r=3, target_modules=["v_proj"], lora_alpha=3)
    report = merge_into_checkpoint([first, second], base, tmp_path / "both")
    merge_into_checkpoint(first, base, tmp_path / "one")
    merge_into_checkpoint(str(second), tmp_path / "one", tmp_path / "two")  # one after the other
    assert len(report.layers) == 4
    two = tensors_of(tmp_path / "two")
    for name, weight in tensors_of(tmp_path / "both").items():
        torch.testing.assert_close(weight, two[name], rtol=1e-6, atol=1e-7)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert same_bits(tensors_of(tmp_path / "one")[q_proj], tensors_of(tmp_path / "both")[q_proj])


def test_an_adapter_may_come_from_a_model_of_this_librarys_or_of_pefts(base, tmp_path, adapter):
    merge_into_checkpoint(adapter, base, tmp_path / "folder")
    model = quantize_model(tiny_llama())
    torch.manual_seed(0)
    merge_into_checkpoint(randomise(add_lora(model, r=4)), base, tmp_path / "native")
    expected = tensors_of(tmp_path / "folder")
    assert {name for name in expected if "layers" in name} != set()
    for name in ("default", "other"):
        by_peft = peft.PeftModel.from_pretrained(tiny_llama(), adapter, adapter_name=name)
        merge_into_checkpoint(by_peft, base, tmp_path / name)
        merged = tensors_of(tmp_path / name)
        assert all(same_bits(merged[key], weight) for key, weight in expected.items())


# ---- layers that are stored otherwise


@pytest.mark.parametrize("has_prefix", [True, False])
def test_gpt2s_weights_lie_transposed_and_may_have_no_prefix(tmp_path, has_prefix):
    dense = tiny_gpt2()
    if has_prefix:
        dense.save_pretrained(tmp_path / "base")
    else:
        dense.transformer.save_pretrained(tmp_path / "base")
        edit_json(tmp_path / "base" / "config.json", architectures=["GPT2LMHeadModel"])
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    trained = randomise(peft.get_peft_model(tiny_gpt2(), config))
    trained.save_pretrained(tmp_path / "adapter")
    expected = trained.merge_and_unload()
    merge_into_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert set(merged) == set(tensors_of(tmp_path / "base"))
    body = GPT2Model.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in expected.transformer.state_dict().items():
        torch.testing.assert_close(body[name], weight, rtol=1e-5, atol=1e-7)


def test_a_model_of_a_class_that_transformers_has_not_has_linear_layers(base, tmp_path, adapter):
    merge_into_checkpoint(adapter, base, tmp_path / "known")
    edit_json(base / "config.json", architectures=["MyOwnForCausalLM"])
    merge_into_checkpoint(adapter, base, tmp_path / "unknown")
    known = tensors_of(tmp_path / "known")
    assert all(same_bits(known[n], w) for n, w in tensors_of(tmp_path / "unknown").items())


def test_an_update_of_a_tied_head_is_refused(tmp_path):
    dense = tiny_llama(tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    with pytest.warns(UserWarning, match="tie"):
        randomise(peft.get_peft_model(dense, config)).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=False
        )
    with pytest.raises(ValueError, match=r"lm_head: its weight is tied to model\.embed_tokens"):
        merge_into_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- what is written


@pytest.mark.parametrize("shards", [False, True])
def test_the_output_has_the_files_of_the_original(tmp_path, adapter, shards):
    base = save_base(tmp_path / "base", tiny_llama(), shards)
    output = tmp_path / "merged"
    merge_into_checkpoint(adapter, base, output)
    names = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    weights = {p.name for p in base.glob("*.safetensors")}
    assert (len(weights) > 3) == shards
    others = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"}
    index = {"model.safetensors.index.json"} if shards else set()
    assert names == weights | others | index | {"extra/template.jinja"}
    assert json.loads((output / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    for name in weights:
        before, after = load_file(base / name), load_file(output / name)
        assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
            k: (v.dtype, v.shape) for k, v in after.items()
        }
        for key, weight in before.items():
            assert same_bits(weight, after[key]) != ("_proj.weight" in key)
    if shards:
        indices = [
            json.loads((folder / "model.safetensors.index.json").read_text())
            for folder in (base, output)
        ]
        assert indices[0] == indices[1]
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    assert model(TOKENS).logits.isfinite().all()


def test_a_folder_of_links_is_read_and_files_are_written(base, tmp_path, adapter):
    """As a hub's cache has it."""
    blobs = tmp_path / "blobs"
    base.rename(blobs)
    base.mkdir()
    for path in blobs.iterdir():
        if path.is_file():
            (base / path.name).symlink_to(path)
    merge_into_checkpoint(adapter, base, tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_that_is_asked_for_is_that_of_every_weight(base, tmp_path, adapter, dtype):
    report = merge_into_checkpoint(adapter, base, tmp_path / "merged", dtype=dtype)
    own = tmp_path / "own"
    merge_into_checkpoint(adapter, base, own)
    merged = tensors_of(tmp_path / "merged")
    for name, weight in tensors_of(own).items():
        assert same_bits(merged[name], weight.to(dtype))
    assert report.into == str(dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == model.config.dtype == dtype


def test_the_index_has_the_size_of_what_was_written(tmp_path, adapter):
    base = save_base(tmp_path / "base", tiny_llama(), shards=True)
    merge_into_checkpoint(adapter, base, tmp_path / "merged", dtype=torch.bfloat16)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    size = sum(weight.nbytes for weight in tensors_of(tmp_path / "merged").values())
    assert index["metadata"]["total_size"] == size


def test_progress_is_told_by_the_tensor(base, tmp_path, adapter):
    seen = []
    merge_into_checkpoint(
        adapter, base, tmp_path / "merged", progress=lambda *call: seen.append(call)
    )
    count = len(tensors_of(base))
    assert [call[:2] for call in seen] == [(i, count) for i in range(1, count + 1)]
    assert {call[2] for call in seen} == set(tensors_of(base))


# ---- what it measures


def test_the_report_has_what_was_lost_and_how_far_the_base_is_from_the_trained_one(tmp_path):
    base = save_base(tmp_path / "base", tiny_llama(torch.bfloat16))
    model = randomise(add_lora(quantize_model(tiny_llama(torch.bfloat16)), r=4))
    report = merge_into_checkpoint(model, base, tmp_path / "merged")
    assert len(report.layers) == LLAMA_LAYERS
    original, merged = tensors_of(base), tensors_of(tmp_path / "merged")
    for layer in report.layers:
        lora = model.get_submodule(layer.name)
        w = original[f"{layer.name}.weight"].double()
        update = lora.scaling * lora.lora_b.double() @ lora.lora_a.double()
        lost = (merged[f"{layer.name}.weight"].double() - (w + update)).norm().item()
        change = (w - lora.base.dequantize().double()).norm().item()
        assert layer.update_norm == pytest.approx(update.norm().item(), rel=1e-4)
        assert layer.lost_norm == pytest.approx(lost, rel=1e-3)
        assert layer.base_change_norm == pytest.approx(change, rel=1e-4)
        assert layer.base_change_of_update == pytest.approx(change / layer.update_norm, rel=1e-4)
        assert 0.0 < layer.lost_norm < layer.base_change_norm
    worst = max(layer.base_change_of_update for layer in report.layers)
    assert len(report.notes) == 1
    assert "block 64, nested scales" in report.notes[0]
    assert f"up to {worst:.2g} times the norm" in report.notes[0]
    assert "base/‖ΔW‖" in str(report)
    assert f"into bfloat16, added to the checkpoint {base}." in str(report)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["layers"][0][
        "base_change_norm"
    ]


def test_the_report_knows_of_other_ways_in_which_the_base_was_held(base, tmp_path):
    settings = {"block_size": 32, "double_quant": False}
    model = randomise(add_lora(quantize_model(tiny_llama(), **settings), r=4))
    report = merge_into_checkpoint(
        model, base, tmp_path / "a", trained_beside=NF4Config(**settings)
    )
    layer = report.layers[0]
    w = tensors_of(base)[f"{layer.name}.weight"]
    change = (w - nf4_quantize(w, 32, False).dequantize()).double().norm().item()
    assert layer.base_change_norm == pytest.approx(change, rel=1e-4)
    assert "block 32, plain scales" in report.notes[0]
    report = merge_into_checkpoint(model, base, tmp_path / "b", trained_beside=None)
    assert report.notes == ()
    assert report.layers[0].base_change_norm is None
    assert "base/‖ΔW‖" not in str(report)


def test_doras_sum_is_measured_whole(base, tmp_path):
    model = randomise(add_lora(quantize_model(tiny_llama()), r=4, use_dora=True))
    report = merge_into_checkpoint(model, base, tmp_path / "merged")
    layer = report.layers[0]
    lora = model.get_submodule(layer.name)
    merged = tensors_of(tmp_path / "merged")[f"{layer.name}.weight"]
    change = (merged.double() - lora.merged_weight("default").double()).norm().item()
    assert layer.base_change_norm == pytest.approx(change, rel=1e-3)
    rows = merged.norm(dim=1)
    torch.testing.assert_close(rows, lora.magnitude.detach(), rtol=1e-5, atol=0.0)


MEMORY = """
from pathlib import Path
import torch
from qlora_native.cli.peak_memory import PeakMemory
from qlora_native.hf import merge_into_checkpoint

torch.set_num_threads(1)
folder = Path({folder!r})
merge_into_checkpoint(folder / "adapter-1", folder / "model-1", folder / "warm")  # loads libraries
peak = PeakMemory()
before = peak.read_bytes()
merge_into_checkpoint(folder / "adapter-24", folder / "model-24", folder / "merged")
print(peak.read_bytes() - before, peak.since_start)
"""


def make_large_model(folder: Path, layers: int, n: int, k: int) -> None:
    """A model of `layers` matrices that an adapter is beside, and as many that none is."""
    model, adapter = folder / f"model-{layers}", folder / f"adapter-{layers}"
    for path in (model, adapter):
        path.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    weights, factors = {}, {}
    for i in range(layers):
        weights[f"layers.{i}.weight"] = torch.randn(n, k)
        weights[f"others.{i}.weight"] = torch.randn(n, k)
        factors[f"base_model.model.layers.{i}.lora_A.weight"] = torch.randn(2, k)
        factors[f"base_model.model.layers.{i}.lora_B.weight"] = torch.randn(n, 2)
    save_file(weights, model / "model.safetensors")
    save_file(factors, adapter / "adapter_model.safetensors")


def test_it_takes_the_memory_of_some_tensors_and_not_of_the_file(tmp_path):
    n, k = 1024, 2048
    for layers in (1, 24):
        make_large_model(tmp_path, layers, n, k)
    result = run_python(MEMORY.format(folder=str(tmp_path)))
    assert result.returncode == 0, result.stderr
    grown, since_start = result.stdout.split()
    if since_start == "True":
        pytest.skip("the peak of a process's memory cannot be reset here")
    tensor = 4 * n * k
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 48 * tensor
    # A weight as stored, its sum, what was trained beside and its sum, and the merged one; and
    # what the comparison and the copies take, which does not grow with the tensor.
    assert int(grown) < 12 * tensor


# ---- what is refused: nothing is written


def refuse(match: str, error: type[Exception], *arguments, **options) -> None:
    output = arguments[2]
    beside = set(output.parent.iterdir())
    with pytest.raises(error, match=match):
        merge_into_checkpoint(*arguments, **options)
    assert set(output.parent.iterdir()) == beside


def test_an_adapter_for_another_base_is_refused_with_all_shapes(base, tmp_path):
    other = make_adapter(
        tmp_path / "other",
        tiny_llama(hidden_size=32, num_hidden_layers=3),
        target_modules=["q_proj"],
    )
    refuse(
        r"the adapter does not fit .*base:\n"
        r"  model\.layers\.0\.self_attn\.q_proj: model\.layers\.0\.self_attn\.q_proj\.weight is "
        r"\[64, 64\]; the adapter, lora_A \[4, 32\] and lora_B \[32, 4\], is for \[32, 32\]\n"
        r"(.|\n)*  model\.layers\.2\.self_attn\.q_proj: a LlamaForCausalLM has no such layer",
        ValueError,
        other,
        base,
        tmp_path / "merged",
    )


def test_a_layer_that_is_no_linear_one_or_is_not_there_is_refused(base, tmp_path, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.model.layers.0.mlp.up_proj.lora_{f}.weight"] for f in "AB")
    weights["base_model.model.model.embed_tokens.lora_A.weight"] = a.clone()
    weights["base_model.model.model.embed_tokens.lora_B.weight"] = b.clone()
    save_file(weights, adapter / "adapter_model.safetensors")
    refuse(
        "embed_tokens: is a Embedding, want a linear layer",
        ValueError,
        adapter,
        base,
        tmp_path / "merged",
    )
    edit_json(base / "config.json", architectures=None)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 64, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors")
    for message in (
        r"model\.layers\.1\.mlp\.up_proj: the checkpoint has no model\.layers\.1\.mlp\.up_proj\.w",
        r"down_proj\.weight is U8, want F32, BF16 or F16",
    ):
        refuse(message, ValueError, adapter, base, tmp_path / "merged")


def test_a_quantised_checkpoint_is_refused(base, tmp_path, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4Config())
    model.save_pretrained(tmp_path / "nf4")
    message = r"nf4 is quantised \(quant_method='qlora_nf4'\), want the original, dense checkpoint"
    refuse(message, ValueError, adapter, tmp_path / "nf4", tmp_path / "merged")


@pytest.mark.parametrize("shards", [False, True])
def test_a_truncated_file_is_refused(tmp_path, adapter, shards):
    base = save_base(tmp_path / "base", tiny_llama(), shards)
    last = sorted(base.glob("*.safetensors"))[-1]
    for content in (last.read_bytes()[:-4], b"\xff" * 100):
        last.write_bytes(content)
        message = f"{last.name} is no whole safetensors file"
        refuse(message, ValueError, adapter, base, tmp_path / "merged")
    last.unlink()
    refuse(f"there is no .*{last.name}", FileNotFoundError, adapter, base, tmp_path / "merged")


def test_an_index_that_lies_is_refused(tmp_path, adapter):
    base = save_base(tmp_path / "base", tiny_llama(), shards=True)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for change, message in (
        ({"lm_head.weight": "../secret.safetensors"}, r"names '\.\./secret\.safetensors'"),
        ({"lm_head.weight": "tokenizer.json"}, r"names 'tokenizer\.json'"),
        ({"not.there.weight": sorted(content["weight_map"].values())[0]}, "not.there.weight"),
    ):
        edit_json(index, weight_map={**content["weight_map"], **change})
        refuse(message, ValueError, adapter, base, tmp_path / "merged")
    index.write_text("[")
    refuse("is not JSON", ValueError, adapter, base, tmp_path / "merged")


def test_a_damaged_adapter_is_refused(base, tmp_path, adapter):
    weights = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    good = load_file(weights)
    for changes, message in (
        ({key.format("A"): torch.zeros(3, 64)}, r"up_proj: lora_a \[3, 64\].* do not fit .* r=4"),
        ({key.format("B"): torch.full((128, 4), torch.nan)}, "up_proj: lora_b has a NaN or Inf"),
        ({key.format("A"): torch.full((4, 64), torch.inf)}, "up_proj: lora_a has a NaN or Inf"),
        ({"base_model.model.x.lora_embedding_A": torch.zeros(1)}, "lora_embedding_A"),
    ):
        save_file({**good, **changes}, weights)
        refuse(message, ValueError, adapter, base, tmp_path / "merged")
    weights.write_bytes(weights.read_bytes()[:-1])
    refuse("cannot be read", ValueError, adapter, base, tmp_path / "merged")
    save_file(good, weights)
    edit_json(adapter / "adapter_config.json", init_lora_weights="pissa")
    message = r"^merge_into_checkpoint: .*adapter_config\.json has init_lora_weights='pissa'"
    refuse(message, ValueError, adapter, base, tmp_path / "merged")
    refuse("there is no adapter", ValueError, [], base, tmp_path / "merged")


def test_a_weight_out_of_the_dtypes_range_leaves_nothing_half_written(base, tmp_path):
    model = add_lora(quantize_model(tiny_llama()), r=4)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_b.fill_(1e6)
    refuse(
        r"model\.layers\.1\.mlp\.up_proj: the merged weight in float16 has a NaN or Inf",
        ValueError,
        model,
        base,
        tmp_path / "merged",
        dtype=torch.float16,
    )


def test_what_is_there_is_not_overwritten(base, tmp_path, adapter):
    output = tmp_path / "merged"
    output.mkdir()
    merge_into_checkpoint(adapter, base, output)  # an empty folder will do
    stored = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    refuse("merged exists already", FileExistsError, adapter, base, output)
    refuse("base exists already", FileExistsError, adapter, base, base)
    assert stored == {p.name: p.read_bytes() for p in output.iterdir() if p.is_file()}


def test_missing_folders_and_wrong_arguments_are_named(base, tmp_path, adapter):
    output = tmp_path / "merged"
    refuse("there is no folder .*nowhere", FileNotFoundError, adapter, tmp_path / "nowhere", output)
    refuse("adapter_config.json", FileNotFoundError, tmp_path / "nowhere", base, output)
    refuse("dtype is torch.int8", ValueError, adapter, base, output, dtype=torch.int8)
    edit_json(base / "config.json", num_attention_heads="many")
    refuse("no LlamaForCausalLM can be built from", ValueError, adapter, base, output)
    shutil.rmtree(base)
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"")
    refuse(r"there is no .*model\.safetensors", FileNotFoundError, adapter, base, output)
