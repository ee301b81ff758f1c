"""State that travels to the GPU and back, a page at a time, while the pages before it are used."""

from collections.abc import Iterator
from typing import Any

import torch

from cuda_clock import HOST, Round
from cuda_harness import CudaCase
from harness import OURS, Work
from qlora_native import _core

_RESIDENT_PAGES = 3  # one in use, one on its way in, one on its way out
_PAGES, _PAGE_BYTES = {"cuda": 32, "cpu": 4}, {"cuda": 2**25, "cpu": 2**16}
_STRATEGIES = {"cuda": ("automatic", "pinned"), "cpu": ("ordinary",)}


def works(device: torch.device) -> Iterator[Work]:
    """One for each way in which the device can page."""
    for strategy in _STRATEGIES[device.type]:
        size = f"{_PAGES[device.type]} pages, {strategy}"
        yield Work("paging", size, lambda s=strategy: _paging(s, device))


def _paging(strategy: str, device: torch.device) -> CudaCase:
    """A byte-wise sum on each page in turn, as an optimiser's step walks its state."""
    page_bytes = _PAGE_BYTES[device.type]
    bytes_ = _PAGES[device.type] * page_bytes
    resident_bytes = _RESIDENT_PAGES * page_bytes
    one = plain_loop(device, bytes_, page_bytes, strategy, resident_bytes)
    # Every page comes in and goes out again.
    return CudaCase({OURS: one}, clock=HOST, bytes_moved=2 * bytes_, bandwidth="link")


def plain_loop(
    device: torch.device, bytes_: int, page_bytes: int, strategy: str, resident_bytes: int
) -> Round:
    """As little work on each page as there can be, checked."""
    options = {"page_bytes": page_bytes, "strategy": strategy}
    if device.type == "cuda":
        options["resident_bytes"] = resident_bytes
        device = torch.device("cuda", torch.cuda.current_device())
        if 4 * bytes_ > torch.cuda.mem_get_info(device)[0]:
            raise SystemExit(f"want {4 * bytes_ / 2**30:.0f} GiB of free device memory")
    buffer = _core.PagedBuffer(str(device), bytes_, **options)
    _fill(buffer, 3)
    one = Round([buffer], _walk)
    one.first()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if not bool((torch.from_dlpack(buffer.memory(0, bytes_)) == 4).all()):
        raise SystemExit("WRONG: paging: a page was not written back")
    return one


def _fill(buffer: Any, value: int) -> None:
    torch.from_dlpack(buffer.memory(0, buffer.bytes)).fill_(value)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _walk(buffer: Any) -> None:
    stream = torch.cuda.current_stream().cuda_stream if buffer.device != "cpu" else 0
    for page in range(buffer.page_count):
        torch.from_dlpack(buffer.begin(page, stream)).add_(1)
        buffer.end(page, stream)
    buffer.join(stream)
