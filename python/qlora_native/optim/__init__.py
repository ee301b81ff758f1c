"""Optimisers with native steps, and state in 32 or 8 bits."""

from qlora_native.optim.paged_adamw import PagedAdamW
from qlora_native.optim.paged_adamw8bit import PagedAdamW8bit

__all__ = ["PagedAdamW", "PagedAdamW8bit"]
