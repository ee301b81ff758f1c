"""`qlora-native merge`: an adapter into the checkpoint that its base was quantised from."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_native import add_lora, quantize_model
from qlora_native.cli.main import main
from qlora_native.hf import load_lora, merge_into_checkpoint, save_lora


@pytest.fixture
def adapter_folder(tmp_path, model_folder):
    model = add_lora(quantize_model(AutoModelForCausalLM.from_pretrained(model_folder)), r=4)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05)
    save_lora(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def merge(tmp_path, model_folder, adapter_folder):
    """Runs the command; options override."""

    def run(*more: str, **options) -> int:
        paths = {"adapter": adapter_folder, "model": model_folder, "output": tmp_path / "merged"}
        options = {**paths, **options}
        argv = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        return main(["merge", *argv, *more])

    return run


def test_merges_prints_the_cost_and_gives_a_model_that_loads(
    merge, tmp_path, model_folder, adapter_folder, capsys
):
    assert merge("--report", str(tmp_path / "report.json")) == 0
    printed = capsys.readouterr().out
    expected = merge_into_checkpoint(adapter_folder, model_folder, tmp_path / "expected")
    assert str(expected) in printed
    assert f"merged checkpoint in {tmp_path / 'merged'}" in printed
    assert json.loads((tmp_path / "report.json").read_text()) == expected.to_json()
    same = [folder / "model.safetensors" for folder in (tmp_path / "merged", tmp_path / "expected")]
    assert same[0].read_bytes() == same[1].read_bytes()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("text", return_tensors="pt")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    beside = load_lora(AutoModelForCausalLM.from_pretrained(model_folder), adapter_folder).eval()
    logits = beside(**tokens).logits
    torch.testing.assert_close(merged(**tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_options_reach_the_merge(merge, tmp_path, model_folder, adapter_folder, capsys):
    assert merge("--dtype", "bfloat16", "--trained-beside", "original") == 0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "Note" not in capsys.readouterr().out
    assert merge("--block-size", "128", "--no-double-quant", output=tmp_path / "second") == 0
    assert "(block 128, plain scales)" in capsys.readouterr().out
    # A second adapter's update is added to the first one's, here the same again.
    assert merge("--adapter", str(adapter_folder), output=tmp_path / "twice") == 0
    name = "model.layers.0.mlp.up_proj.weight"
    folders = tmp_path / "second", tmp_path / "twice", model_folder
    once, twice, none = (
        load_file(folder / "model.safetensors")[name].double() for folder in folders
    )
    torch.testing.assert_close(twice - none, 2 * (once - none), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "nowhere"}, "there is no nowhere/adapter_config.json"),
        ({"model": "nowhere"}, "there is no folder nowhere"),
        ({"report": "nowhere/report.json"}, "--report nowhere/report.json: no such directory"),
        ({"block-size": "48"}, "block_size is 48, want one of"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_and_nothing_is_written(
    merge, tmp_path, capsys, options, message
):
    assert merge(**options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qlora-native merge: error: ")
    assert message in error
    assert not (tmp_path / "merged").exists()


def test_an_existing_model_is_not_overwritten(merge, model_folder, capsys):
    assert merge(output=model_folder) == 2
    assert "exists already" in capsys.readouterr().err
