"""The native core; csrc/core/operations.h has each operation's formula, shapes and errors.

Where that says x[m, k] of a product, here x[..., k] is taken, and so with y, dy and dx.
"""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from qlora_native.ops.storage import NF4Tensors

class BuildInfo(TypedDict):
    version: str
    cxx_compiler: str
    cpu_sets: list[str]
    cpu_set: str
    cuda: bool
    cuda_compiler: str
    cuda_archs: str

def build_info() -> BuildInfo:
    """What was built and what is in use.

    The version and the compilers; the instruction sets that this build has and this processor can
    run, and the one in use (`QLORA_NATIVE_CPU_ISA` forces one); whether the CUDA backend was built,
    and for which architectures.
    """

def nf4_quantize(w: Tensor, out: NF4Tensors, num_threads: int, stream: int) -> None: ...
def nf4_dequantize(weight: NF4Tensors, out: Tensor, num_threads: int, stream: int) -> None: ...
def nf4_dequantize_absmax(
    weight: NF4Tensors, out: Tensor, num_threads: int, stream: int
) -> None: ...
def nf4_linear(
    x: Tensor, weight: NF4Tensors, bias: Tensor | None, y: Tensor, num_threads: int, stream: int
) -> None: ...
def nf4_linear_grad_input(
    dy: Tensor, weight: NF4Tensors, dx: Tensor, num_threads: int, stream: int
) -> None: ...
def lora_forward(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    t: Tensor,
    y: Tensor,
    num_threads: int,
    stream: int,
) -> None: ...
def lora_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    grad_a: Tensor,
    grad_b: Tensor,
    dx: Tensor | None,
    num_threads: int,
    stream: int,
) -> None: ...
def dropout(
    x: Tensor, p: float, seed: Tensor, out: Tensor, num_threads: int, stream: int
) -> None: ...
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step_counts: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    num_threads: int,
    stream: int,
) -> None: ...
def adamw8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_absmaxes: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_sq_absmaxes: Sequence[Tensor],
    *,
    step_counts: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    num_threads: int,
    stream: int,
) -> None: ...
