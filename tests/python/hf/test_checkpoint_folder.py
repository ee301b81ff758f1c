"""A model's folder: what is read of it, and one that appears when it is whole."""

import json
import os

import pytest
from hf_models import tiny_llama

from qlora_native.hf.checkpoint_folder import CheckpointFolder, new_folder


def fill(path, error=None):
    with new_folder(path) as filling:
        (filling / "config.json").write_text("{}")
        (filling / "code").mkdir()
        (filling / "code" / "model.py").write_text("x = 1")
        assert not (path / "config.json").exists()
        if error is not None:
            raise error


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_that_is_not_there_is_made(tmp_path):
    fill(tmp_path / "a" / "b")
    assert files_in(tmp_path) == ["a/b/code/model.py", "a/b/config.json"]


def test_an_empty_folder_is_filled_and_stays_the_same(tmp_path, monkeypatch):
    """A mount, or the working directory, cannot be replaced."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    fill(type(tmp_path)("."))
    assert files_in(tmp_path) == ["code/model.py", "config.json"]
    assert tmp_path.stat().st_ino == before


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert files_in(tmp_path / "empty") == ["code/model.py", "config.json"]


@pytest.mark.parametrize("is_there", [True, False])
def test_an_error_leaves_nothing(tmp_path, is_there):
    path = tmp_path / "new"
    if is_there:
        path.mkdir()
    with pytest.raises(KeyboardInterrupt):
        fill(path, KeyboardInterrupt())
    assert path.exists() == is_there
    assert not files_in(tmp_path)
    assert os.listdir(tmp_path) == ["new"] * is_there


def test_what_is_there_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path, tmp_path / "dangling"):
        with pytest.raises(FileExistsError, match="exists already"), new_folder(path):
            pass
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


@pytest.mark.parametrize("metadata", [None, 5, []])
def test_an_index_with_wrong_metadata_is_named(metadata, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    with pytest.raises(ValueError, match=r"index\.json has the metadata .*, want an object"):
        CheckpointFolder(tmp_path)
