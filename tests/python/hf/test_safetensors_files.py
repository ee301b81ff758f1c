"""Safetensors files a tensor at a time, against the library's own reader and writer."""

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_native.hf.safetensors_files import SafetensorsReader, SafetensorsWriter, spec_of
from support import same_bits

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16),
    *(torch.int32, torch.float32, torch.float64, torch.int64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


def tensors_of_all_dtypes():
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        for shape in ((3, 5), (1,), (0, 4)):
            name = f"layer{i % 3}.ü.{dtype}.{shape}"
            tensors[name] = torch.randint(0, 2, shape).to(dtype)
    return tensors


# One entry: the library writes several in an order that differs from process to process.
@pytest.mark.parametrize("metadata", [None, {"format": "ü"}], ids=["none", "some"])
def test_a_file_has_the_bytes_of_the_librarys_own(tmp_path, metadata):
    save_file(tensors_of_all_dtypes(), tmp_path / "a", metadata=metadata)
    with SafetensorsReader(tmp_path / "a") as reader:
        assert reader.metadata == metadata
        specs = {name: stored.spec for name, stored in reader.tensors.items()}
        with SafetensorsWriter(tmp_path / "b", specs, reader.metadata) as writer:
            for i, name in enumerate(reversed(list(specs))):  # in any order
                tensor = reader.load(name)
                if i % 2 and tensor.dtype in (torch.uint8, torch.float32, torch.bfloat16):
                    writer.write(name, tensor)
                else:
                    writer.copy(name, reader)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_tensors_are_written_as_they_were_announced(tmp_path):
    one = torch.zeros(2, 3)
    with SafetensorsWriter(tmp_path / "a", {"x": spec_of(one.to("meta"))}, None) as writer:
        with pytest.raises(ValueError, match=r"x: is .*F32.*\(3, 2\).*announced as .*\(2, 3\)"):
            writer.write("x", one.t().contiguous())
        writer.write("x", one)
    assert same_bits(load_file(tmp_path / "a")["x"], one)
    with (
        pytest.raises(RuntimeError, match=r"\['y'\] were never written"),
        SafetensorsWriter(tmp_path / "b", {"x": spec_of(one), "y": spec_of(one)}, None) as writer,
    ):
        writer.write("x", one)


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "a", {}, None)
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}      ',
        struct.pack("<Q", 8) + b"{      }" + b"trailing",
    ],
    ids=["empty", "short", "long header", "list", "truncated", "trailing"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'a'} is no whole safetensors file"):
        SafetensorsReader(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="there is no"):
        SafetensorsReader(tmp_path / "b")
