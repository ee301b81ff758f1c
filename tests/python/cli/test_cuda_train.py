"""`qlora-native train` on a GPU."""

import json

import pytest
import torch

from qlora_native import quantize_model

transformers = pytest.importorskip("transformers")
for _package in ("safetensors", "tokenizers", "tqdm"):
    pytest.importorskip(_package)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "optimizer", ["paged_adamw", "paged_adamw8bit", "paged_lion", "paged_lion8bit"]
)
def test_trains_on_a_gpu_and_saves(train, tmp_path, model_folder, optimizer):
    from qlora_native.hf import load_lora

    assert train("--epochs", "5", "--optimizer", optimizer, "--device", "cuda") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["device"].startswith("cuda:")
    assert metrics["losses"][-1] < metrics["losses"][0] - 0.5
    assert metrics["peak_gpu_memory_bytes"] > metrics["weight_bytes"]
    quantized = quantize_model(
        transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    )
    assert torch.isfinite(
        load_lora(quantized, tmp_path / "out")(input_ids=torch.tensor([[1, 2, 3]])).logits
    ).all()
