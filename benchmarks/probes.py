"""The machine's limits, measured now: bytes a second and floating-point operations a second.

`python benchmarks/probes.py [--threads N]` prints them.
"""

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from machine import available_bytes, l3_bytes

_SOURCES = [Path(__file__).with_name(name) for name in ("probes.cpp", "probes_arithmetic.h")]
_PEAKS = ("fma_avx2", "fma_avx512", "vdpbf16ps", "tdpbf16ps")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-pthread")


@dataclass(frozen=True)
class Limits:
    """Bytes a second, and operations a second by instruction (0: not on this machine)."""

    read: float
    copy: float
    peaks: dict[str, float]

    def peak(self, isa: str, dtype: str) -> tuple[str, float]:
        """The fastest arithmetic on `dtype` ("bf16", "fp32") that an instruction set has."""
        names = ["fma_avx2"]
        if isa != "avx2":
            names.append("fma_avx512")
        if dtype == "bf16" and isa not in ("avx2", "avx512"):
            names.append("vdpbf16ps")
            if isa != "avx512_bf16":
                names.append("tdpbf16ps")
        name = max(names, key=lambda one: self.peaks[one])
        return name, self.peaks[name]

    def describe(self) -> str:
        """One line for people."""
        peaks = ", ".join(f"{n} {p / 1e9:.0f}" for n, p in self.peaks.items() if p)
        return (
            f"read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s (read + written); "
            f"GFLOP/s: {peaks}"
        )


def measure_limits(threads: int) -> Limits:
    """Take some seconds to measure what `threads` threads can do at best.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed.
    """
    library = ctypes.CDLL(str(_compiled()))
    for name in ("probe_read_bandwidth", "probe_copy_bandwidth", "probe_peak"):
        getattr(library, name).restype = ctypes.c_double
    # Twice the last-level cache in all, so that no pass finds what the one before it left.
    total = min(max(2 * l3_bytes(), 2**28), available_bytes() // 4)
    each = total // threads // 4096 * 4096

    def bandwidth(probe: str, bytes_each: int, repetitions: int) -> float:
        return getattr(library, probe)(threads, ctypes.c_size_t(bytes_each), repetitions)

    return Limits(
        read=bandwidth("probe_read_bandwidth", each, 4),
        copy=bandwidth("probe_copy_bandwidth", each // 2, 4),
        peaks={name: library.probe_peak(name.encode(), threads, 20) for name in _PEAKS},
    )


def _compiled() -> Path:
    """The shared library, compiled on the first call of a version of the source."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    compiler = compiler or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            "probes: no C++ compiler (c++, g++, clang++ or $CXX): measuring the limits needs one; "
            "--no-limits runs without them"
        )
    name = f"qlora_native_probes_{os.getuid()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"probes: {folder} belongs to someone else; set XDG_CACHE_HOME")
    texts = b"".join(source.read_bytes() for source in _SOURCES)
    version = hashlib.sha256(texts + repr((compiler, _FLAGS)).encode()).hexdigest()
    library = folder / f"probes_{version[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [*compiler.split(), *_FLAGS, "-o", str(unfinished), str(_SOURCES[0])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"probes: {' '.join(command)} failed:\n{done.stderr}")
        unfinished.replace(library)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    print(measure_limits(parser.parse_args().threads).describe())


if __name__ == "__main__":
    main()
