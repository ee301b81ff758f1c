"""`from_pretrained` of a small Llama, quantised on the way or read in 4 bits."""

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import qlora_native as q
from goals import BNB
from harness import OURS, Case, Work
from qlora_native.hf import NF4Config

DENSE = "bf16, not quantised"
_LAYERS, _HIDDEN, _INTERMEDIATE, _VOCABULARY = 8, 1024, 2816, 4096
_SIZE = "Llama of 111 M parameters"


def works() -> Iterator[Work]:
    yield Work("from_pretrained, dense checkpoint", _SIZE, _from_dense)
    yield Work("from_pretrained, bitsandbytes checkpoint", _SIZE, _from_bitsandbytes)


def _from_dense() -> Case:
    folder = _dense_folder()
    contenders = {
        OURS: lambda: _load(folder, quantization_config=NF4Config()),
        BNB: lambda: _load(folder, quantization_config=_bitsandbytes_config()),
        DENSE: lambda: _load(folder),  # what transformers takes for the rest
    }
    ours, theirs, dense = (load() for load in contenders.values())
    for name, layer in _layers(ours).items():
        w = dense.get_submodule(name).weight
        if not torch.equal(layer.dequantize(), q.nf4_quantize(w).dequantize()):
            raise SystemExit(f"{name} is not what nf4_quantize gives")
        # Not the same bits: on a CPU theirs rounds some scales to the next but one.
        _assert_close(name, layer.dequantize(), _dequantized(theirs.get_submodule(name)))
    return Case(contenders)


def _from_bitsandbytes() -> Case:
    folder = _bitsandbytes_folder()
    contenders: dict[str, Callable[[], nn.Module]] = {
        OURS: lambda: _load(folder, quantization_config=NF4Config()),
        BNB: lambda: _load(folder),
    }
    ours, theirs = (load() for load in contenders.values())
    for name, layer in _layers(ours).items():
        weight = _dequantized(theirs.get_submodule(name))
        if not torch.equal(layer.dequantize(weight.dtype), weight):
            raise SystemExit(f"{name} is not what bitsandbytes has")
    return Case(contenders)


def _load(folder: Path, **settings: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def _bitsandbytes_config() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@cache
def _dense_folder() -> Path:
    """bf16 safetensors with random weights, gone when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="qlora_bench_"))
    atexit.register(shutil.rmtree, folder)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=_LAYERS,
        num_attention_heads=16,
        dtype=torch.bfloat16,
    )
    with _default_dtype(torch.bfloat16):
        LlamaForCausalLM(config).save_pretrained(folder / "dense")
    return folder / "dense"


@cache
def _bitsandbytes_folder() -> Path:
    dense = _dense_folder()
    folder = dense.with_name("bitsandbytes")
    _load(dense, quantization_config=_bitsandbytes_config()).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def _layers(model: nn.Module) -> dict[str, q.NF4Linear]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, q.NF4Linear)}
    if len(layers) != 7 * _LAYERS:
        raise SystemExit(f"{len(layers)} layers are in 4 bits, want {7 * _LAYERS}")
    return layers


def _dequantized(layer: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs.float()).abs().mean() / ours.abs().mean()
    if difference > 2**-7:
        raise SystemExit(f"{name}: bitsandbytes' weight differs by {difference:.2%} on average")
