"""Which device a command runs on."""

import torch

from qlora_native import build_info
from qlora_native.cli.errors import CommandError


def choose_device(name: str) -> torch.device:
    """The device that `--device` asks for: "cpu", "cuda", or "auto", CUDA where it can be used.

    Raises:
        CommandError: it is "cuda", which cannot be used; the message says why.
    """
    if name == "cpu":
        return torch.device("cpu")
    problem = _why_no_cuda()
    if problem is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise CommandError(f"--device cuda: {problem}")
    return torch.device("cpu")


def _why_no_cuda() -> str | None:
    build = build_info()
    if not build["cuda_devices"]:
        return "; ".join(build["cuda_problems"])
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU, though qlora_native does"
    return None
