"""cuda_small_cases.py, which is for a GPU, on CPU tensors: it is right, and complete."""

import pytest
import torch

import cuda_small_cases
from qlora_native import _core

# They compute nothing.
ASKED_ONLY = {"build_info", "cuda_device_report", "nf4_matmul_strategy", "PagedMemory"}
# CUDA has them not: there the Python above calls what it has, once for each group.
ON_CPU_ALONE = {
    "lora_forward_grouped",
    "lora_backward_grouped",
    "dora_scale",
    "dora_scale_backward",
}


def test_they_are_right_and_call_every_operation_of_the_core(monkeypatch, capsys):
    operations = {name for name in vars(_core) if not name.startswith("_")}
    operations -= ASKED_ONLY | ON_CPU_ALONE
    called = set()

    def recorder(name, operation):
        def record(*arguments, **options):
            called.add(name)
            return operation(*arguments, **options)

        return record

    for name in operations:
        monkeypatch.setattr(_core, name, recorder(name, getattr(_core, name)))
    assert cuda_small_cases.main(["--device", "cpu"]) == 0, capsys.readouterr().out
    assert called == operations


@pytest.mark.parametrize(
    ("operation", "case"),
    [("nf4_linear", "products"), ("dropout", "dropout"), ("lora_backward", "lora")],
)
def test_a_wrong_result_is_seen(monkeypatch, capsys, operation, case):
    right = getattr(_core, operation)
    calls = []

    def wrong(*arguments):
        right(*arguments)
        calls.append(None)
        if len(calls) == 2:  # of dropout, the first call is the reference
            arguments[-3].view(-1)[-1] = 100.0

    monkeypatch.setattr(_core, operation, wrong)
    monkeypatch.setattr(cuda_small_cases, "CASES", (getattr(cuda_small_cases, case),))
    assert cuda_small_cases.main(["--device", "cpu"]) == 1
    assert f"{case}: FAILED: AssertionError" in capsys.readouterr().out


def test_its_device_is_cuda_unless_said_otherwise():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        cuda_small_cases.main([])
