"""Fixtures of `train`. Whatever needs transformers is imported late: tests that skip do without."""

import json

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"text": f"line {i}", "question": f"{i}?", "answer": "yes"} for i in range(12)]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


@pytest.fixture
def train(model_folder, data, tmp_path):
    """Run the command with options on top of the usual ones."""

    from qlora_native.cli.main import main

    def run(*options, model=model_folder, data=data):
        usual = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
        usual += ["--lr", "1e-2", "--r", "4", "--batch-size", "3", "--device", "cpu"]
        return main(["train", *usual, *options])

    return run
