"""Checkpoints as transformers and bitsandbytes write them, made on the spot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import import_bitsandbytes

# What a process starts with that is to have no bitsandbytes: it cannot be found or imported.
WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
"""


def save_with_bitsandbytes(
    model: Any,
    folder: Path,
    *,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    block_size: int = 64,
    max_shard_size: str = "5GB",
    **settings: Any,
) -> dict[str, Tensor]:
    """Write `model` to `folder` in 4 bits; returns bitsandbytes' dequantised weights by layer.

    It has not run when it is saved: one forward repacks the weights of bitsandbytes' layers.
    """
    with import_bitsandbytes():
        bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    dense = folder.with_name(f"{folder.name}_dense")
    model.save_pretrained(dense)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.pop("quant_type", "nf4"),
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
        **settings,
    )
    loaded = type(model).from_pretrained(dense, quantization_config=config)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers
    if block_size != 64:  # which transformers has no setting for
        for name, layer in layers.items():
            weight = model.get_submodule(name).weight.detach().to(layer.weight.quant_state.dtype)
            layer.weight = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                blocksize=block_size,
                compress_statistics=nested,
                quant_type="nf4",
                quant_storage=storage,
            ).to("cpu")
    loaded.save_pretrained(folder, max_shard_size=max_shard_size)
    return {name: dequantized(bnb, layer.weight) for name, layer in layers.items()}


def dequantized(bnb: Any, weight: Any) -> Tensor:
    """bitsandbytes' dense weight; its CPU kernel wants the codes as bytes."""
    return bnb.functional.dequantize_4bit(weight.data.view(torch.uint8), weight.quant_state)
