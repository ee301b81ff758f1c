"""The demo's base model: a small byte-level Llama, trained from scratch and then cached."""

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_native
from qlora_native.cli.batches import Example, shuffled_batches
from qlora_native.cli.corpus import PretrainingText
from qlora_native.cli.training import TrainingRun, held_out_loss, train_model

# A token is a byte. Byte 0, which no text contains, begins, ends and pads.
VOCABULARY_SIZE = 256
END_TOKEN_ID = 0

_RUN_FILE = "pretraining_run.json"


@dataclass(frozen=True)
class BaseModelSettings:
    """Shape of the base model, and how it is trained.

    The defaults make 3.0 M parameters, of which a step on 1,024 bytes takes 0.17 s on two cores.
    """

    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    steps: int = 1000
    batch_size: int = 8
    window: int = 128  # bytes of an example
    learning_rate: float = 1.5e-3
    seed: int = 0


@dataclass(frozen=True)
class BaseModel:
    """The trained base, what its training measured, and whether it came from the cache."""

    model: LlamaForCausalLM
    run: TrainingRun
    folder: Path
    from_cache: bool


def load_or_train_base_model(
    settings: BaseModelSettings, text: PretrainingText, cache_folder: Path, *, fresh: bool = False
) -> BaseModel:
    """The base model of `settings` and `text`, from the cache where it is there.

    Args:
        settings: what to build.
        text: what to train it on.
        cache_folder: holds one folder for each combination of settings, text and versions.
        fresh: train even if the cache has it.
    """
    folder = cache_folder / f"base-{_cache_key(settings, text)}"
    from_cache = folder.exists() and not fresh
    if not from_cache:
        model, run = _pretrain(settings, text)
        _save(model, run, folder)
    run = TrainingRun(**json.loads((folder / _RUN_FILE).read_text()))
    return BaseModel(LlamaForCausalLM.from_pretrained(folder).eval(), run, folder, from_cache)


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/qlora_native`, or `~/.cache/qlora_native`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "qlora_native"


def build_model(settings: BaseModelSettings) -> LlamaForCausalLM:
    """A fresh model in fp32, its weights drawn by `settings.seed`."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=512,
        bos_token_id=END_TOKEN_ID,
        eos_token_id=END_TOKEN_ID,
        pad_token_id=END_TOKEN_ID,
        initializer_range=0.8 / settings.hidden_size**0.5,
    )
    model = LlamaForCausalLM(config)
    # A model this narrow, trained this briefly, learns faster from embeddings of size one and from
    # a residual stream that its 2 · layers branches do not blow up (GPT-2's rule) than from Llama's
    # own N(0, 0.02²).
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight /= (2 * settings.layers) ** 0.5
    return model


def encode(text: str) -> list[int]:
    """UTF-8 bytes as token ids."""
    return list(text.encode())


def decode(token_ids: list[int]) -> str:
    """The text of `token_ids` up to the first end token."""
    text = bytes(token_ids).partition(bytes([END_TOKEN_ID]))[0]
    return text.decode(errors="replace")


@torch.no_grad()
def complete(model: LlamaForCausalLM, prompt: str, max_new_tokens: int = 80) -> str:
    """What the model writes after `prompt`, always taking the likeliest byte."""
    prompt_ids = torch.tensor([[END_TOKEN_ID, *encode(prompt)]])
    output = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return decode(output[0, prompt_ids.shape[1] :].tolist())


def _pretrain(
    settings: BaseModelSettings, text: PretrainingText
) -> tuple[LlamaForCausalLM, TrainingRun]:
    model = build_model(settings)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    batches = shuffled_batches(
        split_windows(text.train, settings.window),
        settings.batch_size,
        settings.steps,
        settings.seed,
    )
    held_out = held_out_examples(text, settings.window)
    run = train_model(
        model,
        batches,
        optimizer,
        settings.steps,
        description="pretraining",
        evaluate=lambda: held_out_loss(model, held_out, batch_size=32),
    )
    return model, run


def held_out_examples(text: PretrainingText, window: int) -> list[Example]:
    """Every eighth window of the held-out text: some 25,000 bytes, judged in a second or two."""
    return split_windows(text.held_out, window)[::8]


def split_windows(text: bytes, window: int) -> list[Example]:
    """Examples of `window` bytes one after the other; a shorter rest is left out."""
    starts = range(0, len(text) - window + 1, window)
    windows = (list(text[start : start + window]) for start in starts)
    return [Example(input_ids=ids, labels=ids) for ids in windows]


def _cache_key(settings: BaseModelSettings, text: PretrainingText) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    digest.update(f"{qlora_native.__version__} {torch.__version__}".encode())
    digest.update(hashlib.sha256(text.train).digest() + hashlib.sha256(text.held_out).digest())
    return digest.hexdigest()[:16]


def _save(model: LlamaForCausalLM, run: TrainingRun, folder: Path) -> None:
    """Write all of it or nothing: an interrupted run leaves no broken model behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "new")
        (Path(scratch) / "new" / _RUN_FILE).write_text(json.dumps(dataclasses.asdict(run)))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        try:
            (Path(scratch) / "new").rename(folder)
        except OSError:
            if not folder.exists():  # else another run of the same demo was first
                raise
