"""A weight in the forms that the contenders want it in, each in copies that L3 cannot hold."""

import copy
from functools import cached_property

import torch
from torch import Tensor, nn

import qlora_native as q
from harness import copies_past_l3
from linear4bit import make_linear4bit


class Weights:
    """A random W[n, k]; layers are made when first asked for."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.size = f"{n}×{k}"

    @cached_property
    def dense(self) -> Tensor:
        """W itself, in fp32."""
        return torch.randn(self.n, self.k, generator=torch.Generator().manual_seed(0))

    @property
    def nf4_bytes(self) -> int:
        """Codes and nested scales."""
        return self.ours[0].nf4_weight.nbytes

    @cached_property
    def ours(self) -> list[q.NF4Linear]:
        """NF4Linear."""
        return self._copies(self.make_ours(), 0.5)

    @cached_property
    def dense_bf16(self) -> list[nn.Linear]:
        """nn.Linear in bf16."""
        return self._copies(self.linear(torch.bfloat16), 2)

    @cached_property
    def dense_fp32(self) -> list[nn.Linear]:
        """nn.Linear in fp32."""
        return self._copies(self.linear(torch.float32), 4)

    @cached_property
    def fp32_tensors(self) -> list[Tensor]:
        """W itself, copied."""
        return copies_past_l3(self.dense.clone, 4 * self.n * self.k)

    @cached_property
    def theirs_training(self) -> list[nn.Module]:
        """Linear4bit as it trains: W is decoded, then torch multiplies."""
        return self._copies(self.linear4bit().train(), 0.5)

    @cached_property
    def theirs_evaluating(self) -> list[nn.Module]:
        """Linear4bit as it evaluates: packed anew for its AVX512-BF16 kernel, where it has one."""
        layer = self.linear4bit().eval()
        if not runs_avx512_bf16():
            layer.support_avx512bf16_for_cpu = False
        with torch.no_grad():
            layer(torch.zeros(1, self.k, dtype=torch.bfloat16))  # the first call packs
        return self._copies(layer, 0.5)

    def make_ours(self) -> q.NF4Linear:
        """One of our layers."""
        return q.NF4Linear.from_linear(self.linear(torch.bfloat16))

    def linear4bit(self) -> nn.Module:
        """One of bitsandbytes' layers."""
        return make_linear4bit(self.dense.bfloat16()).to("cpu")

    def linear(self, dtype: torch.dtype) -> nn.Linear:
        """A frozen dense layer."""
        layer = nn.Linear(self.k, self.n, bias=False, dtype=dtype).requires_grad_(False)
        layer.weight.copy_(self.dense)
        return layer

    def _copies(self, layer: nn.Module, bytes_per_weight: float) -> list:
        return copies_past_l3(lambda: copy.deepcopy(layer), int(bytes_per_weight * self.n * self.k))


def runs_avx512_bf16() -> bool:
    """Whether the run is of a machine with AVX512-BF16: not where another set is forced."""
    return q.build_info()["cpu_set"] not in ("avx2", "avx512")
