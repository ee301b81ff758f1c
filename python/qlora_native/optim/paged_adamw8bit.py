"""PagedAdamW8bit: AdamW with state in 8 bits, in pages."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qlora_native.optim.paged_adamw import PagedAdamW
from qlora_native.optim.state_8bit import MIN_8BIT_SIZE, State8bit


class PagedAdamW8bit(State8bit, PagedAdamW):
    """AdamW with 8-bit block-wise state: 2.03 bytes of state a parameter, not 8.

    `State8bit` says how the moments are stored, `PagedAdamW` how a step goes.

    Args:
        params: as PagedAdamW.
        lr: as PagedAdamW.
        betas: as PagedAdamW.
        eps: as PagedAdamW.
        weight_decay: as PagedAdamW.
        min_8bit_size: parameters of fewer elements keep 32-bit state, whose cost is small there.
        settings: the others of PagedAdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
        **settings: Any,
    ) -> None:
        self._set_min_8bit_size(min_8bit_size)
        super().__init__(params, lr, betas, eps, weight_decay, **settings)
