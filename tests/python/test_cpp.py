"""Builds the C++ tests with CMake and runs them with ctest, so that one `pytest` tests everything.

GoogleTest comes from the system, else it is fetched. Where neither is possible the test is skipped,
with the reason; QLORA_REQUIRE_GTEST=1 turns that skip into a failure.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "pytest"  # kept: a second run builds what changed

# As tests/cpp/googletest.cmake begins its error.
NO_GTEST = "GoogleTest is not available"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def find_tool(name: str) -> str:
    """A tool of this Python's environment, which need not be activated, else of the system."""
    beside_python = Path(sys.executable).parent
    found = shutil.which(name, path=str(beside_python)) or shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; pip install '.[test]' brings it", pytrace=False)
    return found


def fail(what: str, output: str) -> None:
    pytest.fail(f"{what}\n\n{output}", pytrace=False)


@pytest.fixture(scope="module")
def build() -> Path:
    """A folder with the built C++ tests."""
    if not (REPOSITORY / "CMakeLists.txt").exists():
        pytest.skip(f"the C++ sources are not beside the tests: no {REPOSITORY}/CMakeLists.txt")
    configured = run(
        *(find_tool("cmake"), "-S", REPOSITORY, "-B", BUILD),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"),
        "-DCMAKE_BUILD_TYPE=Debug",  # builds faster than Release by more than it runs slower
        "-DQLORA_BUILD_PYTHON=OFF",
        "-DQLORA_BUILD_TESTS=ON",
        "-DQLORA_CUDA=OFF",
    )
    if configured.returncode != 0 and NO_GTEST in configured.stdout:
        if os.environ.get("QLORA_REQUIRE_GTEST") == "1":
            fail("QLORA_REQUIRE_GTEST=1, but there is no GoogleTest", configured.stdout)
        message = configured.stdout.partition(NO_GTEST)[2].partition("Call Stack")[0]
        pytest.skip(" ".join((NO_GTEST + message).split()))
    if configured.returncode != 0:
        fail("CMake cannot configure the C++ tests", configured.stdout)
    built = run(find_tool("cmake"), "--build", BUILD, "--parallel")
    if built.returncode != 0:
        fail("the C++ tests do not compile", built.stdout)
    return BUILD


@pytest.mark.slow
def test_the_googletests_pass(build: Path) -> None:
    tested = run(
        *(find_tool("ctest"), "--test-dir", build),
        *("--output-on-failure", "--no-tests=error", "--parallel", str(os.cpu_count() or 1)),
    )
    if tested.returncode != 0:
        fail("a GoogleTest fails", tested.stdout)
