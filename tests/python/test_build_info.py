"""build_info: what was built, and which instruction set runs."""

import importlib.metadata

import pytest
import torch

import qlora_native
from support import run_python


def test_it_says_what_was_built():
    info = qlora_native.build_info()
    assert set(info) == {
        "version",
        "cxx_compiler",
        "cpu_sets",
        "cpu_set",
        "cuda",
        "cuda_compiler",
        "cuda_archs",
        "cuda_devices",
        "cuda_problems",
    }
    assert "scalar" in info["cpu_sets"]
    assert info["cpu_set"] in info["cpu_sets"]
    assert info["cxx_compiler"]
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_compiler"]) == bool(info["cuda_archs"]) == info["cuda"]


def test_it_says_which_gpus_can_be_used_or_why_none():
    info = qlora_native.build_info()
    assert info["cuda_devices"] or info["cuda_problems"]
    if not info["cuda"]:
        assert info["cuda_devices"] == []
        (problem,) = info["cuda_problems"]
        assert problem.startswith("this build of qlora_native has no CUDA backend; install a CUDA")


@pytest.mark.cuda
def test_it_names_the_gpus_that_torch_sees():
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report = qlora_native.build_info()
    said = report["cuda_devices"] + report["cuda_problems"]
    assert len(said) == len(names)
    assert all(any(name in line for line in said) for name in names)


def test_a_machine_without_a_driver_or_a_device_imports_and_says_why():
    """Also where the driver shows no device: it is told to hide them."""
    code = """
import qlora_native
info = qlora_native.build_info()
assert info["cuda_devices"] == [] and info["cuda_problems"], info
"""
    result = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_its_version_is_that_of_the_installed_package():
    version = importlib.metadata.version("qlora_native")
    assert qlora_native.build_info()["version"] == qlora_native.__version__ == version


def test_the_public_names_are_there():
    for name in qlora_native.__all__:
        assert hasattr(qlora_native, name)


QUANTISE = """
import torch, qlora_native
torch.manual_seed(0)
weight = qlora_native.nf4_quantize(torch.randn(33, 65))
print(qlora_native.build_info()["cpu_set"], weight.codes.sum().item())
"""


@pytest.mark.parametrize("cpu_set", qlora_native.build_info()["cpu_sets"])
def test_the_environment_chooses_the_instruction_set(cpu_set):
    result = run_python(QUANTISE, QLORA_NATIVE_CPU_ISA=cpu_set)
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    codes = qlora_native.nf4_quantize(torch.randn(33, 65)).codes
    assert result.stdout.split() == [cpu_set, str(codes.sum().item())]


def test_an_empty_choice_is_none():
    result = run_python("import qlora_native", QLORA_NATIVE_CPU_ISA="")
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_refused_and_the_known_ones_named():
    result = run_python(QUANTISE, QLORA_NATIVE_CPU_ISA="mmx")
    assert result.returncode != 0
    assert "QLORA_NATIVE_CPU_ISA is 'mmx', but this build on this processor has:" in result.stderr
    assert "scalar" in result.stderr


def test_importing_needs_neither_transformers_nor_peft_nor_bitsandbytes():
    code = """
import sys
import qlora_native
optional = {"transformers", "peft", "bitsandbytes", "safetensors", "accelerate"}
print(sorted(optional & set(sys.modules)))
"""
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_first_core_call_may_be_in_a_forked_child_of_a_process_that_used_torchs_threads():
    code = """
import os, signal, torch, qlora_native
torch.set_num_threads(4)
w = torch.randn(512, 512)
(torch.zeros(1 << 20) + 1).sum()
child = os.fork()
if child == 0:
    signal.alarm(30)
    qlora_native.nf4_quantize(w)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_a_core_call_from_many_threads_and_after_a_fork_works():
    code = """
import os, threading, torch, qlora_native
torch.set_num_threads(4)
w = torch.randn(512, 512)
expected = qlora_native.nf4_quantize(w).dequantize()
wrong = []
def work():
    for _ in range(20):
        if not torch.equal(qlora_native.nf4_quantize(w).dequantize(), expected):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
if child == 0:
    results = [qlora_native.nf4_quantize(w).dequantize() for _ in range(20)]
    torch.set_num_threads(1)  # its own threads do not outlive a fork: equal() would wait for them
    os._exit(not all(torch.equal(result, expected) for result in results))
assert os.waitpid(child, 0)[1] == 0
assert not wrong
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
