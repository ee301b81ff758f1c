"""The GPU's results as a Markdown table."""

from typing import Any

from cuda_device import GEMM, limits_of
from harness import Row
from report import notes_of


def markdown(header: dict[str, Any], rows: list[Row]) -> str:
    """A table with a row a work, what is missing, and where it comes from.

    × is the peer's time over ours: above 1 we are faster. × floor is ours over the least that this
    GPU needs for the bytes or operations, as measured in the same run.
    """
    titles = ["Work", "µs (p20–p80)", "rate", "× the peers", "× floor", "goals"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    verdicts = [verdict for row in rows for verdict in row.verdicts]
    if verdicts:
        met = sum(verdict.met for verdict in verdicts)
        lines += ["", f"{met} of {len(verdicts)} goals met."]
    failures: dict[str, str] = header.get("failures", {})
    if failures:
        lines += ["", "Failed:"]
        lines += [f"- {work}: {reason}" for work, reason in failures.items()]
    not_begun: list[str] = header.get("not_begun", [])
    if not_begun:
        lines += ["", f"Not begun, as the time was over: {'; '.join(not_begun)}."]
    notes = [f"- {note}" for note in header.get("missing_peers", [])] + notes_of(rows)
    if notes:
        lines += ["", "Notes:", *notes]
    lines += ["", _origin(header)]
    limits = limits_of(header)
    if limits is not None:
        lines.append(f"Measured floors: {limits.describe()}.")
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    ours, *peers = row.times
    times = row.times[ours]
    goals = (f"{'met' if v.met else 'MISSED'} {v.wanted} ({v.reached})" for v in row.verdicts)
    return [
        row.work,
        f"{_us(times.median_ms)} ({_us(times.p20_ms)}–{_us(times.p80_ms)})",
        rate(row),
        ", ".join(f"{row.ratio(peer):.2f}× {peer}" for peer in peers),
        f"{1 / row.share_of_limit:.2f}× {row.limit}" if row.share_of_limit else "",
        "; ".join(goals),
    ]


def rate(row: Row) -> str:
    """Operations a second where they are the limit, else bytes a second."""
    seconds = 1e-3 * next(iter(row.times.values())).median_ms
    if row.limit == GEMM:
        return f"{row.operations / seconds / 1e12:,.3g} TFLOP/s"
    return f"{row.bytes_moved / seconds / 1e9:,.0f} GB/s"


def _us(milliseconds: float) -> str:
    """Three significant digits."""
    value = 1e3 * milliseconds
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _origin(header: dict[str, Any]) -> str:
    gpu, versions, build = header["gpu"], header["versions"], header["build"]
    driver = f", driver {gpu['driver']}, CUDA {gpu['cuda']}" if "driver" in gpu else ""
    return (
        f"{gpu['device']}{driver}; torch {versions['torch']}, bitsandbytes "
        f"{versions['bitsandbytes']}, PEFT {versions['peft']}; qlora_native {build['version']} for "
        f"{build['cuda_archs'] or 'no GPU'} by {build['cuda_compiler'] or build['cxx_compiler']}; "
        f"commit {header['commit']}, {header['date'][:10]}."
    )
