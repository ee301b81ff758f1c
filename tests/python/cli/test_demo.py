"""The demo from end to end, at a size of seconds."""

import json
import re
import shutil

import pytest

from qlora_native.cli import demo
from qlora_native.cli.demo import DemoSettings, run_demo
from qlora_native.cli.tiny_llama import BaseModelSettings

# A run that all tests share and one that a test repeats must take the same kernels.
pytestmark = pytest.mark.real_kernel_choice

TINY = DemoSettings(
    base=BaseModelSettings(
        hidden_size=64,
        intermediate_size=160,
        layers=2,
        heads=2,
        key_value_heads=1,
        steps=6,
        window=32,
    ),
    r=4,
    steps=6,
    batch_size=8,
    sample_count=2,
)


@pytest.fixture(scope="module")
def small_library():
    """Some of the documentation; the split is by module and stays whole."""
    documents = demo.read_documents()
    return [document for document in documents if document.module[0] in "cl"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, small_library):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "read_documents", lambda: small_library)
        results = run_demo(TINY, folder / "out", folder / "cache")
    return folder, results


def test_figures_are_measured(ran):
    _, results = ran
    quantization = results.quantization
    assert len(quantization.layers) == 2 * 7
    for layer in quantization.layers:
        n, k = layer.shape
        assert layer.dense_bytes == 4 * n * k
        nested = -(-n * k // (64 * 256))
        assert layer.nf4_bytes == n * k // 2 + n * k // 64 + 4 * nested + 4
        assert 0.05 < layer.relative_error < 0.12
    assert quantization.bits_per_weight == pytest.approx(4.13, abs=0.02)
    saved = quantization.dense_model_bytes - quantization.quantized_model_bytes
    assert saved == sum(x.dense_bytes - x.nf4_bytes for x in quantization.layers)
    assert abs(quantization.loss_change) < 0.03


def test_fine_tuning_learns(ran):
    _, results = ran
    finetuning = results.finetuning
    assert len(finetuning.run.losses) == TINY.steps
    assert finetuning.loss_after < finetuning.loss_before
    assert 0 < finetuning.trainable_share < 0.2
    assert finetuning.run.gradient_bytes == 4 * finetuning.trainable_parameters
    samples = results.delivery.samples
    assert len(samples) == 2
    assert any(sample.before != sample.after for sample in samples)


def test_the_adapter_comes_back_as_it_was_and_merges(ran):
    folder, results = ran
    delivery = results.delivery
    assert delivery.reload_difference == 0
    assert delivery.largest_logit > 0.1
    assert delivery.merge_difference < 1e-4 * delivery.largest_logit
    assert delivery.merged_loss == pytest.approx(results.finetuning.loss_after, rel=1e-4)
    files = [folder / "out" / f"adapter_{name}" for name in ("config.json", "model.safetensors")]
    assert delivery.adapter_bytes == sum(file.stat().st_size for file in files)


def test_metrics_and_report_hold_the_figures(ran):
    folder, results = ran
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["bits_per_weight"] == results.quantization.bits_per_weight
    assert metrics["delivery"]["samples"][0]["after"] == results.delivery.samples[0].after
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.findall(r"(?:src|href|url)\s*[=(]", page)  # nothing from elsewhere
    assert f"{results.quantization.bits_per_weight:.3f}" in page
    for layer in results.quantization.layers:
        assert f"{layer.relative_error:.3%}" in page


def test_the_second_run_takes_the_base_from_the_cache(
    ran, tmp_path, small_library, monkeypatch, capsys
):
    folder, first = ran
    monkeypatch.setattr(demo, "read_documents", lambda: small_library)
    shutil.copytree(folder / "cache", tmp_path / "cache")
    again = run_demo(TINY, tmp_path / "out", tmp_path / "cache")
    printed = capsys.readouterr().out
    assert again.pretraining.from_cache
    assert not first.pretraining.from_cache
    assert f"taken from {tmp_path / 'cache'}" in printed
    assert "equal logits, largest difference 0" in printed
    assert again.pretraining.run == first.pretraining.run
    assert again.quantization == first.quantization
    assert again.finetuning.run.losses == first.finetuning.run.losses  # to the last bit
