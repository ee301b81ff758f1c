"""The GPU: what it is, what it can do at best, how many copies of a thing its cache cannot hold."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from cuda_clock import Round, time_rounds
from harness import Case

T = TypeVar("T")
COPY, GEMM, LINK = "copy bandwidth", "bf16 GEMM", "link, both ways"


@dataclass(frozen=True)
class CudaLimits:
    """Measured in the same run: bytes a second (read + written), operations a second."""

    copy: float
    gemm: float
    link: float

    def at_best(self, case: Case) -> tuple[str, float]:
        """What takes a case longest at best, and how many seconds."""
        floors = {GEMM: case.operations / self.gemm if case.dtype == "bf16" else 0.0}
        floors[LINK if case.bandwidth == "link" else COPY] = case.bytes_moved / (
            self.link if case.bandwidth == "link" else self.copy
        )
        name = max(floors, key=lambda one: floors[one])
        return name, floors[name]

    def describe(self) -> str:
        """One line for people."""
        return (
            f"copy {self.copy / 1e9:,.0f} GB/s (read + written), bf16 GEMM "
            f"{self.gemm / 1e12:,.0f} TFLOP/s, host link {self.link / 1e9:,.1f} GB/s (both ways)"
        )


def measure_limits(device: torch.device, seconds: float) -> CudaLimits:
    """torch's copy of 1 GiB, its product of two 8192×8192 matrices, and its pinned copies."""
    is_cuda = device.type == "cuda"
    count = 2**30 if is_cuda else 2**22
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if is_cuda else 128
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    rounds = {
        "copy": Round([source], target.copy_),
        "gemm": Round([a], lambda one: torch.mm(one, b)),
    }
    times, _ = time_rounds(rounds, device, "graph", seconds)
    link = _measure_link(source, target) if is_cuda else 2 * count
    return CudaLimits(
        copy=2 * count / (1e-3 * times["copy"].p20_ms),
        gemm=2 * size**3 / (1e-3 * times["gemm"].p20_ms),
        link=link,
    )


def _measure_link(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second of copies in both directions at once, from and to pinned memory."""
    count = min(source.numel(), 2**28)
    pinned = [torch.empty(count, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    best = float("inf")
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[0]):
            target[:count].copy_(pinned[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            pinned[1].copy_(source[:count], non_blocking=True)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        end.synchronize()
        best = min(best, 1e-3 * begin.elapsed_time(end))
    return 2 * count / best


def describe(device: torch.device) -> dict[str, object]:
    """For the results' header."""
    if device.type != "cuda":
        return {"device": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(device),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def l2_bytes(device: torch.device) -> int:
    """The cache that weights are rotated past; on a CPU, where nothing is measured, a small one."""
    if device.type != "cuda":
        return 2**20
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies_past_l2(make: Callable[[], T], bytes_each: int, device: torch.device) -> list[T]:
    """As many as exceed twice the cache together, so that memory delivers each."""
    return [make() for _ in range(max(1, -(-2 * l2_bytes(device) // max(bytes_each, 1))))]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    # A line for each GPU: they share a driver.
    return next(iter(done.stdout.splitlines()), "unknown").strip()


def limits_of(header: dict) -> CudaLimits | None:
    """As `asdict` put them into a header."""
    return CudaLimits(**header["limits"]) if header.get("limits") else None
