"""PEFT's BOFT looks for a CUDA compiler, and leaves CC and CXX set where it finds none."""

import os

import pytest


@pytest.fixture(autouse=True)
def _compilers_as_they_were(monkeypatch):
    for name in ("CC", "CXX"):
        if name in os.environ:
            monkeypatch.setenv(name, os.environ[name])
        else:
            # Recorded as missing, so that it is again afterwards.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
