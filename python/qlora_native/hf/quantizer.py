"""NF4HfQuantizer: transformers' loader, taught to quantise each weight as it is read."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from qlora_native import _core
from qlora_native.hf.checkpoint import tensor_names
from qlora_native.hf.config import QUANT_METHOD, NF4Config
from qlora_native.hf.dense import forget_quantization
from qlora_native.hf.distributed import check_not_distributed_while_loading
from qlora_native.hf.layers import (
    check_skip,
    default_skip,
    is_named,
    kept_in_fp32,
    put_nf4_layers,
    warn_of_dense_weights,
)
from qlora_native.nn import LoRALinear, NF4Linear
from qlora_native.nn.model import modules_with_names, replace_module


@register_quantizer(QUANT_METHOD)
class NF4HfQuantizer(HfQuantizer):
    """Puts NF4Linear layers into a model of transformers before its weights are read.

    `pre_quantized` is False for a dense checkpoint, whose weights `NF4Quantize` turns into codes
    one at a time, and True for a 4-bit one, whose tensors are the layers' parameters. Which layers
    are 4-bit the configuration says for the former; for the latter, the file itself: the model may
    be loaded as another class, with another head.

    A weight that cannot be quantised or that does not fit its layer is noted while the others
    load, because the loader would replace an error by a table in the log; then all are raised.
    """

    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.problems: dict[str, str] = {}  # by parameter
        self._expected: dict[str, tuple[torch.dtype, torch.Size]] = {}

    # ---- what transformers asks

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a 4-bit checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the 4-bit layers are."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that cannot be right; asked again once `"auto"` is a map."""
        device_map = kwargs.get("device_map")
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in devices and not self.pre_quantized:
            raise ValueError(
                "NF4Config: device_map puts modules on the disk, where transformers would leave "
                "the dense weights; save the 4-bit model first (save_pretrained) and load that"
            )
        if not _core.build_info()["cuda"] and any(_is_cuda(device) for device in devices):
            raise ValueError(
                "NF4Config: device_map has a CUDA device, but this build of qlora_native has no "
                "CUDA backend (`qlora-native info`)"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """The current GPU where none is named and there is one, as with bitsandbytes."""
        if device_map is None and _core.build_info()["cuda"] and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """A tenth is kept for the dense weight that is being quantised."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is the weight of a 4-bit layer, whose shape is then ours to check."""
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        return isinstance(module, NF4Linear) and name == "weight"

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """No cast to bytes: a float where codes should be is refused after loading."""
        return None if dtype == torch.uint8 else super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that the loader runs on each weight of a dense checkpoint."""
        return NF4Quantize(self)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Nothing is changed for saving; a model that would not load again is refused."""
        adapters = [
            name
            for name, module in model.named_modules()
            if isinstance(module, LoRALinear) or hasattr(module, "base_layer")
        ]
        if adapters and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"save_pretrained: {adapters[0]} and {len(adapters) - 1} more layers have an "
                "adapter, whose names no model would load; save the adapter on its own or merge it"
            )
        return None, {}

    # ---- loading

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        check_not_distributed_while_loading(model.config)
        self.problems.clear()
        config = self.quantization_config
        if config.skip is not None and not self.pre_quantized:
            check_skip(model, config.skip)
        skip = kept_in_fp32(model) | set(
            default_skip(model) if config.skip is None else config.skip
        )
        stored = self.layers_in_checkpoint(checkpoint_files) if self.pre_quantized else None
        if stored is None:
            layers = put_nf4_layers(model, config, lambda name: not is_named(name, skip))
            warn_of_dense_weights(model, skip)
        else:
            names = _with_prefix_and_without(stored, model.base_model_prefix)
            layers = put_nf4_layers(model, config, names.__contains__)
        if not layers:
            raise ValueError(
                f"NF4Config: {type(model).__name__} has no layer to hold in 4 bits"
                + ("" if stored is None else ", by the names in its checkpoint")
            )
        self._expected = {
            name: (parameter.dtype, parameter.shape) for name, parameter in model.named_parameters()
        }

    def layers_in_checkpoint(self, checkpoint_files: Iterable[str] | None) -> set[str] | None:
        """Names of the layers that a 4-bit checkpoint has codes for; None: it has no names yet."""
        names = tensor_names(checkpoint_files)
        if names is None:
            return None
        weights = {name.removesuffix("_absmax") for name in names if name.endswith("_absmax")}
        weights = {name for name in weights if not name.endswith("_nested")}
        return {name.rpartition(".")[0] for name in weights}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._check_loaded(model)
        for layer in nf4_layers(model):
            layer.requires_grad_(False)
        return model

    def _check_loaded(self, model: Any) -> None:
        """Raise ValueError for everything that is not as its layer wants it."""
        problems = self.problems
        for name, parameter in model.named_parameters():
            if name not in self._expected or parameter.is_meta:  # tied; offloaded
                continue
            dtype, shape = self._expected[name]
            is_stored = dtype == torch.uint8
            if is_stored and not getattr(parameter, "_is_hf_initialized", False):
                problems.setdefault(name, "is not in the checkpoint")
            elif is_stored and (parameter.dtype != dtype or parameter.shape != shape):
                problems.setdefault(
                    name,
                    f"is {parameter.dtype} {list(parameter.shape)}, want {dtype} {list(shape)}",
                )
            elif dtype.is_floating_point and not parameter.is_floating_point():
                problems.setdefault(
                    name, f"is {parameter.dtype} {list(parameter.shape)}, want a float: no scales"
                )
        self._expected = {}
        if problems:
            lines = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise ValueError(f"NF4Config: {type(model).__name__} cannot be loaded:\n  {lines}")

    # ---- back to dense

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        layers = modules_with_names(model, lambda module: isinstance(module, NF4Linear))
        offloaded = [names[0] for layer, names in layers.items() if _is_offloaded(layer)]
        if offloaded:
            raise ValueError(
                f"dequantize: {offloaded[0]} and {len(offloaded) - 1} more layers are offloaded; "
                "load the model without offloading"
            )
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # after a save it is
        dtype = dtype or model.dtype
        while layers:
            layer, names = layers.popitem()
            replace_module(model, names, layer.to_dense(dtype).requires_grad_(True))
        return model if dtype == model.dtype else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Leave no trace of the quantiser in the model or its configurations."""
        forget_quantization(model)


class NF4Quantize(ConversionOps):
    """Turns the dense weights of 4-bit layers into their parameters; others pass through."""

    def __init__(self, hf_quantizer: NF4HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """{parameter: dense weight} -> {parameter: bytes}; each source is dropped at once."""
        converted: dict[str, Tensor] = {}
        parts: Mapping[str, Tensor]
        while input_dict:
            name, value = input_dict.popitem()
            dense = value.pop() if isinstance(value, list) else value
            del value
            if not self.hf_quantizer.param_needs_quantization(model, name):
                converted[name] = dense
                continue
            layer_name, _, _ = name.rpartition(".")
            try:
                parts = model.get_submodule(layer_name).quantize(dense)
            except ValueError as error:
                self.hf_quantizer.problems[name] = str(error)
                parts = {}
            del dense
            converted |= {f"{layer_name}.{part}": tensor for part, tensor in parts.items()}
        return converted


def nf4_layers(model: nn.Module) -> list[nn.Module]:
    """The 4-bit layers of `model`."""
    return [module for module in model.modules() if isinstance(module, NF4Linear)]


def _is_offloaded(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


def _with_prefix_and_without(names: set[str], prefix: str) -> set[str]:
    """A head's model has a prefix before the names that the bare model has, and loads both."""
    dotted = f"{prefix}."
    return {
        *names,
        *(name.removeprefix(dotted) for name in names),
        *(dotted + name for name in names),
    }
