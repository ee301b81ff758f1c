"""What a CMake configuration decides about CUDA."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Knows neither the architectures of this build nor, it says, CUDA 12.8.
OLD_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *_100*|*_120*) echo "nvcc fatal: Unsupported gpu architecture" >&2; exit 1 ;;
  *) exec {nvcc} "$@" ;;
esac
"""


def configure(tmp_path: Path, wanted: str) -> subprocess.CompletedProcess:
    nvcc, cmake = shutil.which("nvcc"), shutil.which("cmake")
    if nvcc is None or cmake is None:
        pytest.skip("needs cmake, and an nvcc to stand behind an old one")
    old_nvcc = tmp_path / "nvcc"
    old_nvcc.write_text(OLD_NVCC.format(nvcc=nvcc))
    old_nvcc.chmod(0o755)
    options = ["-DQLORA_BUILD_PYTHON=OFF", f"-DQLORA_CUDA={wanted}"]
    return subprocess.run(
        [cmake, "-S", REPOSITORY, "-B", tmp_path / "build", *options],
        env={**os.environ, "CUDACXX": str(old_nvcc)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_with_an_old_toolkit_the_build_is_for_the_cpu_and_says_why(tmp_path):
    result = configure(tmp_path, "AUTO")
    assert result.returncode == 0, result.stderr
    assert "CPU only" in result.stdout
    assert "is CUDA 12.4, want 12.8 or newer" in result.stdout


def test_with_an_old_toolkit_a_build_that_must_have_cuda_fails(tmp_path):
    result = configure(tmp_path, "ON")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())  # CMake breaks its lines
    assert "is CUDA 12.4, want 12.8 or newer" in message
