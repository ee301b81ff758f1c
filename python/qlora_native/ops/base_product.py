"""Products with a frozen base weight, NF4 or dense, without autograd.

By the core's own kernels, or by torch's GEMM on the weight dequantised into a workspace:
kernel_choice.py says when. A GEMM of torch follows torch's settings: `allow_tf32`, and for 16 bits
`allow_bf16_reduced_precision_reduction` and its like, which let cuBLAS round partial sums. They are
left as the user has them, so that a 4-bit layer adds as the 16-bit layer beside it does; and they
belong to the process, where changing them around a call would race with other threads.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_native import _core
from qlora_native.ops.kernel_choice import prefers_native
from qlora_native.ops.storage import NF4Tensors, execution, in_memory, run_core

BaseWeight: TypeAlias = NF4Tensors | Tensor


def base_forward(x: Tensor, weight: BaseWeight, bias: Tensor | None) -> Tensor:
    """y[..., n] = x[..., k] · Wᵀ + bias, no view."""
    if isinstance(weight, NF4Tensors) and prefers_native(x, weight, "forward"):
        y = x.new_empty(*x.shape[:-1], weight.n)
        bias = None if bias is None else in_memory(bias)
        run_core(_core.nf4_linear, in_memory(x), weight, bias, y, *execution(x))
        return y
    with autocast_disabled(x):
        y = F.linear(rows_of(x), _dense(weight, x.dtype), bias)
    return with_shape(y, *x.shape[:-1], y.shape[-1])


def base_grad_input(dy: Tensor, weight: BaseWeight) -> Tensor:
    """dx[..., k] = dy[..., n] · W, no view."""
    if isinstance(weight, NF4Tensors) and prefers_native(dy, weight, "grad_input"):
        dx = dy.new_empty(*dy.shape[:-1], weight.k)
        run_core(_core.nf4_linear_grad_input, in_memory(dy), weight, dx, *execution(dy))
        return dx
    with autocast_disabled(dy):
        dx = torch.mm(rows_of(dy), _dense(weight, dy.dtype))
    return with_shape(dx, *dy.shape[:-1], dx.shape[-1])


def rows_of(x: Tensor) -> Tensor:
    """x[..., k] as the matrix [m, k]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def with_shape(tensor: Tensor, *shape: int) -> Tensor:
    """A result in its final shape, but not as a view.

    Autograd forbids to write in place to a view that an `autograd.Function` made, and what follows
    a layer may: `nn.ReLU(inplace=True)`.
    """
    if tensor.shape == shape:
        return tensor
    return torch.ops.aten._unsafe_view.default(tensor, shape)


def autocast_disabled(tensor: Tensor) -> AbstractContextManager[object]:
    """Keep autocast out of an implementation: its operands have the compute dtype already."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _dense(weight: BaseWeight, dtype: torch.dtype) -> Tensor:
    """The weight as a dense `[n, k]`: an NF4 one in the workspace, which the next call reuses."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    out = _workspace(weight.n * weight.k, dtype, weight.codes.device).view(weight.n, weight.k)
    run_core(_core.nf4_dequantize, weight, out, *execution(out))
    return out


_workspaces = threading.local()


def _workspace(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `count` elements that this thread's products reuse.

    On a CPU fresh pages cost more than decoding into them: a thread keeps the size of its largest
    layer in each dtype.

    On CUDA torch's caching allocator is the workspace: the next call on the stream gets the same
    block, for about a microsecond, forward and backward alike. One kept here would have to be one
    for each stream, or two streams would write to it at once; would stay allocated while attention
    and the optimiser need the memory; and in a CUDA graph must come from the graph's own pool.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    held: dict[torch.dtype, Tensor] = _workspaces.__dict__
    workspace = held.get(dtype)
    if workspace is None or workspace.numel() < count:
        held.pop(dtype, None)  # or the old and the new would exist at once
        with torch.inference_mode(False):
            workspace = held[dtype] = torch.empty(count, dtype=dtype, device=device)
    return workspace[:count]
