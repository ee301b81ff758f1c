"""RowNorms: ‖W_n‖² of a frozen base, which DoRA asks for at each forward."""

from typing import Any

import torch
from torch import Tensor

from qlora_native.ops.base_product import BaseWeight
from qlora_native.ops.dora import row_norms_squared


class RowNorms:
    """‖W_n‖² of a base, kept for as long as its memory is the same and nobody has written it.

    A graph that is being compiled cannot look at addresses: it takes what is kept, so `forget` is
    for whoever loads or moves the base. A copy keeps nothing.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Tensor] | None = None  # what they were taken of, and they

    def of(self, weight: BaseWeight) -> Tensor:
        """The norms of a base `[n, k]`, fp32 `[n]`."""
        kept = self._kept  # once: another thread may replace it
        if torch.compiler.is_compiling():
            return row_norms_squared(weight) if kept is None else kept[1]
        stored = (
            [weight] if isinstance(weight, Tensor) else [t for t in weight[:4] if t is not None]
        )
        if any(t.is_meta for t in stored):
            return row_norms_squared(weight)
        key = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in stored]
        if kept is None or kept[0] != key:
            with torch.no_grad(), torch.inference_mode(False):
                kept = self._kept = key, row_norms_squared(weight)
        return kept[1]

    def forget(self) -> None:
        """Take them again at the next call."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}
