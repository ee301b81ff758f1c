"""What the files of a checkpoint say about their tensors, without reading them."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_HEADER_LIMIT = 100_000_000  # bytes, safetensors' own


def tensor_dtypes(files: Iterable[str] | None) -> dict[str, str] | None:
    """The dtype of each tensor in some safetensors files (`"U8"`, `"BF16"`), by name.

    Returns:
        None where there are no files, or files of another kind.

    Raises:
        ValueError: a file is damaged; the message names it and the tensor that is cut off.
    """
    if files is None or any(not str(file).endswith(".safetensors") for file in files):
        return None
    dtypes = {}
    for file in files:
        header, _ = read_header(Path(file))
        dtypes.update({name: entry["dtype"] for name, entry in header.items()})
    return dtypes


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin.

    Returns:
        {tensor: {"dtype", "shape", "data_offsets"}} and the offset of what the offsets count from.

    Raises:
        ValueError: the file is damaged; the message names it and the tensor that is cut off.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        cut_off = _cut_off(file)
        where = f"; {cut_off!r} ends beyond the file" if cut_off else ""
        raise ValueError(f"{file} is no whole safetensors file: {error}{where}") from error
    return _header(file)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What `read_header` returns, not checked."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(min(length, _HEADER_LIMIT)))
    header.pop("__metadata__", None)
    return header, 8 + length


def _cut_off(file: Path) -> str | None:
    """The first tensor whose bytes the file does not have, if its header can be read."""
    try:
        header, start = _header(file)
        end_of_data = file.stat().st_size - start
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        beyond = {name: begin for name, (begin, end) in spans.items() if end > end_of_data}
        return min(beyond, key=lambda name: beyond[name], default=None)
    except (ValueError, TypeError, KeyError, AttributeError, struct.error):
        return None
