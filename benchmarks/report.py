"""Results as JSON with all that a reader must know, and as the README's Markdown table."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import machine
import qlora_native
from goals import Verdict
from harness import Row, Times
from probes import Limits

_PACKAGES = ("torch", "bitsandbytes", "peft", "transformers")


def describe_run(limits: Limits | None = None, **more: object) -> dict[str, object]:
    """Machine, versions, commit, date and instruction set."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "isa": qlora_native.build_info()["cpu_set"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "build": qlora_native.build_info(),
        "limits": None if limits is None else asdict(limits),
        **more,
    }


def finish(
    header: dict[str, object],
    rows: list[Row],
    others: machine.OthersCpu,
    goals: bool,
    json_path: Path | None,
) -> None:
    """Print a run's table and write its JSON; exit with 1 if goals are asked for and one missed."""
    header["others_share_of_cpu"] = round(others.share(), 4)
    print(f"\n{markdown(header, rows, goals)}")
    if others.share() > 0.03:
        print(f"WARNING: others used {others.share():.0%} of the processor meanwhile.")
    if json_path is not None:
        write_json(json_path, header, rows)
    if goals and any(not verdict.met for row in rows for verdict in row.verdicts):
        sys.exit(1)


def write_json(path: Path, header: dict[str, object], rows: list[Row]) -> None:
    """The header and the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = header | {"rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def read_rows(paths: list[Path]) -> tuple[dict[str, Any], list[Row]]:
    """The header of the first file and the rows of all: a table may be measured in parts."""
    reports = [json.loads(path.read_text()) for path in paths]
    rows = []
    for report in reports:
        if report["isa"] != reports[0]["isa"]:
            raise SystemExit(f"{report['isa']} and {reports[0]['isa']} are two tables")
        for fields in report["rows"]:
            fields["times"] = {name: Times(**times) for name, times in fields["times"].items()}
            fields["verdicts"] = [Verdict(**verdict) for verdict in fields["verdicts"]]
            rows.append(Row(**fields))
    return reports[0], rows


def markdown(header: dict[str, Any], rows: list[Row], goals: bool = False) -> str:
    """A table with a row a work, and a line on where it comes from.

    × is the peer's time over ours: above 1 we are faster.
    """
    titles = ["Work", "ms (p20–p80)", "× the peers", "share of the limit"] + ["goals"] * goals
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cells(row, goals)) + " |" for row in rows]
    notes = notes_of(rows)
    if notes:
        lines += ["", "Notes:", *notes]
    versions = header["versions"]
    lines += [
        "",
        f"{header['machine']['cpu']}, {header['threads']} threads, `{header['isa']}`; torch "
        f"{versions['torch']}, bitsandbytes {versions['bitsandbytes']}; commit "
        f"{header['commit']}, {header['date'][:10]}.",
    ]
    if header.get("limits"):
        lines.append(f"Limits: {Limits(**header['limits']).describe()}.")
    return "\n".join(lines)


def notes_of(rows: list[Row]) -> list[str]:
    """Of all rows, as a list's lines."""
    return list(dict.fromkeys(f"- {row.work}: {note}" for row in rows for note in row.notes))


def cells(row: Row, goals: bool) -> list[str]:
    """A row of the table."""
    ours, *peers = row.times
    times = row.times[ours]
    ratios = ", ".join(f"{row.ratio(peer):.2f}× {peer}" for peer in peers)
    if row.share_of_limit is not None:
        share = f"{row.share_of_limit:.0%} {row.limit}"
    else:  # no limit is known: the rate says more than nothing
        share = f"{row.bytes_moved / times.median_ms / 1e6:.2f} GB/s" if row.bytes_moved else ""
    shown = [
        row.work,
        f"{_ms(times.median_ms)} ({_ms(times.p20_ms)}–{_ms(times.p80_ms)})",
        ratios,
        share,
    ]
    if goals:
        verdicts = [
            f"{'met' if v.met else 'MISSED'} {v.wanted} ({v.reached})" for v in row.verdicts
        ]
        shown.append("; ".join(verdicts))
    return shown


def _ms(value: float) -> str:
    """Three significant digits."""
    return f"{value:.4f}" if value < 0.1 else f"{value:#.3g}".rstrip(".")


def _commit() -> str:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
