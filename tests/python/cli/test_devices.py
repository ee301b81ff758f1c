"""Which device `--device` means."""

import pytest
import torch

import qlora_native
from qlora_native.cli import devices
from qlora_native.cli.devices import choose_device
from qlora_native.cli.errors import CommandError


@pytest.fixture
def machine(monkeypatch):
    """A machine of our choice: GPUs that the build can use, torch's CUDA, and whether it works."""

    def describe(usable: list[str], torch_cuda: str | None, works: bool) -> None:
        problems = [] if usable else ["no driver"]
        build = {"cuda_devices": usable, "cuda_problems": problems}
        monkeypatch.setattr(devices, "build_info", lambda: build)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    return describe


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_usable_gpu_is_used(machine, name):
    machine(["cuda:1 H200"], "13.0", works=True)
    assert choose_device(name) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("usable", "torch_cuda", "works", "message"),
    [
        ([], "13.0", True, "no driver"),
        (["cuda:0 H200"], None, False, r"torch .* is built without CUDA"),
        (["cuda:0 H200"], "13.0", False, "finds no GPU, though qlora_native does"),
    ],
    ids=["qlora_native", "torch", "torch's driver"],
)
def test_what_is_missing_is_said_or_avoided(machine, usable, torch_cuda, works, message):
    machine(usable, torch_cuda, works)
    assert choose_device("auto") == torch.device("cpu")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(CommandError, match=f"--device cuda: .*{message}"):
        choose_device("cuda")


def test_this_machine_has_an_answer():
    device = choose_device("auto")
    can_use_gpu = bool(qlora_native.build_info()["cuda_devices"]) and torch.cuda.is_available()
    assert device.type == ("cuda" if can_use_gpu else "cpu")
