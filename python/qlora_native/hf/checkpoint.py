"""What the files of a checkpoint say about their tensors, without reading them."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_HEADER_LIMIT = 100_000_000  # bytes, safetensors' own


def tensor_names(files: Iterable[str] | None) -> set[str] | None:
    """The names in some safetensors files; None where there are no files of this kind.

    Raises:
        ValueError: a file is damaged; the message names it and the tensor that is cut off.
    """
    if files is None or any(not str(file).endswith(".safetensors") for file in files):
        return None
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        except SafetensorError as error:
            cut_off = _cut_off(Path(file))
            where = f"; {cut_off!r} ends beyond the file" if cut_off else ""
            raise ValueError(f"{file} is no whole safetensors file: {error}{where}") from error
    return names


def _cut_off(file: Path) -> str | None:
    """The first tensor whose bytes the file does not have, if its header can be read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT
        if length >= min(_HEADER_LIMIT, size):
            return None
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
            ends = {k: v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"}
            beyond = {k: end for k, end in ends.items() if 8 + length + end > size}
            return min(beyond, key=lambda name: beyond[name], default=None)
        except (ValueError, TypeError, KeyError, IndexError):
            return None
