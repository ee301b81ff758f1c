"""The kernels' machine code, for every architecture, is what cuda_expectations.py says.

No GPU is needed, but a build with CUDA and NVIDIA's disassembler. Without them the tests are
skipped with the reason; QLORA_REQUIRE_CUDA_BUILD=1 turns that skip into a failure.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cuda_expectations import (
    EXPECTATIONS,
    LOAD_16,
    STORE_16,
    TENSOR_CORES,
    Expectation,
    expectation_of,
)
from cuda_resources import (
    Kernel,
    ToolMissing,
    find_tool,
    markdown,
    parse_launch_bounds,
    parse_resources,
    parse_sass,
    read_kernels,
    short_name,
)
from qlora_native import _core

INFO = _core.build_info()  # (qlora_native.build_info() would start the CUDA driver)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """The kernels of the installed extension."""
    reason = "" if INFO["cuda"] else "this build has no CUDA backend"
    try:
        find_tool("cuobjdump"), find_tool("nvdisasm")
    except ToolMissing as error:
        reason = reason or str(error)
    if not reason:
        return read_kernels(Path(_core.__file__))
    if os.environ.get("QLORA_REQUIRE_CUDA_BUILD") == "1":
        pytest.fail(f"QLORA_REQUIRE_CUDA_BUILD=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def test_every_architecture_of_the_build_has_every_kernel(kernels):
    built = {f"sm_{one.removesuffix('-real')}" for one in INFO["cuda_archs"].split(",")}
    architectures: dict[str, set[str]] = {}
    for kernel in kernels:
        architectures.setdefault(kernel.name, set()).add(kernel.architecture)
    assert architectures
    assert all(found == built for found in architectures.values()), architectures


def test_every_kernel_is_as_expected(kernels):
    problems = []
    for kernel in kernels:
        try:
            problems += expectation_of(kernel).problems(kernel)
        except LookupError as error:
            problems.append(str(error))
    assert not problems, "\n".join(dict.fromkeys(problems))


def test_every_expectation_is_of_a_kernel(kernels):
    named = {expectation_of(kernel).name for kernel in kernels}
    assert named == {one.name for one in EXPECTATIONS}


# ---- reading, with what cuobjdump printed once

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:2364 CONSTANT[4]:24
 Function _Z3fooILi4EEvPf:
  REG:39 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = """
arch = sm_90a
.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	function: _Z3fooILi4EEvPf(0x7d)	register count: 39
.nv.info._Z3fooILi4EEvPf
	<0x11>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1 
	<0x12>
	Attribute:	EIATTR_CRS_STACK_SIZE
	Format:	EIFMT_SVAL
	Value:	0x0 
"""  # noqa: W291 (as it prints)

SASS = """
arch = sm_90a
	code for sm_90a
		Function : _Z3fooILi4EEvPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/              @!P1 STS [R12.X4], R19 ;                    /* 0x000000130c009388 */
        /*0020*/              @UP0 LDG.E.128 R8, desc[UR4][R2.64] ;       /* 0x0000000402087981 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;   /* 0x000000020804723c */
        /*0040*/               @P0 EXIT ;                                 /* 0x000000000000094d */
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);                         /* 0xfffffffc00fc7947 */
"""


def test_resources_are_read():
    (kernel,) = parse_resources(RESOURCES.splitlines())
    assert kernel == Kernel(
        "sm_90a", "_Z3fooILi4EEvPf", registers=39, stack_bytes=8, shared_bytes=1024
    )


def test_launch_bounds_are_read():
    assert list(parse_launch_bounds(ELF.splitlines())) == [(("sm_90a", "_Z3fooILi4EEvPf"), 256)]


def test_instructions_are_read():
    found = Counter(parse_sass(SASS.splitlines()))
    opcodes = ["LDC", "STS", "LDG.E.128", "HMMA.16816.F32.BF16", "EXIT", "BRA"]
    assert found == Counter((("sm_90a", "_Z3fooILi4EEvPf"), opcode) for opcode in opcodes)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void qlora::cuda::f_kernel<float, true>(qlora::cuda::Args<float>)",
            "f_kernel<float, true>",
        ),
        ("qlora::cuda::g_kernel(float const*, long)", "g_kernel"),
        (
            "void qlora::cuda::(anonymous namespace)::h<(qlora::cuda::D)1, qlora::BFloat16>(int)",
            "h<(D)1, BFloat16>",
        ),
    ],
)
def test_names_are_shortened(demangled, short):
    assert short_name(demangled) == short


# ---- judging


GOOD = Kernel(
    "sm_80",
    "_Z1f",
    "f_kernel<float>",
    threads=256,
    registers=39,
    opcodes=Counter({"LDG.E.EF.128": 2, "STG.E.128": 1, "IMAD.X": 5, "STS": 4, "LDS.128": 1}),
)
WANTED = Expectation(r"f_kernel<.*>", 6, (LOAD_16, STORE_16), "so that it is fast")


def with_opcode(*opcodes: str) -> Kernel:
    return replace(GOOD, opcodes=GOOD.opcodes + Counter(opcodes))


def test_a_kernel_as_wanted_has_no_problems():
    assert WANTED.problems(GOOD) == []
    assert GOOD.widest("LDG") == 16
    assert GOOD.thread_blocks == 65536 // (256 * 40)
    matrices = replace(WANTED, has=(TENSOR_CORES,))
    for opcode in ("HMMA.16816.F32", "HMMA.16816.F32.BF16"):
        assert matrices.problems(with_opcode(opcode)) == []


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (with_opcode("STL", "LDL.64"), "2 loads and stores of local memory"),
        (replace(GOOD, stack_bytes=16), "16 bytes of stack"),
        (with_opcode("LD.E.64"), "1 loads and stores of an unknown address space"),
        (replace(GOOD, threads=0), "no launch bounds"),
        (replace(GOOD, registers=41), "room for 5 thread blocks, want 6: so that it is fast"),
        (replace(GOOD, opcodes=Counter({"STG.E.128": 1, "LDG.E.64": 1})), "no instruction LDG"),
        (with_opcode("HMMA.16816.F32.BF16"), "tensor cores"),
    ],
)
def test_a_kernel_that_is_not_as_wanted_has_a_problem(kernel, problem):
    (found,) = WANTED.problems(kernel)
    assert found.startswith("f_kernel<float> on sm_80: ")
    assert problem in found


def test_sums_in_16_bits_are_not_what_tensor_cores_should_do():
    wanted = replace(WANTED, has=(TENSOR_CORES,))
    assert len(wanted.problems(with_opcode("HMMA.16816.F16"))) == 1


def test_a_kernel_without_an_entry_is_an_error():
    with pytest.raises(LookupError, match=r"new_kernel: 0 entries .* want 1: say what this kernel"):
        expectation_of(replace(GOOD, name="new_kernel"))


def test_the_table_has_a_row_a_kernel():
    header, rule, row, *_ = markdown([GOOD]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| `f_kernel<float>` | sm_80 | 256 | 39 | 6 |")
    assert "| 16 | 16 |" in row
