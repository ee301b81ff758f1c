"""What quantising did to a model: bytes and error, layer by layer."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from qlora_native import NF4Linear
from qlora_native.cli.training import total_bytes


@dataclass(frozen=True)
class LayerMeasurement:
    """One linear layer before and after."""

    name: str
    shape: tuple[int, int]  # [out_features, in_features]
    dense_bytes: int  # the weight before
    nf4_bytes: int  # the weight after: codes and all scales
    relative_error: float  # ‖W − dequantize(W)‖ / ‖W‖, Frobenius norms

    @property
    def weight_count(self) -> int:
        """n · k."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> str:
        """The last part of the name: `q_proj`."""
        return self.name.rpartition(".")[2]


@torch.no_grad()
def measure_layers(dense: nn.Module, quantized: nn.Module) -> list[LayerMeasurement]:
    """Compare each NF4Linear of `quantized` with the nn.Linear of that name in `dense`."""
    return [
        _measure(name, dense.get_submodule(name), layer)
        for name, layer in quantized.named_modules()
        if isinstance(layer, NF4Linear)
    ]


def bits_per_weight(layers: Iterable[LayerMeasurement]) -> float:
    """The stored bits of all `layers`, scales included, for each weight."""
    layers = list(layers)
    return 8 * sum(x.nf4_bytes for x in layers) / sum(x.weight_count for x in layers)


def _measure(name: str, dense: nn.Module, layer: NF4Linear) -> LayerMeasurement:
    weight = dense.weight
    difference = weight - layer.dequantize(weight.dtype)
    return LayerMeasurement(
        name=name,
        shape=(layer.out_features, layer.in_features),
        dense_bytes=total_bytes([weight]),
        nf4_bytes=total_bytes(p for p in layer.parameters() if p.dtype == torch.uint8),
        relative_error=(difference.norm() / weight.norm()).item(),
    )
