"""Which kernel takes a product: the core's own, or torch's GEMM on a dequantised workspace.

The choice is data. On a CPU it is here: the most tokens of a call that the core's kernels take, by
instruction set and dtype, with the measurements that led to it. On CUDA it is the core's plan of a
product (csrc/cuda/nf4_matmul_plan.cpp), which knows its own kernels and the device.
"""

import functools
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.ops.storage import NF4Tensors

Direction: TypeAlias = Literal["forward", "grad_input"]

_ALWAYS = 1 << 62

# Forward + gradient of a 4096 x 4096 NF4 weight, two threads, milliseconds, in one run each: ours,
# then dequantise + torch's GEMM limited to the same instructions, on a Xeon with AMX:
#
#   amx, bf16          m = 16  1.1 + 1.2 / 2.9 + 3.7    256   3.8 + 4.3 / 6.8 + 7.1
#                        1024  15.6 + 17.7 / 19.2 + 19.0  2048  31.2 + 36.6 / 35.8 + 35.2
#   avx512_bf16, bf16  m = 16  3.3 + 3.7 / 5.5 + 7.0    256   42.6 + 44.1 / 44.8 + 47.0
#                        1024  167 + 173 / 170 + 176
#   avx512, bf16       m = 64  8.0 + 8.9 / 36.8 + 38.2  512   56.5 + 62.4 / 254 + 253
#   avx512, fp32       m = 64  7.7 + 8.7 / 13.2 + 12.1  512   56.4 + 60.5 / 58.5 + 56.9
#                        1024  112 + 120 / 107 + 106
#   amx, fp16          m = 64  7.8 + 8.6 / 9.8 + 10.7   256   27.8 + 30.5 / 28.5 + 29.6
#                        1024  113 + 121 / 109 + 113     (the kernels are those of avx512, in fp32)
#   avx2: 1.3 times as fast as torch's fp32 product of a dense weight at m = 64, 1.0 at 1024;
#         torch's bf16 and fp16 products are many times slower there
#   scalar, bf16       m = 4   20 / 22                    6   23 / 22
_MAX_TOKENS: dict[str, dict[torch.dtype, int]] = {
    "scalar": {torch.bfloat16: 4, torch.float16: 4, torch.float32: 8},
    "avx2": {torch.bfloat16: _ALWAYS, torch.float16: _ALWAYS, torch.float32: 512},
    "avx512": {torch.bfloat16: _ALWAYS, torch.float16: 256, torch.float32: 512},
    "avx512_bf16": {torch.bfloat16: _ALWAYS, torch.float16: 256, torch.float32: 512},
    "amx": {torch.bfloat16: _ALWAYS, torch.float16: 256, torch.float32: 512},
}

# The LoRA products, forward + backward at n = k = 4096, bf16, r = 16, ours / torch's: amx, m = 512
# 1.3 / 3.3 ms, m = 16 0.14 / 0.33; avx512, m = 512 2.7 / 3.3. Torch had AMX in both.
_MAX_LORA_TOKENS = {
    "scalar": 4,
    "avx2": _ALWAYS,
    "avx512": _ALWAYS,
    "avx512_bf16": _ALWAYS,
    "amx": _ALWAYS,
}

# The SIMD kernels want rows of whole halves of their chunks of 128, each in one quantisation block;
# the core hands other weights to its scalar kernels.
_SIMD_RUN = 64


_CPU_SET = _core.build_info()["cpu_set"]

# The strategies of the core's plan for CUDA, and whether they are kernels of the core.
_CUDA_STRATEGIES = {"plain": True, "few_tokens": True, "tiles": True, "workspace": False}

_DTYPE_NAMES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# The LoRA products on CUDA, by compute dtype. In 16 bits the core's: a pass over x and one over y
# where torch's GEMMs take casts of the factors besides, and fp32 copies of x and dy for gradients
# summed in fp32. In fp32 nothing is cast and the tensor cores that they are built on do not add in
# fp32: torch's. (Expected from the bytes that each moves; not measured yet.)
_CUDA_LORA_DTYPES = {torch.bfloat16: True, torch.float16: True, torch.float32: False}

# The LoRA kernels load 16 bytes at a time, eight numbers of 16 bits; other rows go to slow ones.
_CUDA_LORA_RUN = 8


def prefers_native(x: Tensor, weight: NF4Tensors, direction: Direction) -> bool:
    """Whether the core's kernels take a product: with x[..., k] forward, else with dy[..., n]."""
    if x.is_cpu:
        has_simd_rows = weight.k % _SIMD_RUN == 0 and weight.block_size >= _SIMD_RUN
        limits = _MAX_TOKENS[_CPU_SET if has_simd_rows else "scalar"]
        return x.numel() <= limits[x.dtype] * x.shape[-1]
    if not x.is_cuda:
        return False
    count, width = x.numel(), x.shape[-1]
    if count == 0:
        return width != 0  # without tokens the core has nothing to do
    return _is_native_on_cuda(
        direction, count // width, weight.n, weight.k, x.dtype, weight.block_size, x.get_device()
    )


# A look-up costs 0.14 µs, less than the plan with its way through the binding. A model asks for
# few: its shapes of layers, for each number of tokens that it is given.
@functools.lru_cache(maxsize=4096)
def _is_native_on_cuda(
    direction: Direction,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    block_size: int,
    device_index: int,
) -> bool:
    name = _DTYPE_NAMES[dtype]
    strategy = _core.nf4_matmul_strategy(direction, m, n, k, name, block_size, device_index)
    return _CUDA_STRATEGIES[strategy]


def lora_prefers_native(x: Tensor, lora_b: Tensor) -> bool:
    """Whether the core's kernels take the LoRA products of a batch x[..., k] with lora_b[n, r]."""
    if x.is_cpu:
        return x.numel() <= _MAX_LORA_TOKENS[_CPU_SET] * x.shape[-1]
    if not x.is_cuda:
        return False
    has_whole_runs = x.shape[-1] % _CUDA_LORA_RUN == 0 and lora_b.shape[0] % _CUDA_LORA_RUN == 0
    return has_whole_runs and _CUDA_LORA_DTYPES[x.dtype]


def groups_prefer_native(x: Tensor) -> bool:
    """Whether the core's operation takes the updates of a batch's groups: on a CPU.

    On CUDA each group is a call of its own.
    """
    return x.is_cpu and x.numel() <= _MAX_LORA_TOKENS[_CPU_SET] * x.shape[-1]
