"""PagedLion8bit: Lion with state in 8 bits, in pages."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qlora_native.optim.paged_lion import PagedLion
from qlora_native.optim.state_8bit import MIN_8BIT_SIZE, State8bit


class PagedLion8bit(State8bit, PagedLion):
    """Lion with 8-bit block-wise state: 1.02 bytes of state a parameter, not 4.

    `State8bit` says how the moment is stored, `PagedLion` how a step goes.

    Args:
        params: as PagedLion.
        lr: as PagedLion.
        betas: as PagedLion.
        weight_decay: as PagedLion.
        min_8bit_size: parameters of fewer elements keep 32-bit state, whose cost is small there.
        settings: the others of PagedLion.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
        **settings: Any,
    ) -> None:
        self._set_min_8bit_size(min_8bit_size)
        super().__init__(params, lr, betas, weight_decay, **settings)
