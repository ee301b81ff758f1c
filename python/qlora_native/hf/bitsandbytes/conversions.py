"""The two ways of a conversion: which layers there are, and what becomes of each."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qlora_native.hf.bitsandbytes.config import (
    check_config,
    to_bitsandbytes_config,
    to_nf4_config,
)
from qlora_native.hf.bitsandbytes.format import (
    QUANT_STATE,
    StoredWeight,
    read_weight,
    write_weight,
)
from qlora_native.hf.bitsandbytes.layers import Layer, find_layers, shared_settings
from qlora_native.hf.bitsandbytes.linear_shapes import LinearShapes
from qlora_native.hf.bitsandbytes.quant_state import read_quant_state
from qlora_native.hf.checkpoint_folder import CheckpointFolder
from qlora_native.hf.config import NF4Config
from qlora_native.hf.safetensors_files import TensorSpec, spec_of
from qlora_native.nn.nf4_linear import WEIGHT_PARAMETERS, by_parameter
from qlora_native.ops.storage import FLOAT_DTYPES, NF4Tensors, empty_nf4_tensors

Form = Literal["nf4", "bitsandbytes"]


class Conversion(Protocol):
    """What a conversion makes of a checkpoint."""

    form: Form  # that it makes
    layers: list[Layer]  # of the source

    def specs(self, layer: Layer) -> dict[str, TensorSpec]:
        """Of the layer's new tensors, by their names without its own."""

    def convert(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's new tensors."""

    def quantization_config(self) -> dict[str, Any]:
        """For config.json."""


class ToNF4:
    """From bitsandbytes' form to this library's."""

    form: Form = "nf4"

    def __init__(self, folder: CheckpointFolder, stored: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = check_config(stored)
        self.layers = find_layers(folder.file_of)
        self._states = {}
        for layer in self.layers:
            name = f"{layer.name}.{QUANT_STATE}"
            self._states[layer.name] = read_quant_state(name, folder.load(name))
        self._settings = shared_settings(self._states)

    def specs(self, layer: Layer) -> dict[str, TensorSpec]:
        """See Conversion."""
        state = self._states[layer.name]
        tensors = empty_nf4_tensors(state.n, state.k, *self._settings, device="meta")
        return {name: spec_of(tensor) for name, tensor in by_parameter(tensors).items()}

    def convert(self, layer: Layer) -> dict[str, Tensor]:
        """See Conversion."""
        parts = {part: self._folder.load(f"{layer.name}.{part}") for part in layer.parts}
        return by_parameter(read_weight(layer.name, parts).tensors)

    def quantization_config(self) -> dict[str, Any]:
        """See Conversion."""
        return to_nf4_config(self._config, *self._settings).to_dict()


class ToBitsAndBytes:
    """From this library's form to bitsandbytes'."""

    form: Form = "bitsandbytes"

    def __init__(
        self, folder: CheckpointFolder, stored: Mapping[str, Any], quant_storage: torch.dtype
    ) -> None:
        self._folder = folder
        self._config: NF4Config = NF4Config.from_dict(stored)
        self._storage = quant_storage
        self._dtype = _model_dtype(folder)
        self._shapes = LinearShapes(folder)
        parts = WEIGHT_PARAMETERS if self._config.double_quant else WEIGHT_PARAMETERS[:2]
        suffix = f".{WEIGHT_PARAMETERS[1]}"
        names = [name.removesuffix(suffix) for name in folder.file_of if name.endswith(suffix)]
        self.layers = [Layer(name, parts) for name in sorted(names)]
        for name in folder.file_of:
            if name.endswith("_absmax") and not name.endswith((suffix, f".{WEIGHT_PARAMETERS[2]}")):
                raise NotImplementedError(
                    f"{name}: is of a parameter that is no linear layer's weight, which a "
                    "bitsandbytes checkpoint cannot hold in 4 bits"
                )
        if not self.layers:
            raise ValueError("the checkpoint says that it is in 4 bits, and has no 4-bit weight")
        self._empty = {layer.name: self._checked(layer) for layer in self.layers}

    def specs(self, layer: Layer) -> dict[str, TensorSpec]:
        """See Conversion."""
        # All is on the meta device but the offset, on which the length of the quant_state depends.
        weight = StoredWeight(self._empty[layer.name], self._dtype, self._storage)
        return {part: spec_of(tensor) for part, tensor in write_weight(weight).items()}

    def convert(self, layer: Layer) -> dict[str, Tensor]:
        """See Conversion."""
        empty = self._empty[layer.name]
        loaded = [self._folder.load(f"{layer.name}.{part}") for part in layer.parts]
        codes, absmax, nested_absmax, nested_offset = (*loaded, None, None)[:4]
        tensors = empty._replace(
            codes=codes,
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
        )
        return write_weight(StoredWeight(tensors, self._dtype, self._storage))

    def quantization_config(self) -> dict[str, Any]:
        """See Conversion."""
        quantized = {layer.name for layer in self.layers}
        names = self._folder.file_of
        modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        return to_bitsandbytes_config(
            self._config, self._dtype, self._storage, quantized, sorted(modules - quantized)
        ).to_dict()

    def _checked(self, layer: Layer) -> NF4Tensors:
        """The layer's weight, on the meta device but for the offset, once its parts are right."""
        stored = {
            part: self._folder.spec(name)
            for part in WEIGHT_PARAMETERS
            if (name := f"{layer.name}.{part}") in self._folder.file_of
        }
        n, k = self._shapes.of_layer(layer.name, stored[WEIGHT_PARAMETERS[0]].shape)
        block_size, double_quant = self._config.block_size, self._config.double_quant
        empty = empty_nf4_tensors(n, k, block_size, double_quant, device="meta")
        wanted = {name: spec_of(tensor) for name, tensor in by_parameter(empty).items()}
        if stored != wanted:
            raise ValueError(
                f"{layer.name}: its tensors are {_shown(stored)}, want {_shown(wanted)} for "
                f"{n} × {k} weights, block_size={block_size}, double_quant={double_quant}"
            )
        if not double_quant:
            return empty
        return empty._replace(nested_offset=self._folder.load(f"{layer.name}.{layer.parts[3]}"))


def _shown(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec.dtype} {list(spec.shape)}" for name, spec in specs.items())


def _model_dtype(folder: CheckpointFolder) -> torch.dtype:
    """What the configuration says; where it does not, float32, as transformers has it."""
    name = folder.config.get("dtype", folder.config.get("torch_dtype", "float32"))
    dtype = getattr(torch, str(name), None)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{folder.path}: the model's dtype is {name!r}, want float32, bfloat16 or float16"
        )
    return dtype
