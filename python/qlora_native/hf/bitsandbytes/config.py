"""The `quantization_config` of bitsandbytes' checkpoints, to and from NF4Config."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_native.hf.config import NF4Config
from qlora_native.nn.model import name_matches

QUANT_METHOD = "bitsandbytes"


def is_bitsandbytes(quantization_config: Any) -> bool:
    """Whether a model's quantization_config, an object or what JSON has of it, is bitsandbytes'."""
    if isinstance(quantization_config, BitsAndBytesConfig):
        return True
    if not isinstance(quantization_config, Mapping):
        return False
    method = quantization_config.get("quant_method")
    has_flags = "load_in_4bit" in quantization_config or "load_in_8bit" in quantization_config
    return method == QUANT_METHOD or (method is None and has_flags)  # old ones have no method


def check_config(quantization_config: Any) -> BitsAndBytesConfig:
    """The configuration, of NF4.

    Raises:
        NotImplementedError: it is of LLM.int8() or FP4.
        ValueError: it is of nothing that bitsandbytes does.
    """
    config = quantization_config
    if not isinstance(config, BitsAndBytesConfig):
        try:
            config = BitsAndBytesConfig.from_dict(dict(config))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"bitsandbytes' quantization_config cannot be read: {error}"
            ) from error
    if config.load_in_8bit:
        raise NotImplementedError(
            "the checkpoint is quantised by bitsandbytes to 8 bits (LLM.int8()), want 4 bits (NF4)"
        )
    if not config.load_in_4bit:
        raise ValueError(
            "bitsandbytes' quantization_config has neither load_in_4bit nor load_in_8bit"
        )
    if config.bnb_4bit_quant_type != "nf4":
        raise NotImplementedError(
            f"the checkpoint is quantised by bitsandbytes to {config.bnb_4bit_quant_type!r}, want "
            "'nf4'"
        )
    return config


def to_nf4_config(config: BitsAndBytesConfig, block_size: int, double_quant: bool) -> NF4Config:
    """The same settings as ours; sizes of blocks are not in theirs, but beside each weight."""
    return NF4Config(
        block_size=block_size,
        double_quant=double_quant,
        compute_dtype=config.bnb_4bit_compute_dtype,
        skip=config.llm_int8_skip_modules,
    )


def to_bitsandbytes_config(
    config: NF4Config,
    model_dtype: torch.dtype,
    quant_storage: torch.dtype,
    quantized: Collection[str],
    dense: Collection[str],
) -> BitsAndBytesConfig:
    """The same settings as theirs.

    Args:
        config: ours.
        model_dtype: where ours compute in the activations' dtype, theirs want one by name.
        quant_storage: the dtype that codes are stored as.
        quantized: names of the layers in 4 bits.
        dense: names of all other modules with a weight.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=config.compute_dtype or model_dtype,
        bnb_4bit_quant_storage=quant_storage,
        llm_int8_skip_modules=_skip_modules(config.skip, quantized, dense),
    )


def _skip_modules(
    skip: list[str] | None, quantized: Collection[str], dense: Collection[str]
) -> list[str] | None:
    """`skip` for transformers, which finds by it which layers of such a checkpoint are dense.

    It takes an entry for a beginning (a regular expression) or an end of a name, where ours is a
    part between dots. Mostly that is the same; where it is not, the dense layers are listed.
    """
    if skip is None:
        return None
    skipped = [name for name in dense if any(name_matches(name, entry) for entry in skip)]
    finds_all = not any(should_convert_module(name, skip) for name in skipped)
    finds_more = not all(should_convert_module(name, skip) for name in quantized)
    return skip if finds_all and not finds_more else skipped
