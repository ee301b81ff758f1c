"""PagedLion: Lion in one native call for a list of parameters, with state in pages."""

import os
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from qlora_native.optim.paged_optimizer import PAGE_BYTES, PagedOptimizer
from qlora_native.optim.state_kind import Rule


class PagedLion(PagedOptimizer):
    """Lion (Chen et al. 2023, algorithm 2) with fp32 state in pages: one moment, not two.

    For each parameter p with gradient g, in fp32 whatever their dtype:

        p <- p (1 - lr · weight_decay)
        p <- p - lr · sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    where sign(0) = 0, and a NaN stays one. Its authors use a learning rate 3 to 10 times smaller
    than AdamW's, and a weight decay as much larger (section 5). A state dict of bitsandbytes' Lion
    loads here. `PagedOptimizer` says what all of these optimisers do.

    Args:
        params: parameters or groups, as for every torch optimiser.
        lr: as PagedAdamW.
        betas: of the sign's mean, and of the moment kept.
        weight_decay: decoupled.
        maximize: as PagedAdamW.
        stochastic_rounding: as PagedAdamW.
        rounding_seed: as PagedAdamW.
        page_bytes: as PagedAdamW.
        resident_bytes: as PagedAdamW.
        paging: as PagedAdamW.
        page_file: as PagedAdamW.

    Raises:
        ValueError, OSError: as PagedAdamW.
    """

    _rule: ClassVar[Rule] = "lion"
    _settings = ("lr", "betas", "weight_decay", "maximize")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int | None = None,
        page_bytes: int = PAGE_BYTES,
        resident_bytes: int | None = None,
        paging: str = "automatic",
        page_file: str | os.PathLike[str] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(
            params,
            defaults,
            page_bytes=page_bytes,
            resident_bytes=resident_bytes,
            paging=paging,
            page_file=page_file,
        )
