"""A JSONL file of examples, read strictly and turned into token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_native.cli.batches import NO_LOSS, Example
from qlora_native.cli.errors import CommandError

Record = tuple[int, dict[str, Any]]  # line number, 1-based, and object


@dataclass(frozen=True)
class Columns:
    """Which fields of an object are read: `text`, or `prompt` and `completion`."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None


def read_examples(path: Path, columns: Columns, tokenizer: Any, max_length: int) -> list[Example]:
    """The examples of a JSONL file, each cut to `max_length` tokens.

    With `columns.text` the loss is on the whole text, with `columns.prompt` and
    `columns.completion` on the completion alone. The tokenizer's end token follows the text or the
    completion, so that the model learns to stop.

    Raises:
        CommandError: the file is missing or empty, a line is no JSON object, a column is missing or
            no text, or `max_length` leaves some example nothing to learn.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for line, record in read_jsonl(path):
        prompt, completion = _texts_of(path, line, record, columns)
        prompt_ids: list[int] = [] if prompt is None else _encode(tokenizer, prompt, end)
        # A tokenizer's own start token belongs at the very beginning alone.
        completion_ids = _encode(tokenizer, completion, end, at_start=prompt is None) + end
        input_ids = (prompt_ids + completion_ids)[:max_length]
        labels = ([NO_LOSS] * len(prompt_ids) + completion_ids)[:max_length]
        # The first token has nothing before it to be predicted from.
        if all(label == NO_LOSS for label in labels[1:]):
            raise CommandError(
                f"{path}, line {line}: nothing to learn in the first {max_length} tokens "
                f"(the prompt has {len(prompt_ids)}); raise --max-length or drop the line"
            )
        examples.append(Example(input_ids, labels))
    return examples


def read_jsonl(path: Path) -> list[Record]:
    """The objects of the file with their line numbers; blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CommandError(f"--data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"--data {path}: not UTF-8: {error}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CommandError(
                f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}"
            ) from error
        if not isinstance(record, dict):
            raise CommandError(
                f"{path}, line {number}: a {type(record).__name__}, want a JSON object"
            )
        records.append((number, record))
    if not records:
        raise CommandError(f"--data {path}: the file has no examples")
    return records


def _texts_of(
    path: Path, line: int, record: dict[str, Any], columns: Columns
) -> tuple[str | None, str]:
    """(prompt, completion), or (None, text)."""

    def field(column: str) -> str:
        if column not in record:
            raise CommandError(
                f"{path}, line {line}: no column {column!r}; there are: {', '.join(record)}"
            )
        value = record[column]
        if not isinstance(value, str):
            raise CommandError(
                f"{path}, line {line}: {column!r} is a {type(value).__name__}, want text"
            )
        return value

    if columns.text is not None:
        return None, field(columns.text)
    assert columns.prompt is not None
    assert columns.completion is not None
    return field(columns.prompt), field(columns.completion)


def _encode(tokenizer: Any, text: str, end: Sequence[int], *, at_start: bool = True) -> list[int]:
    """Token ids without an end token, which some tokenizers append by themselves."""
    ids: list[int] = tokenizer(text, add_special_tokens=at_start).input_ids
    return ids[:-1] if end and ids[-1:] == end else ids
