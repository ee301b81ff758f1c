"""A model's folder: config.json, safetensors files, and whatever else lies there."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from qlora_native.hf.safetensors_files import SafetensorsReader, TensorSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".onnx_data", ".index.json"),
)


class CheckpointFolder:
    """The weights of a folder, whichever files they are in; files are closed after a `with`.

    Attributes:
        path: the folder.
        config: what config.json says.
        index: what the index says; None where all weights are in one file.
        files: by name, those that hold the weights.
        file_of: name of the file by the name of the tensor.

    Raises:
        FileNotFoundError: config.json or a file of weights is missing.
        ValueError: a file is not what it should be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_object(path / CONFIG_FILE)
        self.index: dict[str, Any] | None = None
        self.files: dict[str, SafetensorsReader] = {}
        self.file_of: dict[str, str] = {}
        try:
            if (path / INDEX_FILE).is_file():
                self._open_indexed(_read_object(path / INDEX_FILE))
            else:
                self._open(WEIGHTS_FILE)
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        return self.files[self.file_of[name]].load(name)

    def spec(self, name: str) -> TensorSpec:
        """What its file's header says of a tensor."""
        return self.files[self.file_of[name]].tensors[name].spec

    def _open_indexed(self, index: dict[str, Any]) -> None:
        self.index = index
        where = index.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise ValueError(f"{self.path / INDEX_FILE} has no weight_map of names to files")
        if not isinstance(metadata := index.get("metadata", {}), dict):
            raise ValueError(
                f"{self.path / INDEX_FILE} has the metadata {metadata!r}, want an object"
            )
        for file in sorted(set(where.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{self.path / INDEX_FILE} names {file!r}, want safetensors files of its folder"
                )
            self._open(file)
        if where != self.file_of:
            wrong = sorted(
                name
                for name in where.keys() | self.file_of.keys()
                if where.get(name) != self.file_of.get(name)
            )
            raise ValueError(
                f"{self.path / INDEX_FILE} does not say what is in the files: {', '.join(wrong)}"
            )

    def _open(self, file: str) -> None:
        self.files[file] = SafetensorsReader(self.path / file)
        for name in self.files[file].tensors:
            if name in self.file_of:
                raise ValueError(f"{self.path}: {name} is in {self.file_of[name]} and in {file}")
            self.file_of[name] = file

    def close(self) -> None:
        """Let go of the files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill, which is `path` after the `with`: wholly, or not at all.

    Raises:
        FileExistsError: there is something at `path` that is not an empty folder.
    """
    is_there = path.is_dir() and not any(path.iterdir())
    if not is_there and (path.exists() or path.is_symlink()):
        raise FileExistsError(f"{path} exists already")
    if is_there:  # the working directory, a mount or what a link points at: it has to stay
        filling = path / f".{os.getpid()}.partial"
    else:  # beside it: a folder is renamed in one step only within a file system
        path.parent.mkdir(parents=True, exist_ok=True)
        filling = path.parent / f".{path.name}.{os.getpid()}.partial"
    filling.mkdir()
    try:
        yield filling
        if is_there:
            for part in sorted(filling.iterdir(), key=lambda part: part.name == CONFIG_FILE):
                part.rename(path / part.name)  # config.json last: without it there is no model
            filling.rmdir()
        else:
            filling.rename(path)
    except BaseException:
        shutil.rmtree(filling)
        raise


def copy_others(original: Path, filling: Path) -> None:
    """All that is no weights and not written yet, with what links point at."""
    for path in sorted(original.rglob("*")):
        relative = path.relative_to(original)
        target = filling / relative
        is_hidden = any(part.startswith(".") for part in relative.parts)
        is_weights = path.name.endswith(_WEIGHT_SUFFIXES)
        if path.is_file() and not (is_hidden or is_weights or target.exists()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As transformers writes its files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, want an object")
    return content
