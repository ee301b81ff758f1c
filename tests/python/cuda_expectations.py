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
    Expectation(
        r"nf4_few_tokens_forward_kernel<.*, [12]>",
        2,
        (TENSOR_CORES, LOAD_16),
        "two thread blocks keep the loads of codes on their way that memory needs",
    ),
    Expectation(
        r"nf4_few_tokens_forward_kernel<.*, 4>",
        1,
        (TENSOR_CORES, LOAD_16),
        "the sums of 32 tokens take half of the registers that there are",
    ),
    Expectation(
        r"nf4_few_tokens_grad_input_kernel<.*>",
        2,
        (TENSOR_CORES,),
        "as forward; codes are read as columns, 8 bytes of a row at a time",
    ),
    Expectation(
        r"nf4_few_tokens_sum_kernel<.*>",
        6,
        (),
        "adds the parts of a few tokens, which are in L2",
    ),
    Expectation(
        r"tiles::nf4_matmul_tiles_kernel<.*, 128>",
        2,
        (TENSOR_CORES, COPY_16),
        "one thread block multiplies while the other waits for its copies",
    ),
    Expectation(
        r"tiles::nf4_matmul_tiles_kernel<.*, 64>",
        3,
        (TENSOR_CORES, COPY_16),
        "as for 128 tokens, with room for one more",
    ),
    Expectation(
        r"tiles::nf4_matmul_tiles_sum_kernel<.*>",
        6,
        (LOAD_16,),
        "adds the parts of a tile, four columns at a time",
    ),
    Expectation(
        r"nf4_matmul_plain_kernel<.*>",
        4,
        (),
        "for what the others do not take: right for every shape and address, not fast",
    ),
    Expectation(
        r"lora_shrink_kernel<.*>",
        2,
        (TENSOR_CORES, LOAD_MATRICES, COPY_16),
        "a pass over x at the memory's speed: copies run ahead in both thread blocks",
    ),
    Expectation(
        r"lora_expand_kernel<.*>",
        3,
        (TENSOR_CORES, LOAD_MATRICES, LOAD_16, STORE_16),
        "a pass over y at the memory's speed: 48 KB of it on their way in three thread blocks",
    ),
    Expectation(
        r"lora_gradients_kernel<.*>",
        2,
        (TENSOR_CORES, LOAD_MATRICES, COPY_16),
        "as shrink, over x and dY",
    ),
    Expectation(
        r"lora_add_parts_kernel",
        5,
        (LOAD_16,),
        "adds the parts of factors' gradients, four elements at a time",
    ),
    Expectation(
        r"lora_plain_(shrink|expand|gradient)_kernel<.*>",
        4,
        (),
        "for what the others do not take: right for every shape and address, not fast",
    ),
    Expectation(
        r"dropout_kernel<.*>",
        5,
        (LOAD_16, STORE_16),
        "Philox's multiplications need many warps to hide behind the memory's accesses",
    ),
    Expectation(
        r"optimizer_rules_kernel<.*>",
        1,
        (),
        "a thread a tensor: the step's numbers, in fp64",
    ),
    Expectation(
        r"optimizer_kernel<AdamWRule, (true|false)>",
        4,
        (LOAD_16, STORE_16),
        "1024 threads, each with several accesses on their way, fill the bandwidth",
    ),
    Expectation(
        r"optimizer_kernel<LionRule, (true|false)>",
        5,
        (LOAD_16, STORE_16),
        "as AdamW, with less to be read by each",
    ),
    Expectation(
        r"optimizer8bit_kernel<AdamWRule, (true|false)>",
        3,
        (LOAD_16, STORE_16),
        "two look-ups and two encodings an element: arithmetic counts as much as the memory",
    ),
    Expectation(
        r"optimizer8bit_kernel<LionRule, false>",
        4,
        (LOAD_16, STORE_16),
        "as AdamW, with one moment",
    ),
    Expectation(
        r"optimizer8bit_kernel<LionRule, true>",
        3,
        (LOAD_16, STORE_16),
        "as AdamW: random numbers take the registers that the second moment leaves",
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
