"""The tensors that an NF4 weight is stored in, and how the core is told where to run."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

NESTED_BLOCK = 256  # blocks that share one nested scale
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# NF4Tensors in an operator's schema. Schemas are written out because torch 2.6 cannot infer these.
NF4_SCHEMA = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "SymInt n, SymInt k, SymInt block_size"
)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Result = TypeVar("_Result")
PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # any other tensor may keep its memory elsewhere


class NF4Tensors(NamedTuple):
    """The stored bytes of a weight `[n, k]`, all uint8, as the core takes them."""

    codes: Tensor  # [n, k/2] (k even), else [ceil(n*k/2), 1]
    absmax: Tensor  # nested: [blocks]; plain: [blocks, 4], the bytes of an fp32 each
    nested_absmax: Tensor | None  # [ceil(blocks/256), 4]
    nested_offset: Tensor | None  # [4]
    n: int
    k: int
    block_size: int


def check_block_size(operation: str, block_size: int) -> None:
    """Raise ValueError unless `block_size` is one that the format has."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{operation}: block_size is {block_size}, want one of {BLOCK_SIZES}")


def empty_nf4_tensors(
    n: int, k: int, block_size: int, double_quant: bool, device: torch.device | str | None
) -> NF4Tensors:
    """Uninitialised storage of a weight `[n, k]`: the one place that knows its shapes.

    The codes keep a row of the weight a row, so that the weight of a transposed layer is refused by
    its shape; a row of odd length does not end on a whole byte, and then the codes are one column.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=device)

    blocks = -(-n * k // block_size)
    codes = empty(n, k // 2) if k % 2 == 0 else empty((n * k + 1) // 2, 1)
    if not double_quant:
        return NF4Tensors(codes, empty(blocks, 4), None, None, n, k, block_size)
    nested_blocks = -(-blocks // NESTED_BLOCK)
    return NF4Tensors(codes, empty(blocks), empty(nested_blocks, 4), empty(4), n, k, block_size)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor as the core reads it: contiguous, no sign pending (z.conj().imag has one)."""
    return tensor.contiguous().resolve_neg()


def _raw_stream_of_object(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


# What torch's compiler asks as well: an integer, where torch.cuda.current_stream makes an object.
_current_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _raw_stream_of_object
)


def execution(tensor: Tensor) -> tuple[int, int]:
    """The last two arguments of every call of the core: CPU threads and CUDA stream.

    The stream is the current one of the tensor's device, whichever device is the current one.
    """
    if tensor.is_cuda:
        return 1, _current_raw_stream(tensor.get_device())
    return torch.get_num_threads(), 0


def run_core(operation: Callable[..., _Result], *arguments: Any, **named: Any) -> _Result:
    """One call of the core; a second one, if GPU memory ran out, with what torch had cached.

    The core's scratch memory is not torch's, whose allocator frees its cache before it gives up,
    but for its own allocations alone. Nothing has been queued when the core runs out of memory
    (csrc/core/operations.h), so that also what adds to its output can be called again.
    """
    try:
        return operation(*arguments, **named)
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_current_stream_capturing():  # no time to free memory
            raise
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # nor while another thread captures
            raise error from None
    return operation(*arguments, **named)
