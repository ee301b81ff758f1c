"""The optimisers that are measured: ours, bitsandbytes', and what a step is by definition."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import qlora_native as q
from cuda_peers import bitsandbytes as bnb

RATE, DECAY = 1e-2, 1e-2
_BLOCK = 256  # elements of 8-bit state that share an fp32 scale
# betas, eps (Lion has none), moments of a parameter
_ALGORITHMS = {"AdamW": ((0.9, 0.999), 1e-8, 2), "Lion": ((0.9, 0.99), None, 1)}


@dataclass(frozen=True)
class Kind:
    """An algorithm ("AdamW", "Lion") with its state in 32 or 8 bits."""

    algorithm: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.algorithm} {self.bits}-bit"

    def ours(self, params: list[nn.Parameter], rate: float = RATE, **settings: object):
        """Our optimiser; `settings` are further keywords of its class."""
        make = getattr(q, f"Paged{self.algorithm}{'8bit' if self.bits == 8 else ''}")
        betas = _ALGORITHMS[self.algorithm][0]
        return make(params, lr=rate, betas=betas, weight_decay=DECAY, **settings)

    def bitsandbytes(self, params: list[nn.Parameter], paged: bool = False, **settings: object):
        make = getattr(bnb.optim, f"{'Paged' * paged}{self.algorithm}{self.bits}bit")
        betas = _ALGORITHMS[self.algorithm][0]
        return make(params, lr=RATE, betas=betas, weight_decay=DECAY, **settings)

    @property
    def state_bytes(self) -> float:
        """Of a parameter's moments."""
        return _ALGORITHMS[self.algorithm][2] * (4 if self.bits == 32 else 1 + 4 / _BLOCK)

    def moved_bytes(self, dtype: torch.dtype) -> float:
        """Of a parameter: it and its moments are read and written, its gradient is read."""
        return 3 * dtype.itemsize + 2 * self.state_bytes

    def two_steps(
        self, start: Tensor, gradient: Tensor, rate: float = RATE, rounded: bool = True
    ) -> Tensor:
        """In fp64 as published (Loshchilov & Hutter 2019; Chen et al. 2023, algorithm 2).

        `rounded`: the parameter is rounded to its own dtype after each step.
        """
        (beta1, beta2), eps, _ = _ALGORITHMS[self.algorithm]
        p = start.double()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for step, gradient_now in enumerate((gradient, second_gradient(gradient)), start=1):
            g = gradient_now.double()
            p *= 1 - rate * DECAY
            if self.algorithm == "Lion":
                p -= rate * (beta1 * m + (1 - beta1) * g).sign()
                m = beta2 * m + (1 - beta2) * g
            else:
                m = beta1 * m + (1 - beta1) * g
                v = beta2 * v + (1 - beta2) * g * g
                p -= rate * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
            if rounded:
                p = p.to(start.dtype).double()
        return p


def second_gradient(first: Tensor) -> Tensor:
    """Against the first, so that what a step remembers of that decides what the next one does.

    Half of it is too weak to turn Lion's step round and half is strong enough, each by half of
    what that takes, which leaves room for a moment in 8 bits.
    """
    (beta1, beta2), _, _ = _ALGORITHMS["Lion"]
    turning = -beta1 * (1 - beta2) / (1 - beta1)
    second = first.clone(memory_format=torch.contiguous_format)
    second.view(-1)[0::2] *= 0.5 * turning
    second.view(-1)[1::2] *= 1.5 * turning
    return second


def torch_adamw(params: list[nn.Parameter], **settings: bool) -> torch.optim.Optimizer:
    """`settings`: fused or foreach."""
    return torch.optim.AdamW(params, RATE, weight_decay=DECAY, **settings)


KINDS: tuple[Kind, ...] = tuple(
    Kind(algorithm, bits) for algorithm in _ALGORITHMS for bits in (32, 8)
)
ADAMW = tuple(kind for kind in KINDS if kind.algorithm == "AdamW")
