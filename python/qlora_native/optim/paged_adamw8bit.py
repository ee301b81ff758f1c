"""PagedAdamW8bit: AdamW with state in 8 bits."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qlora_native.optim.paged_adamw import PagedAdamW


class PagedAdamW8bit(PagedAdamW):
    """AdamW with 8-bit block-wise state: 2.03 bytes of state a parameter, not 8.

    Block-wise 8-bit state is by Dettmers et al. 2022.

    A block of 256 elements of a moment is stored as its fp32 absmax and 8-bit codes: of the signed
    dynamic map for the first moment, of the unsigned for the second. A step decodes a block,
    updates in fp32 as PagedAdamW does, and encodes it again.

    Args:
        params: as PagedAdamW.
        lr: as PagedAdamW.
        betas: as PagedAdamW.
        eps: as PagedAdamW.
        weight_decay: as PagedAdamW.
        maximize: as PagedAdamW.
        capturable: as PagedAdamW.
        min_8bit_size: parameters of fewer elements keep 32-bit state, whose cost is small there.

    A state dict of a 32-bit optimiser is refused, and one of this class by 32-bit ones.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        min_8bit_size: int = 4096,
    ) -> None:
        self.min_8bit_size = min_8bit_size
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, capturable=capturable
        )

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return param.numel() >= self.min_8bit_size

    def _check_state(self, where: str, param: Tensor, state: dict[str, Any]) -> None:
        try:
            super()._check_state(where, param, state)
        except ValueError as error:
            raise ValueError(f"{error} (min_8bit_size is {self.min_8bit_size} here)") from error

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: an Optimizer keeps its groups and state alone."""
        return {**super().__getstate__(), "min_8bit_size": self.min_8bit_size}
