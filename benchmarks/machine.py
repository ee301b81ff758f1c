"""What the benchmarks run on: processor, caches, memory, and whether anybody else is using it."""

import os
import platform
import time
from pathlib import Path

# fmt: off
_FLAGS_OF_INTEREST = (
    "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
)
# fmt: on
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_DEFAULT_L3 = 64 * 2**20  # where the system does not say


def describe() -> dict[str, object]:
    """Model, instruction sets of interest, cores that this process may use, caches, memory."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "flags": [flag for flag in _FLAGS_OF_INTEREST if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "l3_bytes": l3_bytes(),
        "memory_bytes": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
    }


def l3_bytes() -> int:
    """The size of the last-level cache, as the system tells it."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(s[:-1]) * _UNITS[s[-1]] for s in sizes if s), default=_DEFAULT_L3)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return _meminfo("MemAvailable")


class OthersCpu:
    """How much of the machine others use, from the making of this object on.

    Time that a hypervisor gave to other machines (steal) counts as others' use.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float:
        """Others' part of all cores' time, 0 to 1."""
        total, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return max(0.0, (busy - own) / total) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        ticks = [float(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # proc(5): idle and waiting for a disk
        per_second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, sum(os.times()[:4])


def require_quiet(force: bool, seconds: float = 1.0, limit: float = 0.05) -> None:
    """Leave the program while others use more than `limit` of the machine: ratios would lie.

    With `force` it says so and goes on.
    """
    others = OthersCpu()
    time.sleep(seconds)
    share = others.share()
    if share <= limit:
        return
    text = f"others use {share:.0%} of the processor (load {os.getloadavg()[0]:.1f})"
    if not force:
        raise SystemExit(f"{text}: ratios would lie. Wait, or say --force.")
    print(f"WARNING: {text}; nothing below is to be believed.", flush=True)


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no line {name}")
