"""What each kernel's machine code should look like, as data: test_cuda_resources.py holds it to it.

A kernel that no entry names fails the test, and so does an entry that names none.
"""

import re
from dataclasses import dataclass

from cuda_resources import Kernel

# Instructions by what they do, as regular expressions of their names in SASS.
LOAD_16 = r"LDG\.E(\..*)?\.128(\..*)?"
STORE_16 = r"STG\.E(\..*)?\.128(\..*)?"
COPY_16 = r"LDGSTS\.E(\..*)?\.128(\..*)?"  # cp.async
LOAD_MATRICES = r"LDSM\..*"
TENSOR_CORES = r"HMMA\.16816\.F32(\..*)?"  # mma.m16n8k16, sums in fp32
WIDEN_TO_FP64 = r"D(ADD|FMA|MUL)(\..*)?"


@dataclass(frozen=True)
class Expectation:
    """Of the kernels whose name matches.

    Attributes:
        name: a regular expression of a whole name, template arguments included.
        thread_blocks: that must fit a multiprocessor at once, by registers and launch bounds.
        has: instructions that must be there, on every architecture.
        why: what the numbers are for.
    """

    name: str
    thread_blocks: int
    has: tuple[str, ...]
    why: str

    def problems(self, kernel: Kernel) -> list[str]:
        """What is not as expected."""
        where = f"{kernel.name} on {kernel.architecture}"
        found = []
        if kernel.local_accesses or kernel.stack_bytes:
            found.append(
                f"{where}: {kernel.local_accesses} loads and stores of local memory and "
                f"{kernel.stack_bytes} bytes of stack, want none"
            )
        if kernel.generic_accesses:
            found.append(
                f"{where}: {kernel.generic_accesses} loads and stores of an unknown address "
                "space, want none"
            )
        if kernel.threads == 0:
            found.append(f"{where}: no launch bounds")
        elif kernel.thread_blocks < self.thread_blocks:
            found.append(
                f"{where}: {kernel.registers} registers and {kernel.threads} threads leave room "
                f"for {kernel.thread_blocks} thread blocks, want {self.thread_blocks}: {self.why}"
            )
        found += [
            f"{where}: no instruction {pattern}, want one: {self.why}"
            for pattern in self.has
            if not kernel.count(pattern)
        ]
        if TENSOR_CORES not in self.has and kernel.count(r"HMMA\..*"):
            found.append(f"{where}: it uses tensor cores, which its entry does not say")
        return found


# All but the tests' judgement of names: registers are checked by thread blocks, since that is what
# they are for. 2048 threads (sm_80, 90a, 100) or 1536 (sm_86, 89, 120) are the most of a
# multiprocessor.
EXPECTATIONS = (
    Expectation(
        r"nf4_dequantize_kernel<.*>",
        6,
        (STORE_16,),
        "1536 threads keep enough stores of 16 bytes on their way to fill the memory's bandwidth",
    ),
    Expectation(
        r"nf4_quantize_(short|long)_blocks_kernel<.*>",
        5,
        (LOAD_16,),
        "1280 threads with several loads of 16 bytes each fill the memory's bandwidth",
    ),
    Expectation(
        r"nf4_dequantize_absmax_kernel",
        6,
        (),
        "a byte in and a word out for each 64 weights: nothing to be gained by wider accesses",
    ),
    Expectation(
        r"nf4_sum_scales_kernel",
        16,
        (WIDEN_TO_FP64,),
        "runs of 256 summed in fp64, one after the other; warps hide the latency of the adds",
    ),
    Expectation(
        r"nf4_mean_of_scales_kernel",
        1,
        (WIDEN_TO_FP64,),
        "one warp in all, summing in fp64",
    ),
    Expectation(
        r"nf4_quantize_scales_kernel",
        6,
        (),
        "256 scales a thread block: small beside the codes",
    ),
)


def expectation_of(kernel: Kernel) -> Expectation:
    """The one entry that names a kernel.

    Raises:
        LookupError: none does, or several do.
    """
    found = [one for one in EXPECTATIONS if re.fullmatch(one.name, kernel.name)]
    if len(found) != 1:
        raise LookupError(
            f"{kernel.name}: {len(found)} entries of cuda_expectations.py name it, want 1: say "
            "what this kernel should look like"
        )
    return found[0]
