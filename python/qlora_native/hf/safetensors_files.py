"""Safetensors files, read and written a tensor at a time.

A file is 8 bytes (the header's length, little endian), the header (JSON: name to dtype, shape and
[begin, end) of its bytes in what follows), and the tensors' bytes. The library's own `save_file`
wants all tensors of a file at once, which may be tens of gigabytes.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_native.hf.checkpoint import read_header

# As the library's own writer sorts them in a file: last ones first, so that all are aligned.
_ORDER = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
    *("F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32"),
    *("C64", "F64", "I64", "U64"),
)
_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_CHUNK_BYTES = 16 * 2**20


class TensorSpec(NamedTuple):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    spec: TensorSpec
    offset: int  # of its first byte in the file


def spec_of(tensor: Tensor) -> TensorSpec:
    """Of a tensor that is to be written; it may be on the meta device."""
    return TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


class SafetensorsReader:
    """A file to read; closed at the end of a `with`.

    Attributes:
        tensors: what is in it, by name.
        metadata: strings by name, None if it has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or not a whole one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        header, start = read_header(path)
        self.tensors = {
            name: StoredTensor(
                TensorSpec(entry["dtype"], tuple(entry["shape"]), end - begin), start + begin
            )
            for name, entry in header.items()
            for begin, end in (entry["data_offsets"],)
        }
        opened: Any = safe_open(path, framework="pt", device="cpu")
        self._handle = opened.__enter__()
        self.metadata: dict[str, str] | None = self._handle.metadata()
        self._file = path.open("rb")

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        return self._handle.get_tensor(name)

    def read_bytes(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, some MiB at a time."""
        spec, offset = self.tensors[name]
        self._file.seek(offset)
        left = spec.nbytes
        while left:
            chunk = self._file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise OSError(f"{self._file.name} ended within {name}")
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._handle.__exit__(None, None, None)

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SafetensorsWriter:
    """A new file; its tensors are announced first, and then written one by one in any order.

    Given the same tensors it has the bytes that the library's `save_file` writes.

    Args:
        path: there may be no such file yet.
        specs: of all its tensors, by name.
        metadata: strings by name.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None
    ) -> None:
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        self._offsets: dict[str, int] = {}
        end = 0
        for name in sorted(specs, key=lambda name: (-_rank(specs[name].dtype), name)):
            dtype, shape, nbytes = specs[name]
            self._offsets[name] = end
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + nbytes],
            }
            end += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._specs = dict(specs)
        self._missing = set(specs)
        self._begin = 8 + len(text)
        self._file: BinaryIO = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._begin + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """A tensor as it was announced."""
        if spec_of(tensor) != self._specs[name]:
            raise ValueError(f"{name}: is {spec_of(tensor)}, announced as {self._specs[name]}")
        self._start(name)
        self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def copy(self, name: str, source: SafetensorsReader) -> None:
        """A tensor of another file, which has the same name there."""
        if source.tensors[name].spec != self._specs[name]:
            raise ValueError(
                f"{name}: is {source.tensors[name].spec}, announced as {self._specs[name]}"
            )
        self._start(name)
        for chunk in source.read_bytes(name):
            self._file.write(chunk)

    def _start(self, name: str) -> None:
        self._file.seek(self._begin + self._offsets[name])
        self._missing.discard(name)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise RuntimeError(f"{self._file.name}: {sorted(self._missing)} were never written")


def _rank(dtype: str) -> int:
    return _ORDER.index(dtype) if dtype in _ORDER else -1
