"""The native core; csrc/core/operations.h has each operation's formula, shapes and errors.

Where that says x[m, k] of a product, here x[..., k] is taken, and so with y, dy and dx.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

from qlora_native.ops.storage import NF4Tensors

class CoreInfo(TypedDict):
    version: str
    cxx_compiler: str
    cpu_sets: list[str]
    cpu_set: str
    cuda: bool
    cuda_compiler: str
    cuda_archs: str

def build_info() -> CoreInfo:
    """The part of `qlora_native.build_info` that does not ask the CUDA driver."""

class CudaDeviceReport(TypedDict):
    usable: list[str]
    problems: list[str]

def cuda_device_report() -> CudaDeviceReport:
    """The GPUs that can be used, and why there is none, or what is wrong with the others."""

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
def nf4_matmul_strategy(
    direction: Literal["forward", "grad_input"],
    m: int,
    n: int,
    k: int,
    dtype: Literal["float32", "bfloat16", "float16"],
    block_size: int,
    device_index: int,
) -> Literal["plain", "few_tokens", "tiles", "workspace"]:
    """How a product of m tokens is computed best on a CUDA device.

    By a kernel of the core's, or ("workspace") by a dense product with the dequantised weight,
    which is the caller's to do.
    """

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
def lora_forward_grouped(
    x: Tensor,
    factors: Sequence[Tensor],
    seeds: Sequence[Tensor],
    begins: Sequence[int],
    ends: Sequence[int],
    adapters: Sequence[int],
    seed_indices: Sequence[int],
    scalings: Sequence[float],
    ps: Sequence[float],
    t: Tensor,
    y: Tensor,
    num_threads: int,
    stream: int,
) -> None: ...
def lora_backward_grouped(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    factors: Sequence[Tensor],
    seeds: Sequence[Tensor],
    begins: Sequence[int],
    ends: Sequence[int],
    adapters: Sequence[int],
    seed_indices: Sequence[int],
    scalings: Sequence[float],
    ps: Sequence[float],
    gradients: Sequence[Tensor],
    dx: Tensor | None,
    num_threads: int,
    stream: int,
) -> None: ...
def dora_scale(
    rows: Tensor,
    gain: Tensor,
    addend: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    num_threads: int,
    stream: int,
) -> None: ...
def dora_scale_backward(
    dy: Tensor,
    rows: Tensor | None,
    gain: Tensor,
    scaled: Tensor,
    sums: Tensor | None,
    num_threads: int,
    stream: int,
) -> None: ...
def dropout(
    x: Tensor, p: float, seed: Tensor, out: Tensor, num_threads: int, stream: int
) -> None: ...

class PagedMemory:
    """A piece of a PagedBuffer's memory; `torch.from_dlpack` makes a tensor of bytes of it.

    The piece and the tensor keep the buffer.
    """

    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class PagedReport(TypedDict):
    unknown_bytes: int
    host_bytes: int
    device_bytes: int
    moved_to_device_bytes: int
    moved_to_host_bytes: int
    refused_bytes: int

class PagedBuffer:
    """Memory for optimiser state, in pages that need not all be on the device at a time.

    csrc/core/paged_buffer.h has its contract. `device` is "cpu" or "cuda:N".
    """

    def __init__(
        self,
        device: str,
        bytes: int,
        *,
        page_bytes: int = 33554432,
        strategy: str = "automatic",
        resident_bytes: int | None = None,
        page_file: str | os.PathLike[str] | None = None,
    ) -> None: ...
    @property
    def device(self) -> str: ...
    @property
    def strategy(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def page_count(self) -> int: ...
    def memory(self, offset: int, bytes: int) -> PagedMemory:
        """The bytes where the host sees them: on the GPU of managed memory, on "cpu" of pinned."""

    def begin(self, page: int, stream: int) -> PagedMemory: ...
    def end(self, page: int, stream: int) -> None: ...
    def make_resident(self, stream: int) -> bool: ...
    def join(self, stream: int) -> None: ...
    def prefetch_to_device(self, offset: int, bytes: int, stream: int) -> None: ...
    def prefetch_to_host(self, offset: int, bytes: int, stream: int) -> None: ...
    def report(self) -> PagedReport: ...

class PagedState:
    """An optimiser's state in pages: a PagedBuffer for each kind of number that it has.

    csrc/core/paged_state.h has its contract. `device` is "cpu" or "cuda:N".
    """

    def __init__(
        self,
        device: str,
        rule: Literal["adamw", "lion"],
        is_8bit: bool,
        elements: int,
        *,
        page_bytes: int = 33554432,
        strategy: str = "automatic",
        resident_bytes: int | None = None,
        page_file: str | os.PathLike[str] | None = None,
    ) -> None: ...
    @property
    def device(self) -> str: ...
    @property
    def strategy(self) -> str: ...
    @property
    def is_8bit(self) -> bool: ...
    @property
    def elements(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def page_count(self) -> int: ...
    def memory(self, plane: int, first_element: int, count: int) -> PagedMemory:
        """The part of a plane that belongs to `count` elements, where the host sees it.

        Planes are in the order exp_avg, its absmax, exp_avg_sq, its absmax; those that the state
        has not are left out.
        """

    def join(self, stream: int) -> None: ...
    def report(self) -> PagedReport: ...

class PagedStep:
    """A step of an optimiser on parameters with state in pages, in three parts.

    Its arguments are checked when it is made, `prepare` takes the memory that it needs, `run` runs
    it, once. The caller keeps the tensors until then.
    """

    def __init__(
        self,
        state: PagedState,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        step_counts: Sequence[Tensor],
        first_elements: Sequence[int],
        numbers: Sequence[int],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        rounding_seed: int | None = None,
        lr_tensor: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None: ...
    def prepare(self, num_threads: int, stream: int) -> None: ...
    def run(self) -> None: ...
