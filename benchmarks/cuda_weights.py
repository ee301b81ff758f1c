"""A weight on the GPU in the forms that the contenders want, each in copies that L2 cannot hold."""

import copy
from functools import cached_property

import torch
from torch import Tensor, nn

import qlora_native as q
from cuda_device import copies_past_l2
from linear4bit import make_linear4bit
from qlora_native.ops.storage import NF4Tensors


class CudaWeights:
    """A random W[n, k]; its forms are made when first asked for."""

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.n, self.k, self.device = n, k, device
        self.size = f"{n}×{k}"

    @cached_property
    def on_cpu(self) -> Tensor:
        """W itself, in bf16."""
        generator = torch.Generator().manual_seed(0)
        return (0.02 * torch.randn(self.n, self.k, generator=generator)).bfloat16()

    @cached_property
    def nf4_on_cpu(self) -> q.NF4Weight:
        """Quantised by the CPU backend: the same bytes, whatever the CUDA backend does."""
        return q.nf4_quantize(self.on_cpu)

    @cached_property
    def dense(self) -> list[Tensor]:
        """W in bf16."""
        return self._copies(lambda: self.on_cpu.to(self.device), 2)

    @cached_property
    def ours(self) -> list[q.NF4Linear]:
        """NF4Linear."""
        linear = nn.Linear(self.k, self.n, bias=False, dtype=torch.bfloat16, device="meta")
        linear.weight = nn.Parameter(self.on_cpu, requires_grad=False)
        layer = q.NF4Linear.from_linear(linear)
        return self._copies(lambda: copy.deepcopy(layer).to(self.device), 0.5)

    @cached_property
    def tensors(self) -> list[NF4Tensors]:
        """What the layers store."""
        return [layer.nf4_weight.tensors for layer in self.ours]

    @cached_property
    def decoded(self) -> Tensor:
        """What the layers stand for in bf16, decoded by the CPU backend."""
        return self.nf4_on_cpu.dequantize(torch.bfloat16).to(self.device)

    @property
    def nf4_bytes(self) -> int:
        """Codes and nested scales."""
        return self.nf4_on_cpu.nbytes

    @cached_property
    def theirs(self) -> list[nn.Module]:
        """bitsandbytes' Linear4bit with nested scales."""
        return self._copies(self._linear4bit, 0.5)

    @cached_property
    def workspace(self) -> Tensor:
        """One dense matrix for all that dequantise first."""
        return torch.empty(self.n, self.k, dtype=torch.bfloat16, device=self.device)

    def _linear4bit(self) -> nn.Module:
        return make_linear4bit(self.on_cpu.clone()).to(self.device)

    def _copies(self, make, bytes_per_weight: float) -> list:
        return copies_past_l2(make, int(bytes_per_weight * self.n * self.k), self.device)
