"""The most memory that this process held since a moment of our choice."""

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak resident memory of the process, from the making of this object on.

    Linux keeps the peak (VmHWM) and lets a process reset it. Where that is not allowed the peak
    counts from the start of the process, and `since_start` is True, so that a report can say so.
    """

    def __init__(self) -> None:
        try:
            _CLEAR_REFS.write_text("5")  # proc(5): 5 sets the peak to what is resident now
            self.since_start = False
        except OSError:
            self.since_start = True

    def read_bytes(self) -> int:
        """The peak until now, in bytes."""
        if self.since_start:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{_STATUS} has no line VmHWM")
