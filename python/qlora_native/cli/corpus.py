"""Real English that every Python brings along: the documentation of its own standard library.

Two sources: the docstrings in the library's source files, which are read without being imported,
and the topics of Python's interactive `help()`. One Python gives the same text every time, byte for
byte.

Modules are held out whole. A module whose name is drawn (by a hash, so that it is the same on every
machine) is seen neither by the pretraining nor by the fine-tuning; both are judged on it.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as help_topics

# A document ends with byte 0, which no text contains.
END_OF_DOCUMENT = b"\0"

# Not documentation of the library: what users installed, the tests, and two applications.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
)

HELD_OUT_SHARE = 0.1

# Of the characters of a paragraph, so many are letters and spaces if it is prose and no table.
PROSE_SHARE = 0.9


@dataclass(frozen=True)
class Document:
    """One docstring or help topic.

    `module` is the module (or topic) that it belongs to, `text` its text without indentation. For a
    function `signature` is what follows `def`, such as `copyfile(src, dst)`; otherwise it is None.
    """

    module: str
    text: str
    signature: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether the model is judged on this document, and not trained on it."""
        digest = hashlib.sha256(self.module.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class PretrainingText:
    """Documents joined: what the base model is trained on, and what it is judged on."""

    train: bytes
    held_out: bytes


def read_standard_library(folder: Path | None = None) -> list[Document]:
    """Read all documentation of the standard library in `folder`, by default this Python's own.

    Raises:
        FileNotFoundError: the folder holds no Python source with docstrings (some minimal and some
            zipped Pythons ship none).
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    documents = list(_read_docstrings(folder))
    if not documents:
        raise FileNotFoundError(
            f"{folder} holds no Python source with docstrings; "
            "a Python that ships its library's source is needed"
        )
    return documents + [
        Document(f"help {name}", inspect.cleandoc(text))
        for name, text in sorted(help_topics.items())
    ]


def make_pretraining_text(documents: Iterable[Document]) -> PretrainingText:
    """Join the prose of the documents, each text kept once."""
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    for document in documents:
        (held_out if document.held_out else train)[prose_of(document.text)] = None
    return PretrainingText(
        train=_join(train), held_out=_join(text for text in held_out if text not in train)
    )


def prose_of(text: str) -> str:
    """The paragraphs of `text` that are sentences, a line each: no code, no tables, no examples."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n".join(filter(_is_prose, paragraphs))


def _join(texts: Iterable[str]) -> bytes:
    return b"".join(text.encode() + END_OF_DOCUMENT for text in texts if text)


def _is_prose(paragraph: str) -> bool:
    is_sentence = paragraph[:1].isupper() and paragraph.endswith(".")
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return is_sentence and letters >= PROSE_SHARE * len(paragraph)


def _read_docstrings(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts):
            yield from _docstrings_of(path, module=".".join(relative.with_suffix("").parts))


def _docstrings_of(path: Path, module: str) -> Iterator[Document]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on invalid escapes in old files
        try:
            tree = ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError):
            return  # a distribution may put templates or files for other Pythons there
    for node in ast.walk(tree):
        signature = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{node.name}({ast.unparse(node.args)})"
        elif not isinstance(node, ast.Module | ast.ClassDef):
            continue
        if text := ast.get_docstring(node):
            yield Document(module, text, signature)
