"""PagedAdamW: AdamW in one native call for a list of parameters, with state in pages."""

import os
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from qlora_native.optim.paged_optimizer import PAGE_BYTES, PagedOptimizer
from qlora_native.optim.state_kind import Rule


class PagedAdamW(PagedOptimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with fp32 state in pages.

    For each parameter p with gradient g, at step t, in fp32 whatever their dtype:

        p <- p (1 - lr · weight_decay)
        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g²
        p <- p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    which is `torch.optim.AdamW`, to fp32 rounding. A state dict of either loads into the other,
    with one difference: this class keeps the moments in fp32 for 16-bit parameters too. One of
    bitsandbytes' AdamW loads here. `PagedOptimizer` says what all of these optimisers do.

    Args:
        params: parameters or groups, as for every torch optimiser.
        lr: the learning rate; a float or a tensor of one element. A CUDA tensor is read when the
            step runs, without waiting for it, in fp32, and is not checked.
        betas: decay of the running means of g and of g².
        eps: added to the denominator.
        weight_decay: decoupled.
        maximize: step up the gradient instead of down.
        amsgrad: not done; True raises.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that the expected
            value is that before rounding (Gupta et al. 2015): updates of less than half a last
            place are not lost.
        rounding_seed: of stochastic rounding, kept in the group, so that a resumed run goes on with
            the same bits; None draws one from torch's generator. Ranks that hold copies of a
            parameter (DDP) need one seed.
        page_bytes: of a page; rounded down to what the kernels can cut.
        resident_bytes: the most device memory that state may take, of two pages at least, on each
            device; None lets the driver decide. On a CPU it is for a page_file, and the most
            memory.
        paging: on CUDA "managed" (unified memory), "pinned" (page-locked host memory, and two or
            three pages of device memory) or "automatic": managed where the device can.
        page_file: on a CPU, a directory in which state is kept as a file that has no name and is
            gone with the optimiser. It may exceed the memory. Room is reserved at once.

    Raises:
        ValueError: a number is out of its range, or an argument is for another kind of device.
        NotImplementedError: amsgrad.
        OSError: the page file cannot be made, or the disk has no room.
    """

    _rule: ClassVar[Rule] = "adamw"
    _settings = ("lr", "betas", "eps", "weight_decay", "maximize", "amsgrad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        amsgrad: bool = False,
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
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "amsgrad": amsgrad,
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
