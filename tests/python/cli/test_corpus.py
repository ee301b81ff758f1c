"""The text is real, repeatable, and split so that nothing leaks."""

import re

import pytest

from qlora_native.cli.corpus import (
    Document,
    make_pretraining_text,
    prose_of,
    read_standard_library,
)
from qlora_native.cli.tasks import Function, make_task


@pytest.fixture(scope="module")
def documents():
    return read_standard_library()


@pytest.fixture(scope="module")
def text(documents):
    return make_pretraining_text(documents)


@pytest.fixture(scope="module")
def task(documents, text):
    return make_task(documents, text)


@pytest.fixture
def library(tmp_path):
    """A library of two modules, of which one is held out, and of what must not be read."""
    held_out = next(f"m{i}" for i in range(100) if Document(f"m{i}", "").held_out)
    trained = next(f"m{i}" for i in range(100) if not Document(f"m{i}", "").held_out)
    (tmp_path / f"{trained}.py").write_text(
        '"""A module of the library.\n\n>>> 1 + 1\n2\n\nThe end of it."""\n'
        'def scale(x: float, *, by=2) -> float:\n    """Multiply x by two."""\n'
        'class Thing:\n    """A thing."""\n'
        '    async def fetch(self): "Fetch the thing from afar."\n'
        "def silent(): pass\n"
    )
    (tmp_path / f"{held_out}.py").write_text(
        'def shift(x): "Add one to the number."\n'
        'def scale(y): "Multiply it by some other number."\n'  # a name that is trained
        'def obtain(x): "Fetch the thing from afar."\n'  # a summary that is trained
        'def part(x): "The end of it."\n'
    )
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "stranger.py").write_text('"""Not of the library."""')
    return tmp_path


def test_reads_docstrings_with_signatures_and_nothing_else(library):
    read = read_standard_library(library)
    found = {(d.signature, d.text) for d in read if not d.module.startswith("help ")}
    assert ("scale(x: float, *, by=2)", "Multiply x by two.") in found
    assert ("fetch(self)", "Fetch the thing from afar.") in found
    assert (None, "A thing.") in found
    assert len(found) == 8
    assert not any("Not of the library" in d.text for d in read)


def test_the_text_is_prose(library):
    text = make_pretraining_text(read_standard_library(library))
    assert b"A module of the library.\nThe end of it.\0" in text.train
    assert b">>>" not in text.train
    assert prose_of("Two lines\n  of one.\n\nnot a sentence\n\nA | table | 1 | 2.") == (
        "Two lines of one."
    )


def test_a_leak_through_name_or_summary_is_closed(library):
    read = read_standard_library(library)
    task = make_task(read, make_pretraining_text(read))
    assert task.held_out == [Function("shift(x)", "Add one to the number.")]
    assert Function("fetch(self)", "Fetch the thing from afar.") in task.train


def test_a_folder_without_source_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python source with docstrings"):
        read_standard_library(tmp_path)


def test_this_pythons_library_is_plenty_and_repeatable(documents, text):
    assert len(text.train) > 800_000
    assert 0.03 < len(text.held_out) / len(text.train) < 0.3
    assert make_pretraining_text(read_standard_library()) == text
    assert {d.module for d in documents if "test" in re.split(r"\W", d.module)} == set()


def test_the_real_split_does_not_leak(task, text):
    assert len(task.train) > 1_000
    assert len(task.held_out) > 100
    assert {f.name for f in task.train}.isdisjoint(f.name for f in task.held_out)
    assert {f.summary for f in task.train}.isdisjoint(f.summary for f in task.held_out)
    assert not any(f.summary.encode() in text.train for f in task.held_out)


def test_an_example_has_its_loss_on_the_summary_alone():
    function = Function("f(x)", "Do it well.")
    example = function.to_example()
    assert bytes(example.input_ids) == b"\0def f(x):\nDo it well.\0"
    start = len(b"\0def f(x):\n")
    assert example.labels[:start] == [-100] * start
    assert example.labels[start:] == example.input_ids[start:]
