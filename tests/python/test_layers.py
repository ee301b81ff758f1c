"""The layers of csrc: format <- core <- {cpu, cuda} <- bindings. An arrow is "is known by"."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Each layer and the layers whose headers it may include.
MAY_INCLUDE = {
    "format": {"format"},
    "core": {"format", "core"},
    "cpu": {"format", "core", "cpu"},
    "cuda": {"format", "core", "cuda"},
    "bindings": {"format", "core", "bindings"},
}

# Third parties and system headers that only some layers may include.
ONLY_IN = {
    re.compile(r"(torch|ATen|c10|caffe2)/"): set(),
    re.compile(r"(pybind11/|Python\.h$)"): {"bindings"},
    re.compile(r"(cuda|cooperative_groups|cub/|cutlass/|nv)"): {"cuda"},
    re.compile(r"(\w*intrin|arm_neon|cpuid)\.h$"): {"cpu"},
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)


def sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cuh", ".cu"})


def includes(path: Path) -> list[tuple[str, str]]:
    """(bracket, header) of each include line, comments aside."""
    without_comments = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return INCLUDE.findall(without_comments)


pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason=f"there is no {CSRC}")


def test_every_source_belongs_to_a_layer() -> None:
    layers = {path.relative_to(CSRC).parts[0] for path in sources()}
    assert layers == MAY_INCLUDE.keys()


@pytest.mark.parametrize("layer", MAY_INCLUDE)
def test_a_layer_includes_only_what_it_may_know(layer: str) -> None:
    wrong = [
        f"{path.relative_to(CSRC)} includes {header}"
        for path in sources()
        if path.relative_to(CSRC).parts[0] == layer
        for bracket, header in includes(path)
        if bracket == '"' and Path(header).parts[0] not in MAY_INCLUDE[layer]
    ]
    assert not wrong, "\n".join(wrong)


def test_includes_in_quotes_are_paths_from_csrc() -> None:
    wrong = [
        f"{path.relative_to(CSRC)} includes {header}, which is no file of csrc"
        for path in sources()
        for bracket, header in includes(path)
        if bracket == '"' and not (CSRC / header).is_file()
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_is_nowhere_and_other_third_parties_keep_to_their_layer() -> None:
    wrong = [
        f"{path.relative_to(CSRC)} includes {header}"
        for path in sources()
        for bracket, header in includes(path)
        for pattern, layers in ONLY_IN.items()
        if bracket == "<" and pattern.match(header)
        if path.relative_to(CSRC).parts[0] not in layers
    ]
    assert not wrong, "\n".join(wrong)


def test_the_include_parser_sees_what_it_should(tmp_path: Path) -> None:
    source = tmp_path / "a.h"
    source.write_text(
        '#include "core/check.h"\n  #  include <torch/all.h>\n'
        '// #include "cuda/no.h"\n/* #include\n#include "cuda/no.h" */\n'
    )
    assert includes(source) == [('"', "core/check.h"), ("<", "torch/all.h")]
