"""What 8-bit state adds to an optimiser."""

from typing import Any

from torch import Tensor

from qlora_native.optim.paged_optimizer import PagedOptimizer

MIN_8BIT_SIZE = 4096


class State8bit(PagedOptimizer):
    """Keeps the moments of parameters of at least `min_8bit_size` elements in 8 bits.

    A block of 256 elements of a moment is stored as its fp32 absmax and 8-bit codes of a dynamic
    map (Dettmers et al. 2022): signed for the first moment, unsigned for the second. A step decodes
    a block, updates in fp32 as with 32-bit state, and encodes it again.

    A state dict of 32-bit state is refused, and one of 8-bit state by 32-bit optimisers.
    """

    min_8bit_size: int

    def _set_min_8bit_size(self, size: int) -> None:
        if not isinstance(size, int) or size < 0:
            raise ValueError(
                f"{type(self).__name__}: min_8bit_size is {size!r}, want a number of elements"
            )
        self.min_8bit_size = size

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return param.numel() >= self.min_8bit_size

    def _check_state(self, where: str, param: Tensor, state: dict[str, Any]) -> None:
        try:
            super()._check_state(where, param, state)
        except ValueError as error:
            raise ValueError(f"{error} (min_8bit_size is {self.min_8bit_size} here)") from error

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep beside groups, state and paging."""
        return {**super().__getstate__(), "min_8bit_size": self.min_8bit_size}
