"""NF4Config: what `from_pretrained` is given, and what config.json keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_native.ops.storage import FLOAT_DTYPES, check_block_size

QUANT_METHOD = "qlora_nf4"


@register_quantization_config(QUANT_METHOD)
@dataclass(repr=False)  # transformers' own representation, which is JSON
class NF4Config(QuantizationConfigMixin):
    """How a model of transformers is held in NF4.

    `from_pretrained(path, quantization_config=NF4Config())` quantises a dense checkpoint while it
    is read; `save_pretrained` then writes a 4-bit checkpoint, and its config.json these settings.

    Args:
        block_size: weights that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits (4.127 bits a weight at block 64, against 4.5).
        compute_dtype: the dtype of the products: a torch.dtype or its name. None follows autocast
            where it is on, else the activations; that is what a model of one dtype wants.
        skip: names of what stays dense: a layer's whole name, or a part of it between dots
            (`"lm_head"`, `"visual"`, `"layers.0"`). None: the output head, what is tied to another
            weight, and the layer at the model's end (a classifier, which is trained). A list stands
            for itself: it has to name the head as well if that shall stay dense.

    Raises:
        ValueError: an argument is out of its range, or of another type.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None
    skip: list[str] | None = None

    def __post_init__(self) -> None:
        check_block_size("NF4Config", self.block_size)
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"NF4Config: double_quant is {self.double_quant!r}, want a bool")
        self.compute_dtype = _dtype(self.compute_dtype)
        if self.skip is not None:
            is_list = isinstance(self.skip, Sequence) and not isinstance(self.skip, str)
            if not is_list or not all(isinstance(name, str) for name in self.skip):
                raise ValueError(f"NF4Config: skip is {self.skip!r}, want a list of names or None")
            self.skip = list(self.skip)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """What `to_dict` gave, with `kwargs` in place of its values where they are settings.

        Raises:
            ValueError: a key is unknown, which a newer version may have written: what it asks for
                would be left out in silence.
        """
        settings = {**config_dict}
        method = settings.pop("quant_method", QUANT_METHOD)
        names = [setting.name for setting in fields(cls) if setting.init]
        if method != QUANT_METHOD:
            raise ValueError(f"NF4Config: quant_method is {method!r}, want {QUANT_METHOD!r}")
        if unknown := [repr(key) for key in settings if key not in names]:
            raise ValueError(
                f"NF4Config: the configuration has {', '.join(unknown)}, want only {names}"
            )
        settings |= {key: kwargs.pop(key) for key in names if key in kwargs}
        config = cls(**settings)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        settings = asdict(self)
        if self.compute_dtype is not None:
            settings["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return settings


def _dtype(value: Any) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"NF4Config: compute_dtype is {value!r}, want float32, bfloat16, float16 or None"
        )
    return dtype
