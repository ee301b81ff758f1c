"""`from_pretrained` of a checkpoint that transformers and bitsandbytes wrote, without bitsandbytes.

Which quantiser loads a checkpoint transformers decides by its config.json, and asks that the
configuration that `from_pretrained` is given be of the same class. `install` steps in there.
"""

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AutoHfQuantizer, register_quantizer
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_native.hf.bitsandbytes.config import check_config, is_bitsandbytes, to_nf4_config
from qlora_native.hf.bitsandbytes.format import NESTED_PARTS, WEIGHT, read_weight
from qlora_native.hf.bitsandbytes.layers import States, find_layers, read_states
from qlora_native.hf.checkpoint import tensor_dtypes
from qlora_native.hf.config import QUANT_METHOD, NF4Config
from qlora_native.hf.quantizer import NF4HfQuantizer
from qlora_native.nn import NF4Linear
from qlora_native.nn.nf4_experts import is_experts
from qlora_native.nn.nf4_linear import by_parameter

_LOADER = f"{QUANT_METHOD}_from_bitsandbytes"  # what transformers finds the loader by
_WRAPPED = ["quantization_config", "quantization_config_from_args"]


class BitsAndBytesCheckpoint(QuantizationConfigMixin):
    """The configurations that `from_pretrained` has found and has been given.

    It takes the place of a configuration from there to the making of the quantiser.
    """

    def __init__(self, stored: BitsAndBytesConfig, given: NF4Config | None) -> None:
        super().__init__(quant_method=_LOADER)
        self.stored = stored
        self.given = given


@register_quantizer(_LOADER)
class BitsAndBytesLoader(NF4HfQuantizer):
    """Puts the weights of a bitsandbytes checkpoint into NF4Linear layers.

    How they are quantised, the checkpoint says; how they are computed with, the NF4Config that was
    given, where it does say so. The model that is loaded is as one from a checkpoint of this
    library's, and is saved as one.
    """

    def __init__(self, quantization_config: BitsAndBytesCheckpoint, **kwargs: Any) -> None:
        self._stored, self._given = quantization_config.stored, quantization_config.given
        self._is_loading = True
        self._layers: set[str] = set()
        self._dtype_plan: dict[str, torch.dtype] = {}
        # The size of the blocks is not in config.json, but in the files.
        super().__init__(to_nf4_config(self._stored, block_size=64, double_quant=True), **kwargs)
        if self._given is not None and self._given.compute_dtype is not None:
            self.quantization_config.compute_dtype = self._given.compute_dtype

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What the loader does with the tensors of each weight; nothing once the model is there."""
        # The longest name first: transformers takes the first that a tensor's begins with.
        parts = sorted(NESTED_PARTS, key=len, reverse=True)
        return [WeightConverter(parts, WEIGHT, [ReadWeight(self)])] if self._is_loading else []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        states = _read_states(checkpoint_files)
        config = self.quantization_config
        config.block_size, config.double_quant = states.block_size, states.keep_nested
        _warn_of_other_settings(self._given, config)
        self._layers = set(states.of)
        self._dtype_plan = model._get_dtype_plan(kwargs.get("dtype"))
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
        placed = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
        if len(placed) < len(states.of):
            warnings.warn(
                f"{type(model).__name__} takes {len(placed)} of the {len(states.of)} layers that "
                "the bitsandbytes checkpoint has in 4 bits",
                stacklevel=2,
            )
        if experts := [name for name, module in model.named_modules() if is_experts(module)]:
            warnings.warn(
                f"the bitsandbytes checkpoint has the experts dense: {', '.join(experts)}; "
                "quantising the original checkpoint by NF4Config takes them along",
                stacklevel=2,
            )

    def layers_in_checkpoint(self, checkpoint_files: Iterable[str] | None) -> set[str]:
        """Names of the layers that are in 4 bits."""
        return self._layers

    def dtype_of(self, model: Any, name: str) -> torch.dtype:
        """What a dense weight is cast to: transformers casts none that an operation takes."""
        for pattern, dtype in self._dtype_plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return model.get_parameter_or_buffer(name).dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # For saving, transformers would turn the operation round, and for an adapter run it again.
        self._is_loading = False
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, ReadWeight) for op in getattr(conversion, "operations", ()))
        ]
        return super()._process_model_after_weight_loading(model, **kwargs)


class ReadWeight(ConversionOps):
    """Turns the tensors that bitsandbytes stores of a weight into the layer's parameters."""

    def __init__(self, hf_quantizer: BitsAndBytesLoader) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> "ReadWeight":
        """Itself: transformers copies the operation for each tensor, and the quantiser with it."""
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        *,
        full_layer_name: str,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """{part: [tensor]} of one weight -> {parameter: tensor}, by whole names."""
        parts = {part: value[0] for part, value in input_dict.items()}
        input_dict.clear()
        try:
            if parts.keys() == {WEIGHT}:
                return {full_layer_name: self._dense(model, full_layer_name, parts[WEIGHT])}
            return self._parameters(model, full_layer_name.rpartition(".")[0], parts)
        except (ValueError, NotImplementedError) as error:
            # The loader would put a table in the place of an error that is raised here.
            self.hf_quantizer.problems[full_layer_name] = str(error)
            return {}

    def _dense(self, model: Any, name: str, weight: Tensor) -> Tensor:
        if weight.is_floating_point():
            return weight.to(self.hf_quantizer.dtype_of(model, name))
        if model.get_parameter_or_buffer(name).is_floating_point():
            raise ValueError(f"is {weight.dtype} {list(weight.shape)}, want a float: no scales")
        return weight

    def _parameters(self, model: Any, layer: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        module = model.get_submodule(layer)
        if not isinstance(module, NF4Linear):
            raise ValueError(f"is in 4 bits, want a dense weight for a {type(module).__name__}")
        weight = read_weight(layer, parts, module.double_quant).tensors
        if (weight.n, weight.k) != module.weight_shape:
            raise ValueError(
                f"is of a layer {[weight.n, weight.k]}, want {list(module.weight_shape)}"
            )
        return {f"{layer}.{name}": tensor for name, tensor in by_parameter(weight).items()}


def install() -> None:
    """Have `from_pretrained` give bitsandbytes' NF4 checkpoints to the loader above.

    That is where it is given an NF4Config, and where it is given none and bitsandbytes is not
    installed. Everything else goes where it went.

    Raises:
        ImportError: this version of transformers decides in another place.
    """
    original = AutoHfQuantizer.merge_quantization_configs
    if getattr(original, "_gives_to", None) is BitsAndBytesLoader:
        return
    if list(inspect.signature(original).parameters) != _WRAPPED:
        raise ImportError(
            "qlora_native.hf: transformers' AutoHfQuantizer.merge_quantization_configs takes "
            f"{inspect.signature(original)}, want {_WRAPPED}; this version of transformers is not "
            "known"
        )

    @functools.wraps(original)
    def merge_quantization_configs(
        cls: Any, quantization_config: Any, quantization_config_from_args: Any
    ) -> Any:
        given = quantization_config_from_args
        is_ours = isinstance(given, NF4Config) or (
            given is None and not is_bitsandbytes_available()
        )
        if is_ours and is_bitsandbytes(quantization_config):
            return BitsAndBytesCheckpoint(check_config(quantization_config), given)
        return original(quantization_config, given)

    merge_quantization_configs._gives_to = BitsAndBytesLoader  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)


def _read_states(files: Iterable[str] | None) -> States:
    """What the files say of each layer in 4 bits."""
    files = None if files is None else list(files)
    names = tensor_dtypes(files)
    if names is None or files is None:
        raise ValueError(f"a bitsandbytes checkpoint is read from safetensors files, not {files}")
    with contextlib.ExitStack() as stack:
        # transformers makes the model on the meta device, and has that set while we are asked.
        stack.enter_context(torch.device("cpu"))
        opened = [
            stack.enter_context(safe_open(file, framework="pt", device="cpu")) for file in files
        ]
        file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        return read_states(find_layers(names), lambda name: file_of[name].get_tensor(name))


def _warn_of_other_settings(given: NF4Config | None, config: NF4Config) -> None:
    """Say so where a setting that was given is not the checkpoint's, which is in force."""
    default = NF4Config()
    for name in ("block_size", "double_quant", "skip"):
        wanted, stored = getattr(given or default, name), getattr(config, name)
        if wanted not in (stored, getattr(default, name)):
            warnings.warn(
                f"NF4Config has {name}={wanted!r}, but the checkpoint is in 4 bits already, with "
                f"{name}={stored!r}: that is used",
                stacklevel=2,
            )
