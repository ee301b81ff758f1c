"""What every test gets: fixed seeds, fixed threads, and a skip for tests that need a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers and bitsandbytes are imported

import random

import pytest
import torch

from qlora_native import _core
from qlora_native.ops import kernel_choice
from support import CUDA_TEST_DEVICE, FLOAT_DTYPES, SWITCH

# One: on shared cores the threads of torch's own operations wait for each other far longer than
# these small tensors take. Tests of threads set their number themselves.
THREADS = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none: all tests marked `cuda`.

    QLORA_TEST_CUDA_DEVICE=cpu runs those of them that take the fixture `device` on the CPU. They
    are about numbers, not about the GPU, and whoever changes them without one can see them pass.
    """
    if CUDA_TEST_DEVICE == "cpu":
        reason = "QLORA_TEST_CUDA_DEVICE is cpu"
    elif not _core.build_info()["cuda"]:
        reason = "this build has no CUDA backend"
    elif not torch.cuda.is_available():
        reason = "torch sees no GPU"
    else:
        return
    if os.environ.get("QLORA_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"QLORA_REQUIRE_GPU=1, but {reason}")
    for item in items:
        runs_on_cpu = CUDA_TEST_DEVICE == "cpu" and "device" in item.fixturenames
        if item.get_closest_marker("cuda") and not runs_on_cpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    """Where a test marked `cuda` runs."""
    return torch.device(CUDA_TEST_DEVICE)


@pytest.fixture(autouse=True)
def _exact_sums_of_torch(request):
    """In tests on a GPU torch's GEMMs sum in fp32, as the derived tolerances demand."""
    if not request.node.get_closest_marker("cuda"):
        yield
        return
    settings = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


@pytest.fixture(autouse=True)
def _kernel_choice_of_tests(request, monkeypatch):
    """Every CPU's core kernels take up to SWITCH tokens, whatever is fastest there."""
    if request.node.get_closest_marker("real_kernel_choice"):
        return
    tables = (kernel_choice._MAX_TOKENS, kernel_choice._MAX_LORA_TOKENS)
    limits = dict.fromkeys(FLOAT_DTYPES, SWITCH)
    monkeypatch.setattr(kernel_choice, "_MAX_TOKENS", dict.fromkeys(tables[0], limits))
    monkeypatch.setattr(kernel_choice, "_MAX_LORA_TOKENS", dict.fromkeys(tables[1], SWITCH))


@pytest.fixture(autouse=True)
def _fixed_seeds_and_threads():
    random.seed(0)
    torch.manual_seed(0)
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)
    yield
    # A test that leaves these changed would make others depend on its having run.
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
