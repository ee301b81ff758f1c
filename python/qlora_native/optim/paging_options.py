"""How an optimiser's state is paged, as its constructor is told."""

import mmap
from typing import NamedTuple

from qlora_native import _core

_STRATEGIES = ("automatic", "managed", "pinned")


class PagingOptions(NamedTuple):
    """How an optimiser's state is kept; `qlora_native.PagedAdamW` explains each."""

    page_bytes: int
    resident_bytes: int | None
    paging: str
    page_file: str | None

    def check(self, name: str) -> None:
        """Raise ValueError for what is wrong whatever the state; the core checks the rest."""
        if self.paging not in _STRATEGIES:
            raise ValueError(
                f"{name}: paging is {self.paging!r}, want 'automatic', 'managed' or 'pinned'"
            )
        for argument in ("page_bytes", "resident_bytes"):
            value = getattr(self, argument)
            if not isinstance(value, int) and not (value is None and argument == "resident_bytes"):
                raise ValueError(f"{name}: {argument} is {value!r}, want a number of bytes")
        if self.resident_bytes is not None and self.resident_bytes < 0:
            raise ValueError(
                f"{name}: resident_bytes is {self.resident_bytes}, want a number of at least 0"
            )
        if self.page_file is not None:
            # Of no parameter yet: a directory that cannot be used is told at once.
            _core.PagedBuffer("cpu", mmap.PAGESIZE, strategy="file", page_file=self.page_file)

    def of_device(self, device_type: str, all_types: set[str]) -> "PagingOptions":
        """What of them is for a device; where there is no other kind, the core refuses the rest."""
        if len(all_types) < 2:
            return self
        if device_type == "cuda":
            return self._replace(page_file=None)
        budget = self.resident_bytes if self.page_file is not None else None
        return self._replace(paging="automatic", resident_bytes=budget)
