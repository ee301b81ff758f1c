"""`qlora-native convert`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_native.cli.main import main
from qlora_native.hf import NF4Config


@pytest.fixture(scope="module")
def ours(model_folder, tmp_path_factory):
    """A 4-bit checkpoint of this library's."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16, quantization_config=NF4Config()
    )
    model.save_pretrained(folder)
    return folder


def test_there_and_back(ours, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(ours), str(there)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{there} has the checkpoint in the form 'bitsandbytes'\n"
    assert "14/14" in printed.err
    assert main(["convert", str(there), str(back), "--to", "nf4"]) == 0
    name = "model.safetensors"
    assert (back / name).read_bytes() == (ours / name).read_bytes()


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_the_dtype_that_codes_are_stored_as(ours, tmp_path, storage):
    from safetensors.torch import load_file

    options = ["--to", "bitsandbytes", "--quant-storage", storage]
    assert main(["convert", str(ours), str(tmp_path / "a"), *options]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_storage"] == storage
    codes = load_file(tmp_path / "a" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert codes.dtype == getattr(torch, storage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{ours}", "{new}", "--to", "nf4"], "is of the form 'nf4' already"),
        (["{ours}", "{ours}"], "exists already"),
        (["{new}", "{ours}"], "there is no folder"),
        (["{dense}", "{new}"], "has no quantization_config: not in 4 bits"),
    ],
)
def test_errors_are_one_line(ours, model_folder, tmp_path, capsys, options, message):
    places = {"ours": ours, "new": tmp_path / "new", "dense": model_folder}
    assert main(["convert", *(option.format(**places) for option in options)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qlora-native convert: error: ")
    assert message in last
    assert not (tmp_path / "new").exists()
