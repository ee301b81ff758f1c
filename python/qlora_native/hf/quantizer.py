"""NF4HfQuantizer: transformers' loader, taught to quantise each weight as it is read."""

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from qlora_native import _core
from qlora_native.hf.checkpoint import tensor_dtypes
from qlora_native.hf.config import QUANT_METHOD, NF4Config
from qlora_native.hf.dense import forget_quantization
from qlora_native.hf.distributed import check_not_distributed_while_loading
from qlora_native.hf.layers import (
    check_skip,
    default_skip,
    has_finite_scales,
    is_named,
    is_offloaded,
    names_in_model,
    nf4_layers,
    put_nf4_layers,
    warn_of_dense_weights,
)
from qlora_native.hf.streamed_experts import StreamedExperts
from qlora_native.nn import LoRALinear, NF4Experts, NF4Linear
from qlora_native.nn.dense import dequantize_layers
from qlora_native.nn.model import kept_in_fp32


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
        self.dense_conversions: Any = None
        self._model: weakref.ref[nn.Module] | None = None
        self._expected: dict[str, tuple[torch.dtype, torch.Size]] = {}

    # ---- what transformers asks

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a 4-bit checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the 4-bit layers are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the model has native LoRA layers: Trainer would look for PEFT's alone."""
        model = None if self._model is None else self._model()
        return model is not None and any(isinstance(m, LoRALinear) for m in model.modules())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}  # a copy or a pickle is not of that model

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
        """Whether it is to be quantised, or is stored in bytes: then its shape is ours to check."""
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if not isinstance(module, NF4Linear | NF4Experts):
            return False
        dtype, _ = self._expected.get(param_name, (None, None))
        return name in module.weight_names or (self.pre_quantized and dtype == torch.uint8)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """No cast to bytes: a float where codes should be is refused after loading."""
        return None if dtype == torch.uint8 else super().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that the loader runs on each weight of a dense checkpoint."""
        return NF4Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Where the loader would stack the dense experts of a layer, quantise them one by one."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *args)
        if self.pre_quantized:
            return conversions
        return [StreamedExperts.in_place_of(conversion) for conversion in conversions]

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[None, dict[str, str]]:
        """Nothing is changed for saving; what `from_pretrained` would not load is said.

        With LoRALinear layers that is a warning, for Trainer's checkpoints are saved so, and it
        resumes from them by the names in them.
        """
        adapters = adapter_layers(model)
        native = [n for n in adapters if isinstance(model.get_submodule(n), LoRALinear)]
        if native:
            warnings.warn(
                f"save_pretrained: {native[0]} and {len(native) - 1} more layers have an adapter: "
                "load_state_dict and a resumed Trainer load this checkpoint, from_pretrained does "
                "not; save_lora writes the adapter on its own",
                stacklevel=3,
            )
        others = [name for name in adapters if name not in native]
        if others and not getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"save_pretrained: {others[0]} and {len(others) - 1} more layers have an "
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
        entries = kept_in_fp32(model) | set(config.skip or ())
        dense = default_skip(model) if config.skip is None else set()
        file_layers = self.layers_in_checkpoint(checkpoint_files)
        if not self.pre_quantized and config.skip is not None:
            check_skip(model, config.skip)
        if not self.pre_quantized or file_layers is None:
            layers = put_nf4_layers(
                model,
                config,
                lambda names: not any(name in dense or is_named(name, entries) for name in names),
            )
            warn_of_dense_weights(model, entries)
        else:
            stored = names_in_model(model, file_layers)
            layers = put_nf4_layers(model, config, lambda names: not stored.isdisjoint(names))
        if not layers:
            raise ValueError(
                f"NF4Config: {type(model).__name__} has no layer to hold in 4 bits"
                + (", by what its checkpoint has" if self.pre_quantized else " (after skip)")
            )
        self._expected = {
            name: (parameter.dtype, parameter.shape) for name, parameter in model.named_parameters()
        }

    def layers_in_checkpoint(self, checkpoint_files: Iterable[str] | None) -> set[str] | None:
        """The names of modules of which a checkpoint has bytes; None: there are no files to ask.

        Raises:
            ValueError: a file is damaged.
        """
        dtypes = tensor_dtypes(checkpoint_files)
        if dtypes is None:
            return None
        return {name.rpartition(".")[0] for name, dtype in dtypes.items() if dtype == "U8"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._check_loaded(model)
        for layer in nf4_layers(model):
            layer.requires_grad_(False)
        self._take_charge(model)
        return model

    def _take_charge(self, model: Any) -> None:
        self._model = weakref.ref(model)
        # transformers saves under the names of the checkpoint that it read, and takes apart what it
        # put together: the codes of experts, say, without their scales.
        self.dense_conversions = getattr(model, "_weight_conversions", None)
        model._weight_conversions = []

    def attach(self, model: Any) -> None:
        """Have `model`, whose layers are 4-bit already, be as if it had been loaded by this."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        self.postprocess_model(model)

    def _check_loaded(self, model: Any) -> None:
        """Raise ValueError for everything that is not as its layer wants it."""
        problems = self.problems
        failed = tuple(f"{name}_" for name in problems)  # a weight's scales are not there either
        for name, parameter in model.named_parameters():
            if name not in self._expected or parameter.is_meta:  # tied; offloaded
                continue
            if name.startswith(failed):
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
        if self.pre_quantized and not problems:
            for layer, names in nf4_layers(model).items():
                if not is_offloaded(layer) and not has_finite_scales(layer):
                    problems[names[0]] = "has a scale that is NaN or Inf"
        if problems:
            lines = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise ValueError(f"NF4Config: {type(model).__name__} cannot be loaded:\n  {lines}")

    # ---- back to dense

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # after a save it is
        dtype = dtype or model.dtype
        is_trained = not adapter_layers(model)  # beside an adapter the base stays frozen
        for name in dequantize_layers(model, dtype):
            model.get_submodule(name).requires_grad_(is_trained)
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
            layer_name, _, weight_name = name.rpartition(".")
            layer = model.get_submodule(layer_name)
            of_experts = (weight_name,) if isinstance(layer, NF4Experts) else ()
            try:
                parts = layer.quantize(dense, *of_experts)
            except ValueError as error:
                self.hf_quantizer.problems[name] = str(error)
                parts = {}
            del dense
            converted |= {f"{layer_name}.{part}": tensor for part, tensor in parts.items()}
        return converted


def adapter_layers(model: nn.Module) -> list[str]:
    """The names of layers with an adapter: native ones, and PEFT's."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) or hasattr(module, "base_layer")
    ]


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")
