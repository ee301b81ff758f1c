"""Optimisers whose state is kept in pages."""

from qlora_native.optim.paged_adamw import PagedAdamW, PagedAdamW8bit

__all__ = ["PagedAdamW", "PagedAdamW8bit"]
