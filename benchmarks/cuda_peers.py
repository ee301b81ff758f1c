"""Neighbours to compare with, each only where it can be imported and gives the right result."""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

from cuda_clock import Round

# As they are imported, transformers and bitsandbytes look on a hub for faster kernels, with the
# package `kernels`: without a network a run would wait, and with one it would time other code.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # so it cannot be imported


def _import(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a library of its own that cannot be loaded raises anything
        reason = str(error).strip().splitlines() or [""]
        return None, f"{name} is missing: {type(error).__name__}: {reason[0][:120]}"


bitsandbytes, _BITSANDBYTES_REASON = _import("bitsandbytes")
peft, _PEFT_REASON = _import("peft")
MISSING = [reason for reason in (_BITSANDBYTES_REASON, _PEFT_REASON) if reason]


def add_peer(
    rounds: dict[str, Round],
    notes: list[str],
    name: str,
    make: Callable[[], Round],
    check: Callable[[object], None] = lambda result: None,
) -> None:
    """Add a contender that is not ours, unless it fails or is wrong: then a note says why."""
    if (name.startswith(("bitsandbytes", "PEFT")) and bitsandbytes is None) or (
        name.startswith("PEFT") and peft is None
    ):
        return  # MISSING says so once
    try:
        one = make()
        check(one.first())
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        notes.append(f"without {name}: {reason[0][:160]}")
        return
    rounds[name] = one
