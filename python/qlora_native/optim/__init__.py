"""Optimisers with native steps, and state in pages, in 32 or 8 bits."""

from qlora_native.optim.paged_adamw import PagedAdamW
from qlora_native.optim.paged_adamw8bit import PagedAdamW8bit
from qlora_native.optim.paged_lion import PagedLion
from qlora_native.optim.paged_lion8bit import PagedLion8bit
from qlora_native.optim.paged_optimizer import PagedOptimizer
from qlora_native.optim.paging_report import PagesReport, PagingReport

__all__ = [
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedOptimizer",
    "PagesReport",
    "PagingReport",
]
