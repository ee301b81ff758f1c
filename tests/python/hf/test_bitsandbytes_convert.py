"""4-bit checkpoints from one form to the other and back."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes_checkpoints import dequantized, save_with_bitsandbytes, use_other_map
from hf_models import nf4_names, tiny_llama, tiny_llava, tiny_mixtral
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from qlora_native import NF4Linear
from qlora_native.hf import NF4Config
from qlora_native.hf.bitsandbytes import convert_checkpoint
from qlora_native.hf.checkpoint_folder import CheckpointFolder
from support import over_nesting, same_bits

over_storages = pytest.mark.parametrize(
    "storage", [torch.uint8, torch.bfloat16], ids=lambda d: str(d)[6:]
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that bitsandbytes wrote, in shards whose borders are within layers."""
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    save_with_bitsandbytes(tiny_llama(torch.bfloat16), folder, max_shard_size="10KB")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_same_weights(a: Path, b: Path) -> None:
    """And indices that say where each is."""
    stored = []
    for folder in (a, b):
        files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            index = json.loads(index.read_text())
            where = {name: file for file, tensors in files.items() for name in tensors}
            assert index["weight_map"] == where
            sizes = [t.nbytes for tensors in files.values() for t in tensors.values()]
            assert index["metadata"]["total_size"] == sum(sizes)
        stored.append({n: t for tensors in files.values() for n, t in tensors.items()})
    assert stored[0].keys() == stored[1].keys()
    assert all(same_bits(stored[0][name], stored[1][name]) for name in stored[0])


def dense_weights(folder):
    """Of our layers, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {n: m.dequantize(model.dtype) for n, m in model.named_modules() if type(m) is NF4Linear}


# ---- there and back


@over_nesting
@over_storages
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"], ids=["one file", "shards"])
def test_from_bitsandbytes_and_back_gives_equal_files(
    tmp_path, storage, double_quant, max_shard_size
):
    expected = save_with_bitsandbytes(
        tiny_llama(torch.bfloat16),
        tmp_path / "theirs",
        nested=double_quant,
        storage=storage,
        max_shard_size=max_shard_size,
    )
    assert convert_checkpoint(tmp_path / "theirs", tmp_path / "ours") == "nf4"
    found = dense_weights(tmp_path / "ours")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], weight) for name, weight in expected.items())

    form = convert_checkpoint(
        tmp_path / "ours", tmp_path / "back", "bitsandbytes", quant_storage=storage
    )
    assert form == "bitsandbytes"
    if max_shard_size == "5GB":
        assert files_of(tmp_path / "back") == files_of(tmp_path / "theirs")
    else:  # what was in two files of theirs has been in one of ours
        assert_same_weights(tmp_path / "back", tmp_path / "theirs")
        read = [(tmp_path / f / "config.json").read_bytes() for f in ("back", "theirs")]
        assert read[0] == read[1]


@over_nesting
@pytest.mark.parametrize("compute_dtype", [torch.float16, None], ids=["fp16", "none"])
def test_bitsandbytes_loads_what_was_ours(tmp_path, double_quant, compute_dtype):
    import bitsandbytes as bnb

    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = NF4Config(
        double_quant=double_quant, compute_dtype=compute_dtype, skip=["lm_head", "layers.0.mlp"]
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    assert convert_checkpoint(tmp_path / "ours", tmp_path / "theirs") == "bitsandbytes"

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers.keys() == {n for n, m in ours.named_modules() if isinstance(m, NF4Linear)}
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    for name, layer in layers.items():
        weight = dequantized(bnb, layer.weight)
        assert same_bits(weight, ours.get_submodule(name).dequantize(torch.bfloat16)), name
        assert layer.compute_dtype == (compute_dtype or torch.bfloat16)
    assert convert_checkpoint(tmp_path / "theirs", tmp_path / "back") == "nf4"
    assert_same_weights(tmp_path / "ours", tmp_path / "back")


def test_in_features_that_are_odd_are_the_models(tmp_path):
    """Codes of such a layer are one column, which does not tell the shape."""
    tiny_llama(intermediate_size=127).save_pretrained(tmp_path / "dense")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    ours.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "back")
    codes = load_file(tmp_path / "ours" / "model.safetensors")[
        "model.layers.0.mlp.down_proj.weight"
    ]
    assert codes.shape == (64 * 127 // 2, 1)
    assert_same_weights(tmp_path / "ours", tmp_path / "back")

    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for architecture, problem in (("No", ""), ("AutoModel", ".*is no model"), ("pipeline", "")):
        changed = json.dumps(config | {"architectures": [architecture]})
        (tmp_path / "ours" / "config.json").write_text(changed)
        with pytest.raises(ValueError, match=f"of a layer is odd.*cannot be built{problem}"):
            convert_checkpoint(tmp_path / "ours", tmp_path / "again")


def test_names_that_are_older_than_the_models(tmp_path):
    """transformers saves a Llava model under names that it changes while loading."""
    save_with_bitsandbytes(tiny_llava(), tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    load = LlavaForConditionalGeneration.from_pretrained
    converted = load(tmp_path / "ours")
    expected = load(tmp_path / "theirs", quantization_config=NF4Config())
    assert nf4_names(converted) == nf4_names(expected)
    for name, tensor in expected.state_dict().items():
        assert same_bits(converted.state_dict()[name], tensor), name


def test_other_files_come_along(theirs, tmp_path):
    source = shutil.copytree(theirs, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("[1]")
    (tmp_path / "blob").write_text("linked")
    (source / "README.md").symlink_to(tmp_path / "blob")  # as in a hub's cache
    (source / "pytorch_model.bin").write_text("weights that are not in the new form")
    convert_checkpoint(source, tmp_path / "new" / "ours")
    found = files_of(tmp_path / "new" / "ours")
    assert found["tokenizer.json"] == b"{}"
    assert found["original/params.json"] == b"[1]"
    assert found["README.md"] == b"linked"
    assert not any(path.is_symlink() for path in (tmp_path / "new" / "ours").iterdir())
    assert set(found) == set(files_of(source)) - {"pytorch_model.bin"}


def test_a_text_models_configuration_within_another(theirs, tmp_path):
    source = shutil.copytree(theirs, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    nested = {"text_config": {"quantization_config": config.pop("quantization_config")}, **config}
    (source / "config.json").write_text(json.dumps(nested))
    convert_checkpoint(source, tmp_path / "ours")
    converted = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert converted["text_config"]["quantization_config"]["quant_method"] == "qlora_nf4"
    assert "quantization_config" not in converted


def test_scales_by_a_map_of_another_kind_of_processor_are_decoded(tmp_path):
    save_with_bitsandbytes(tiny_llama(), tmp_path / "theirs")
    expected = use_other_map(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="are by a map that was computed on another kind"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    found = dense_weights(tmp_path / "ours")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], weight) for name, weight in expected.items())


# ---- a layer at a time


def test_one_layer_is_in_memory_at_a_time(theirs, tmp_path, monkeypatch):
    alive: list[tuple[str, weakref.ref]] = []
    load = CheckpointFolder.load
    most = 0

    def watched(self, name):
        nonlocal most
        tensor = load(self, name)
        alive.append((name, weakref.ref(tensor)))
        layers = {n.split(".weight")[0] for n, ref in alive if ref() is not None}
        most = max(most, len(layers))
        return tensor

    monkeypatch.setattr(CheckpointFolder, "load", watched)
    done = []
    convert_checkpoint(theirs, tmp_path / "a", progress=lambda *state: done.append(state))
    assert len({name.split(".weight")[0] for name, _ in alive}) == len(done) == 14
    # The one that is being converted, and the last one's dictionary until it is replaced.
    assert most <= 2
    assert [state[:2] for state in done] == [(i, 14) for i in range(1, 15)]
    assert {state[2] for state in done} == {name.split(".weight")[0] for name, _ in alive}


# ---- all or nothing


def test_a_layer_that_is_damaged_leaves_nothing_behind(theirs, tmp_path):
    source = shutil.copytree(theirs, tmp_path / "source")
    name = "model.layers.1.self_attn.v_proj.weight.quant_map"
    file = (
        source
        / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(file)
    tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    before = files_of(source)
    done = []
    with pytest.raises(ValueError, match=rf"{name}: is not the NF4 levels"):
        convert_checkpoint(source, tmp_path / "to" / "b", progress=lambda *s: done.append(s))
    assert done  # it was under way
    assert list((tmp_path / "to").iterdir()) == []
    assert files_of(source) == before


def test_a_folder_with_something_in_it_is_left_alone(theirs, tmp_path):
    (tmp_path / "a").mkdir()
    convert_checkpoint(theirs, tmp_path / "a")  # an empty one is taken
    before = files_of(tmp_path / "a")
    for destination in (tmp_path / "a", theirs, tmp_path / "a" / "config.json"):
        with pytest.raises(FileExistsError, match="exists already"):
            convert_checkpoint(theirs, destination)
    assert files_of(tmp_path / "a") == before
    with pytest.raises(ValueError, match="would be copied into itself"):
        convert_checkpoint(theirs, theirs / "new")
    assert not (theirs / "new").exists()


# ---- what is refused


@pytest.fixture
def copied(theirs, tmp_path):
    return shutil.copytree(theirs, tmp_path / "source")


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant_method": "gptq", "load_in_4bit": ...}, NotImplementedError, "'gptq', want"),
        ({"bnb_4bit_quant_type": "fp4"}, NotImplementedError, "'fp4', want 'nf4'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, NotImplementedError, "LLM.int8"),
        ({"load_in_4bit": False}, ValueError, "neither load_in_4bit nor"),
        ({"bnb_4bit_compute_dtype": "nonsense"}, ValueError, "cannot be read"),
        (None, ValueError, "no quantization_config"),
    ],
    ids=["gptq", "fp4", "int8", "neither", "nonsense", "none"],
)
def test_another_kind_of_checkpoint_is_refused(copied, tmp_path, changes, error, message):
    def edit(config):
        if changes is None:
            del config["quantization_config"]
            return
        stored = config["quantization_config"] | changes
        stored |= {f"_{k}": v for k, v in changes.items() if k.startswith("load")}
        config["quantization_config"] = {k: v for k, v in stored.items() if v is not ...}

    edit_json(copied / "config.json", edit)
    with pytest.raises(error, match=message):
        convert_checkpoint(copied, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_form_that_it_has_is_refused(theirs, tmp_path):
    with pytest.raises(ValueError, match="is of the form 'bitsandbytes' already"):
        convert_checkpoint(theirs, tmp_path / "a", "bitsandbytes")
    with pytest.raises(ValueError, match=r"quant_storage is torch.bfloat16, which only bitsandb"):
        convert_checkpoint(theirs, tmp_path / "a", quant_storage=torch.bfloat16)
    assert not (tmp_path / "a").exists()


INDEX = "model.safetensors.index.json"


def test_damaged_folders_are_refused(copied, tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message):
            convert_checkpoint(copied, tmp_path / "a")
        assert not (tmp_path / "a").exists()

    index = (copied / INDEX).read_text()
    edit_json(copied / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../x"}))
    refused(ValueError, r"names '../x', want safetensors files of its folder")
    (copied / INDEX).write_text(index)
    edit_json(copied / INDEX, lambda i: i["weight_map"].pop("model.norm.weight"))
    refused(ValueError, r"does not say what is in the files: model.norm.weight")
    edit_json(copied / INDEX, lambda i: i.pop("weight_map"))
    refused(ValueError, "has no weight_map")
    (copied / INDEX).write_text("{")
    refused(ValueError, f"{INDEX} is not JSON")
    (copied / INDEX).write_text(index)
    shard = next(copied.glob("model-00002*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(ValueError, rf"{shard.name} is no whole safetensors file")
    shard.unlink()
    refused(FileNotFoundError, f"there is no .*{shard.name}")
    shard.write_bytes(whole)
    (copied / "config.json").unlink()
    refused(FileNotFoundError, r"there is no .*config.json")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "a")


def test_experts_in_4_bits_have_no_place_in_theirs(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "dense")
    config = NF4Config()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(NotImplementedError, match=r"experts\..*_absmax: is of a parameter that"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_our_own_form_is_checked_too(theirs, tmp_path):
    source = tmp_path / "ours"
    convert_checkpoint(theirs, source)
    edit_json(source / "config.json", lambda c: c["quantization_config"].update(block_size=128))
    with pytest.raises(ValueError, match=r"want .* weights, block_size=128, double_quant=True"):
        convert_checkpoint(source, tmp_path / "a")
    edit_json(
        source / "config.json",
        lambda c: c["quantization_config"].update(block_size=64, double_quant=False),
    )
    with pytest.raises(ValueError, match="double_quant=False"):
        convert_checkpoint(source, tmp_path / "a")
    edit_json(source / "config.json", lambda c: c["quantization_config"].update(block_size=63))
    with pytest.raises(ValueError, match="block_size is 63"):
        convert_checkpoint(source, tmp_path / "a")
    assert not (tmp_path / "a").exists()
