"""Experts that a checkpoint has one by one, quantised one by one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from qlora_native.nn import NF4Experts


class StreamedExperts(WeightConverter):
    """A converter that holds the dense weight of one expert, where transformers holds all.

    A checkpoint of Mixtral has three matrices for every expert, and transformers stacks those of a
    layer: with their copies that is more memory than the whole 4-bit model may take. Here the same
    operations run on one expert after the other, and what comes out is quantised at once.
    """

    __slots__ = ()

    @classmethod
    def in_place_of(cls, converter: Any) -> Any:
        """This for a converter that stacks experts and joins their matrices, else itself."""
        if not _stacks_experts(converter):
            return converter
        return _with_class(cls, converter)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Tensor]:
        """The parameters of the layer's weight by name; none if there is a problem with it."""
        module_name, _, weight_name = layer_name.rpartition(".")
        layer = model.get_submodule(module_name)
        if not isinstance(layer, NF4Experts):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        sources = dict(self.collected_tensors)
        self.collected_tensors.clear()
        counts = {len(tensors) for tensors in sources.values()}
        try:
            if counts != {layer.num_experts} or len(sources) != len(self.source_patterns):
                found = {pattern: len(tensors) for pattern, tensors in sources.items()}
                raise ValueError(f"the checkpoint has {found}, want {layer.num_experts} of each")
            stored = layer.quantize(self._experts(sources), weight_name)
        except ValueError as error:
            hf_quantizer.problems[layer_name] = str(error)
            return {}
        return {f"{module_name}.{part}": tensor for part, tensor in stored.items()}

    @torch.no_grad()
    def _experts(self, sources: dict[str, list[Any]]) -> Iterator[Tensor]:
        """What the operations would make of one expert after the other."""
        _, *joins = self.operations
        for e in range(len(sources[self.source_patterns[0]])):
            matrices = [_read(sources[pattern][e]) for pattern in self.source_patterns]
            yield torch.cat(matrices, dim=joins[0].dim - 1) if joins else matrices.pop()

    def reverse_transform(self) -> Any:
        """What transformers saves a dense model by."""
        return _with_class(WeightConverter, self).reverse_transform()


def _stacks_experts(converter: Any) -> bool:
    if type(converter) is not WeightConverter or len(converter.target_patterns) != 1:
        return False
    first, *joins = converter.operations
    is_joined = len(joins) == 1 and isinstance(joins[0], Concatenate) and joins[0].dim > 0
    is_single = not joins and len(converter.source_patterns) == 1
    return isinstance(first, MergeModulelist) and first.dim == 0 and (is_joined or is_single)


def _with_class(cls: type, converter: Any) -> Any:
    twin = cls(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        operations=converter.operations,
        force_cpu=converter.force_cpu,
    )
    twin.scope_prefix, twin.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    twin._was_used = converter._was_used
    return twin


def _read(source: Any) -> Tensor:
    """transformers hands over a function that reads, or the future of one in another thread."""
    return source() if callable(source) else source.result()
