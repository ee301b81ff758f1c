"""`qlora-native train` on a tiny model: what it saves, and what it says when it cannot."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_native import quantize_model
from qlora_native.cli import devices
from qlora_native.cli.dataset import Columns, read_examples
from qlora_native.cli.errors import CommandError
from qlora_native.hf import load_lora
from tiny_model import END, make_tokenizer


@pytest.fixture
def error_of(train, capsys):
    """Run a command line that must fail, and give its one line on stderr."""

    def run(*options, **paths):
        assert train(*options, **paths) == 2
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        lines = [line for line in stderr.splitlines() if line.startswith("qlora-native train: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(
    "optimizer", ["paged_adamw", "paged_adamw8bit", "paged_lion", "paged_lion8bit"]
)
def test_trains_and_saves(train, tmp_path, model_folder, optimizer, capsys):
    assert train("--epochs", "5", "--optimizer", optimizer, "--lora-alpha", "8") == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == len(metrics["losses"]) == 20
    assert metrics["losses"][-1] < metrics["losses"][0] - 0.5
    assert metrics["token_count"] == 5 * (10 * len("line 0 ") + 2 * len("line 10 "))
    config = json.loads((out / "training_config.json").read_text())
    assert config["optimizer"] == optimizer
    assert config["model"] == str(model_folder)
    assert config["lora_alpha"] == 8
    assert not (out / "config.json").exists()
    assert "adapter saved in" in capsys.readouterr().out


def test_the_adapter_works_here_and_in_peft(train, tmp_path, model_folder):
    assert train("--epochs", "5") == 0
    tokens = torch.tensor([make_tokenizer()("line 3").input_ids])
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    base_logits = model(input_ids=tokens).logits
    by_peft = peft.PeftModel.from_pretrained(model, tmp_path / "out")(input_ids=tokens).logits
    quantized = quantize_model(AutoModelForCausalLM.from_pretrained(model_folder).eval())
    here = load_lora(quantized, tmp_path / "out")(input_ids=tokens).logits
    # PEFT has it on the 16-times finer dense base: close, and far from no adapter at all.
    assert (here - by_peft).norm() < 0.3 * (by_peft - base_logits).norm()


def test_the_seed_decides_the_adapter(train, tmp_path):
    def adapter(seed):
        assert train("--max-steps", "3", "--seed", seed, "--overwrite") == 0
        return load_file(tmp_path / "out" / "adapter_model.safetensors")

    first, second, other = adapter("1"), adapter("1"), adapter("2")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_16_bit_model_gets_fp32_factors(train, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    make_tokenizer().save_pretrained(tmp_path / "bf16")
    assert train("--max-steps", "2", model=tmp_path / "bf16") == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)


def test_max_steps_stops_early(train, tmp_path):
    assert train("--epochs", "9", "--max-steps", "2") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 2


def test_the_device_is_said_and_recorded(train, tmp_path, capsys):
    assert train("--max-steps", "2") == 0
    assert "parameters on cpu" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["device"] == "cpu"


class TestExamples:
    """What becomes of a line."""

    @pytest.fixture
    def tokenizer(self):
        return make_tokenizer()

    def test_a_text_is_learned_whole_and_ends(self, data, tokenizer):
        example = read_examples(data, Columns(text="text"), tokenizer, 100)[3]
        assert tokenizer.decode(example.input_ids) == f"line 3{END}"
        assert example.labels == example.input_ids

    def test_a_prompt_carries_no_loss(self, data, tokenizer):
        columns = Columns(prompt="question", completion="answer")
        example = read_examples(data, columns, tokenizer, 100)[3]
        assert tokenizer.decode(example.input_ids) == f"3?yes{END}"
        assert example.labels[:2] == [-100, -100]
        assert example.labels[2:] == example.input_ids[2:]

    def test_max_length_cuts(self, data, tokenizer):
        example = read_examples(data, Columns(text="text"), tokenizer, 4)[0]
        assert tokenizer.decode(example.input_ids) == "line"

    def test_a_prompt_that_fills_the_length_is_an_error(self, data, tokenizer):
        columns = Columns(prompt="question", completion="answer")
        with pytest.raises(CommandError, match=r"line 1: nothing to learn in the first 2 tokens"):
            read_examples(data, columns, tokenizer, 2)

    def test_an_end_token_of_the_tokenizers_own_is_not_doubled(self, data, tokenizer):
        class Ending:
            eos_token_id = 0

            def __call__(self, text, add_special_tokens):
                encoded = tokenizer(text)
                encoded.input_ids.extend([0] if add_special_tokens else [])
                return encoded

        columns = Columns(prompt="question", completion="answer")
        for wanted in (columns, Columns(text="text")):
            assert read_examples(data, wanted, Ending(), 100) == read_examples(
                data, wanted, tokenizer, 100
            )


class TestErrors:
    """One line on stderr, exit code 2, no traceback."""

    def test_no_such_model(self, error_of, tmp_path):
        assert f"--model {tmp_path}/no: no such directory" in error_of(model=tmp_path / "no")

    def test_an_id_that_is_not_to_be_had(self, error_of):
        assert "--model nobody/nothing: " in error_of(model="nobody/nothing")

    def test_a_folder_without_a_model(self, error_of, tmp_path):
        (tmp_path / "empty").mkdir()
        assert f"--model {tmp_path}/empty: " in error_of(model=tmp_path / "empty")

    def test_no_such_data(self, error_of, tmp_path):
        line = error_of(data=tmp_path / "no.jsonl")
        assert f"--data {tmp_path}/no.jsonl: No such file or directory" in line

    @pytest.mark.parametrize("content", ["", "\n  \n"])
    def test_an_empty_file(self, error_of, data, content):
        data.write_text(content)
        assert "the file has no examples" in error_of()

    def test_bad_json_is_named_by_its_line(self, error_of, data):
        data.write_text('{"text": "fine"}\n\n{"text": broken}\n')
        assert f"{data}, line 3: not JSON: Expecting value at column 10" in error_of()

    def test_a_line_that_is_no_object(self, error_of, data):
        data.write_text('{"text": "fine"}\n["text"]\n')
        assert f"{data}, line 2: a list, want a JSON object" in error_of()

    def test_an_unknown_column_lists_what_there_is(self, error_of):
        line = error_of("--text-column", "body")
        assert "line 1: no column 'body'; there are: text, question, answer" in line
        line = error_of("--prompt-column", "question", "--completion-column", "reply")
        assert "line 1: no column 'reply'; there are: text, question, answer" in line

    def test_a_value_that_is_no_text(self, error_of, data):
        data.write_text('{"text": "fine"}\n{"text": 3}\n')
        assert f"{data}, line 2: 'text' is a int, want text" in error_of()

    def test_half_a_pair_of_columns(self, error_of):
        assert "go together" in error_of("--prompt-column", "question")

    def test_a_rank_that_does_not_fit(self, error_of):
        assert "r is 4000, want" in error_of("--r", "4000")

    def test_an_adapter_is_not_overwritten_unasked(self, train, error_of, tmp_path):
        assert train("--max-steps", "1") == 0
        assert "has an adapter already; --overwrite replaces it" in error_of("--max-steps", "1")
        assert train("--max-steps", "1", "--overwrite") == 0

    def test_an_output_that_cannot_be(self, error_of, data):
        assert "--output" in error_of("--output", str(data / "below"))

    def test_a_gpu_that_cannot_be_used(self, error_of, monkeypatch):
        build = {"cuda_devices": [], "cuda_problems": ["no driver here"]}
        monkeypatch.setattr(devices, "build_info", lambda: build)
        assert "--device cuda: no driver here" in error_of("--device", "cuda")

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--lr", "-1"), ("--r", "0"), ("--optimizer", "sgd"), ("--device", "tpu")],
    )
    def test_bad_values_are_refused_by_the_parser(self, train, option, value, capsys):
        with pytest.raises(SystemExit) as error:
            train(option, value)
        assert error.value.code == 2
        assert f"argument {option}: " in capsys.readouterr().err
