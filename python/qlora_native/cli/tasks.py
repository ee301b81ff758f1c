"""The demo's fine-tuning task: from a function's signature to the first line of its documentation.

    def copyfile(src, dst, *, follow_symlinks=True):
    → Copy data from src to dst in the most efficient way possible.

The split lets nothing leak. A held-out function comes from a module that neither training saw, its
name is no trained function's, and its line occurs nowhere in the text that either training saw.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from qlora_native.cli.batches import NO_LOSS, Example
from qlora_native.cli.corpus import Document, PretrainingText
from qlora_native.cli.tiny_llama import END_TOKEN_ID, encode

MAX_SIGNATURE_LENGTH = 100
SUMMARY_LENGTHS = range(12, 101)


@dataclass(frozen=True)
class Function:
    """A function's signature and the first line of its docstring."""

    signature: str
    summary: str

    @property
    def name(self) -> str:
        """What stands before the bracket."""
        return self.signature.partition("(")[0]

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return f"def {self.signature}:\n"

    def to_example(self) -> Example:
        """Token ids, with a loss on the summary and its end alone."""
        prompt = [END_TOKEN_ID, *encode(self.prompt)]
        summary = [*encode(self.summary), END_TOKEN_ID]
        return Example(prompt + summary, [NO_LOSS] * len(prompt) + summary)


@dataclass(frozen=True)
class Task:
    """The functions to train on, and those to judge on."""

    train: list[Function]
    held_out: list[Function]


def make_task(documents: Iterable[Document], text: PretrainingText) -> Task:
    """All functions of the library whose first line is a sentence, split by module.

    Args:
        documents: the library's documentation.
        text: what the base model is trained on; a held-out summary must not occur in it.
    """
    train: dict[Function, None] = {}
    candidates: dict[Function, None] = {}
    for document in documents:
        if function := _function_of(document):
            (candidates if document.held_out else train)[function] = None
    names = {function.name for function in train}
    summaries = {function.summary for function in train}
    pretraining_text = text.train.decode()
    held_out = [
        function
        for function in candidates
        if function.name not in names
        and function.summary not in summaries
        and function.summary not in pretraining_text
    ]
    return Task(list(train), held_out)


def _function_of(document: Document) -> Function | None:
    if document.signature is None or len(document.signature) > MAX_SIGNATURE_LENGTH:
        return None
    summary = document.text.split("\n")[0].strip()
    is_sentence = summary[:1].isupper() and summary.endswith(".")
    if not is_sentence or len(summary) not in SUMMARY_LENGTHS:
        return None
    return Function(document.signature, summary)
