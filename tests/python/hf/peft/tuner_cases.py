"""What the tests of PEFT's tuners need: a case for each, and a model with its dense twin."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_native import NF4Linear, quantize_model
from support import FP32_ROUNDOFF

SIZE, INNER, BLOCKS, VOCABULARY = 64, 128, 2, 96
TARGETS = ["q_proj", "v_proj", "down_proj"]

# Twins differ in the order in which base products are summed. A block has seven of them, of which
# five follow each other, and the head is one more; each may be off by a unit of roundoff per term
# (see `Approximate`), and the norms between blocks keep that from growing.
TOLERANCE = (5 * BLOCKS + 1) * (INNER + 2) * FP32_ROUNDOFF


@dataclass
class Case:
    """How a tuner is configured for the tiny model."""

    settings: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)  # what its forward takes besides
    merges: bool = True
    unmerges: bool = True
    loads: bool = True  # what PEFT saves is what it loads


def _layers(merges: bool = True, unmerges: bool = True, **settings: Any) -> Case:
    return Case({"target_modules": TARGETS, **settings}, merges=merges, unmerges=unmerges)


def _prompt(**settings: Any) -> Case:
    settings = {"task_type": "CAUSAL_LM", **settings}
    return Case(settings, merges=False)


TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
TASKS = {"task_ids": torch.tensor([0, 1])}
RANKS = {"init_r": 6, "target_r": 3, "total_step": 10, "tinit": 1, "tfinal": 2, "deltaT": 1}
CPT_TOKENS = {
    "cpt_token_ids": [5, 6, 7, 8],
    "cpt_mask": [1] * 4,
    "cpt_tokens_type_mask": [1, 2, 3, 4],
}

CASES = {
    "ADALORA": _layers(**RANKS),
    "ADAMSS": _layers(r=4, num_subspaces=2, subspace_rank=1),
    "ADAPTION_PROMPT": _prompt(adapter_len=4, adapter_layers=2),
    "BEFT": _layers(target_modules=["q_proj", "v_proj"]),  # it merges into biases
    "BOFT": _layers(boft_block_size=4),
    "C3A": _layers(block_size=16),
    "CARTRIDGE": _prompt(num_virtual_tokens=4),
    "CPT": _prompt(**CPT_TOKENS),
    "DEFT": _layers(r=4),
    "DELORA": _layers(r=4),
    "FOURIERFT": _layers(n_frequency=20),
    "FROD": _layers(),
    "GLORA": _layers(r=4),
    "GRALORA": _layers(r=4),
    "HIRA": _layers(r=4),
    "HRA": _layers(r=4),
    "IA3": _layers(feedforward_modules=["down_proj"]),
    "LILY": _layers(r=4, stride_A=1, num_B=2, merges=False),
    "LN_TUNING": Case({"target_modules": ["input_layernorm"]}),
    "LOHA": _layers(r=4),
    "LOKR": _layers(r=4),
    "LORA": _layers(r=4),
    "MISS": _layers(r=4),
    "MULTITASK_PROMPT_TUNING": Case(
        {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 2}, TASKS, merges=False
    ),
    "OFT": _layers(oft_block_size=4, r=0),
    "OSF": _layers(effective_rank=4, unmerges=False),
    "P_TUNING": _prompt(num_virtual_tokens=4),
    "PEANUT": _layers(r=4),
    "POLY": Case(
        {
            "task_type": "CAUSAL_LM",
            "target_modules": TARGETS,
            "r": 4,
            "n_tasks": 2,
            "n_skills": 2,
        },
        TASKS,
        merges=False,
    ),
    "PREFIX_TUNING": _prompt(num_virtual_tokens=4),
    "PROMPT_TUNING": _prompt(num_virtual_tokens=4),
    "PSOFT": _layers(r=4),
    "PVERA": _layers(r=4),
    "RANDLORA": _layers(r=4),
    "ROAD": _layers(group_size=4),
    "SHADOW": _prompt(),
    "SHIRA": _layers(r=4),
    "SUPERTUNING": _layers(sparsity=0.9),
    "TINYLORA": _layers(),
    "TRAINABLE_TOKENS": Case({"token_indices": TOKENS[0, :3].unique().tolist()}),
    "UNILORA": _layers(r=4, theta_d_length=32),
    "VBLORA": _layers(r=4, num_vectors=8, vector_length=16),
    "VERA": _layers(r=4),
    "WAVEFT": _layers(n_frequency=20),
    # PEFT takes the classifier's `layers.0` for a part of the adapter "0" and does not save it.
    "XLORA": Case(
        {"task_type": "CAUSAL_LM", "hidden_size": SIZE, "xlora_depth": 2}, merges=False, loads=False
    ),
}
ALL_TYPES = sorted(
    str(getattr(peft_type, "value", peft_type)) for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING
)


@functools.cache
def _llama(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


@functools.cache
def _quantized(dtype: torch.dtype) -> PreTrainedModel:
    return quantize_model(copy.deepcopy(_llama(dtype)))


def nf4_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny Llama with NF4Linear layers and biases; the same bits at each call."""
    return copy.deepcopy(_quantized(dtype))


def dense_twin(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model with nn.Linear layers that have the dequantised weights."""
    twin = copy.deepcopy(_llama(dtype))
    with torch.no_grad():
        for name, layer in _quantized(dtype).named_modules():
            if isinstance(layer, NF4Linear):
                twin.get_submodule(name).weight.copy_(layer.dequantize(dtype))
    return twin


def make_config(name: str, folder: Path) -> PeftConfig:
    settings = copy.deepcopy(CASES[name].settings)
    if name == "XLORA":  # mixes LoRA adapters that are there already
        settings["adapters"] = {str(i): saved_lora(folder / f"lora{i}", i) for i in range(2)}
    return config_class(name)(**settings)


def config_class(name: str) -> Callable[..., PeftConfig]:
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]


def tuner_class(name: str) -> type | None:
    return PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(name)]


def saved_lora(folder: Path, seed: int) -> str:
    if not folder.exists():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        peft.get_peft_model(dense_twin(), config).save_pretrained(folder)
    return str(folder)


def adapted(model: PreTrainedModel, name: str, folder: Path, noise: float = 0.05) -> PeftModel:
    """The tuner on `model`, started from a fixed seed, with noise on all that it trains.

    Many tuners start as the identity, where half of their formula does not show.
    """
    config = make_config(name, folder)
    torch.manual_seed(0)
    adapted_model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(adapted_model.named_parameters()):
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.add_((noise * change).to(parameter.dtype))
    return adapted_model


def logits(model: nn.Module, name: str | None = None) -> Tensor:
    torch.manual_seed(3)  # PVeRA samples
    model.eval()
    with torch.no_grad():
        return model(**CALL, **(CASES[name].call if name else {})).logits


def trained_step(model: nn.Module, name: str) -> Tensor:
    """The loss, after its backward."""
    torch.manual_seed(3)
    model.train()
    loss = model(**CALL, **CASES[name].call).loss
    loss.backward()
    return loss.detach()


class _InRows:
    """The part of scikit-learn's KMeans that AdaMSS uses: any clustering will do for a test."""

    def __init__(self, n_clusters: int, **_: Any) -> None:
        self.n_clusters = n_clusters

    def fit_predict(self, rows: numpy.ndarray) -> numpy.ndarray:
        return numpy.arange(len(rows)) * self.n_clusters // len(rows)


def provide_kmeans(monkeypatch: Any) -> None:
    """scikit-learn need not be installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        package, cluster = types.ModuleType("sklearn"), types.ModuleType("sklearn.cluster")
        cluster.KMeans = _InRows
        package.cluster = cluster
        monkeypatch.setitem(sys.modules, "sklearn", package)
        monkeypatch.setitem(sys.modules, "sklearn.cluster", cluster)
