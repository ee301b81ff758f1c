"""What an optimiser says of its pages."""

from typing import NamedTuple

from qlora_native import _core


class PagesReport(NamedTuple):
    """One set of pages: of one device, and state of one width.

    Where bytes are is our own account of what was asked for: CUDA does not tell where a managed
    page is, and moves them as it sees fit. For a page file, "device" is memory and "host" the file.

    Attributes:
        device: of the parameters.
        strategy: "ordinary", "file", "managed" or "pinned".
        bits: of a moment's element, 8 or 32.
        pages: how many.
        page_bytes: of a page; the last may be shorter.
        bytes: of all.
        device_bytes, host_bytes, unknown_bytes: by where they were last asked to be.
        moved_to_device_bytes, moved_to_host_bytes: in the last step.
        refused_bytes: in the last step, of pages that the driver had no room for on the device;
            they were used where they are.
    """

    device: str
    strategy: str
    bits: int
    pages: int
    page_bytes: int
    bytes: int
    device_bytes: int
    host_bytes: int
    unknown_bytes: int
    moved_to_device_bytes: int
    moved_to_host_bytes: int
    refused_bytes: int


class PagingReport(NamedTuple):
    """All pages of an optimiser; the numbers of `PagesReport`, summed, are its properties."""

    parts: list[PagesReport]

    @property
    def pages(self) -> int:
        """How many."""
        return sum(part.pages for part in self.parts)

    @property
    def bytes(self) -> int:
        """Of all state."""
        return sum(part.bytes for part in self.parts)

    @property
    def device_bytes(self) -> int:
        """Last asked to be on the device."""
        return sum(part.device_bytes for part in self.parts)

    @property
    def host_bytes(self) -> int:
        """Last asked to be on the host."""
        return sum(part.host_bytes for part in self.parts)

    @property
    def unknown_bytes(self) -> int:
        """Not asked to be anywhere yet."""
        return sum(part.unknown_bytes for part in self.parts)

    @property
    def moved_to_device_bytes(self) -> int:
        """In the last step."""
        return sum(part.moved_to_device_bytes for part in self.parts)

    @property
    def moved_to_host_bytes(self) -> int:
        """In the last step."""
        return sum(part.moved_to_host_bytes for part in self.parts)

    @property
    def refused_bytes(self) -> int:
        """In the last step."""
        return sum(part.refused_bytes for part in self.parts)


def report_of(buffers: list[_core.PagedState], before: list["_core.PagedReport"]) -> PagingReport:
    """The report of `buffers`, whose accounts were `before` when the last step began."""
    # Pages made since have moved nothing in a step.
    before = before if len(before) == len(buffers) else [pages.report() for pages in buffers]
    return PagingReport([_part(*pair) for pair in zip(buffers, before, strict=True)])


def _part(pages: _core.PagedState, then: "_core.PagedReport") -> PagesReport:
    now = pages.report()
    return PagesReport(
        device=pages.device,
        strategy=pages.strategy,
        bits=8 if pages.is_8bit else 32,
        pages=pages.page_count,
        page_bytes=pages.page_bytes,
        bytes=pages.bytes,
        device_bytes=now["device_bytes"],
        host_bytes=now["host_bytes"],
        unknown_bytes=now["unknown_bytes"],
        moved_to_device_bytes=now["moved_to_device_bytes"] - then["moved_to_device_bytes"],
        moved_to_host_bytes=now["moved_to_host_bytes"] - then["moved_to_host_bytes"],
        refused_bytes=now["refused_bytes"] - then["refused_bytes"],
    )
