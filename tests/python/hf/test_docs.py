"""Every ```python block of a page in docs/ runs, top to bottom in one namespace."""

import re
from pathlib import Path

import pytest
import torch

from tiny_model import save_tiny_model

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text())
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the page, source) of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    path = tmp_path / "llama"
    save_tiny_model(path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    namespace = {"__name__": "__main__", "path": str(path), "torch": torch}
    for line, source in blocks(page):
        # Blank lines in front, so that a traceback has the page's line numbers.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


def test_the_pages_are_found():
    wanted = {"adapters", "bitsandbytes", "merging", "peft", "peft_tuners", "training"}
    assert {page.stem for page in PAGES} >= {*wanted, "transformers"}


def test_blocks_are_found_where_they_are(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\na = 1\n```\ntext\n```bash\nls\n```\n```python\nb = a\n```\n"
    )
    assert blocks(page) == [(3, "a = 1\n"), (10, "b = a\n")]
