"""Real runs of Trainer and of TRL's SFTTrainer: the loss falls, resuming is exact."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qlora_native import (
    LoRALinear,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
    add_lora,
)
from qlora_native.hf import NF4Config, prepare_model
from support import same_bits
from tiny_model import make_tokenizer, save_tiny_model

STEPS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


class Patterns(Dataset):
    """Arithmetic progressions of tokens, which a model learns within a few steps."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        tokens = torch.arange(16) * (i % 5 + 1) % 97
        return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def load(path, dtype):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=NF4Config())


def with_native_lora(model):
    return add_lora(prepare_model(model), r=4, lora_dropout=0.1)


def with_peft(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(prepare_model(model), config)


def trainable(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def settings(output: Path, **more):
    return {
        "output_dir": str(output),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        **more,
    }


def run_trainer(model, output, optimizer=PagedAdamW, resume=None, own=None, **more):
    """`own`: the optimiser's settings, beside its rate."""
    before = frozen(model)
    trainer = Trainer(
        model,
        TrainingArguments(**settings(output, **more)),
        train_dataset=Patterns(),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 5e-3, **(own or {})}),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert type(trainer.optimizer.optimizer) is optimizer
    after = frozen(model)
    assert all(same_bits(before[name], after[name]) for name in before)
    return trainer


@pytest.mark.parametrize("optimizer", [PagedAdamW, PagedAdamW8bit])
@pytest.mark.parametrize("adapt", [with_native_lora, with_peft])
def test_trainer_learns_and_resumes_exactly(path, tmp_path, adapt, optimizer):
    whole = adapt(load(path, torch.bfloat16))
    start = trainable(whole)
    losses = losses_of(run_trainer(whole, tmp_path / "whole", optimizer))
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    end = trainable(whole)
    assert all(not torch.equal(start[name], end[name]) for name in start)

    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    resumed = adapt(load(path, torch.bfloat16))
    trainer = run_trainer(resumed, tmp_path / "resumed", optimizer, resume=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert losses_of(trainer)[STEPS // 2 :] == losses[STEPS // 2 :]
    for name, value in trainable(resumed).items():
        assert same_bits(value, end[name]), name


@pytest.mark.parametrize("has_file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("optimizer", [PagedAdamW, PagedAdamW8bit, PagedLion, PagedLion8bit])
def test_trainer_resumes_exactly_whatever_the_optimiser_is(path, tmp_path, optimizer, has_file):
    """Gradients accumulate, are clipped, and 16-bit factors are rounded at random."""
    own = {"stochastic_rounding": True, "page_file": str(tmp_path) if has_file else None}
    if optimizer in (PagedAdamW8bit, PagedLion8bit):
        own["min_8bit_size"] = 1
    more = {"own": own, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "logging_steps": 4}

    def make_model():
        return with_native_lora(load(path, torch.bfloat16)).to(torch.bfloat16)

    whole = make_model()
    start = trainable(whole)
    assert {value.dtype for value in start.values()} == {torch.bfloat16}
    trainer = run_trainer(whole, tmp_path / "whole", optimizer, **more)
    report = trainer.optimizer.optimizer.paging_report()
    assert {part.strategy for part in report.parts} == {"file" if has_file else "ordinary"}
    end = trainable(whole)
    assert not any(same_bits(start[name], end[name]) for name in start)

    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    resumed = make_model()
    run_trainer(resumed, tmp_path / "resumed", optimizer, resume=str(checkpoint), **more)
    for name, value in trainable(resumed).items():
        assert same_bits(value, end[name]), name


@pytest.mark.parametrize("adapt", [with_native_lora, with_peft])
@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ],
    ids=["autocast", "checkpointing", "reentrant", "accumulation"],
)
def test_settings_of_the_trainer(path, tmp_path, adapt, more):
    model = adapt(load(path, torch.float32 if "bf16" in more else torch.bfloat16))
    losses = losses_of(run_trainer(model, tmp_path, save_strategy="no", **more))
    assert losses[-1] < losses[0] - 0.05


def test_trainer_evaluates_and_saves_the_adapter_alone(path, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_peft(load(path, torch.bfloat16))
    trainer = run_trainer(model, tmp_path, eval_strategy="no", save_strategy="no")
    loss = trainer.evaluate(Patterns())["eval_loss"]
    trainer.save_model(tmp_path / "adapter")
    saved = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    again = peft.PeftModel.from_pretrained(load(path, torch.bfloat16), tmp_path / "adapter")
    evaluation = Trainer(
        again, TrainingArguments(**settings(tmp_path / "again")), eval_dataset=Patterns()
    )
    assert evaluation.evaluate()["eval_loss"] == loss


def run_sft(path, output, by_peft, resume=None):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft = pytest.importorskip("peft")
    model = load(path, torch.bfloat16)
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    examples = [{"text": "abcdefgh" * (2 + i % 3)} for i in range(24)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = trl.SFTTrainer(
            prepare_model(model) if by_peft else with_native_lora(model),
            args=trl.SFTConfig(**settings(output, max_length=32, bf16=False)),
            train_dataset=datasets.Dataset.from_list(examples),
            processing_class=make_tokenizer(),
            peft_config=config if by_peft else None,
            optimizer_cls_and_kwargs=(PagedAdamW, {"lr": 5e-3}),
        )
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("by_peft", [True, False], ids=["peft", "native"])
def test_sft_trainer_learns_and_resumes_exactly(path, tmp_path, by_peft):
    whole = run_sft(path, tmp_path / "whole", by_peft)
    losses = losses_of(whole)
    assert losses[-1] < losses[0] - 0.1
    assert type(whole.optimizer.optimizer) is PagedAdamW
    factors = trainable(whole.model)
    assert {value.dtype for value in factors.values()} == {torch.float32}
    assert any(isinstance(m, LoRALinear) for m in whole.model.modules()) != by_peft

    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    resumed = run_sft(path, tmp_path / "resumed", by_peft, resume=str(checkpoint))
    assert losses_of(resumed)[STEPS // 2 :] == losses[STEPS // 2 :]
    for name, value in trainable(resumed.model).items():
        assert same_bits(value, factors[name]), name


def test_a_quantised_model_without_adapters_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="adapters"):
        Trainer(
            load(path, torch.bfloat16),
            TrainingArguments(**settings(tmp_path)),
            train_dataset=Patterns(),
        )


def test_native_layers_are_in_the_model(path):
    model = with_native_lora(load(path, torch.bfloat16))
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 14
