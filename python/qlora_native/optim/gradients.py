"""What a step asks of parameters and gradients, and how the core reads them."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora_native.ops.storage import FLOAT_DTYPES, PLAIN_TYPES, in_memory
from qlora_native.sharding import as_placed, describe, is_sharded, local_part


def check_steppable(name: str, param: Tensor) -> None:
    """Raise NotImplementedError unless the core can step what is in the parameter's memory."""
    if param.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"{name}: a parameter is on {param.device}, where there is no such step; "
            "want cpu or cuda"
        )
    if type(param) in PLAIN_TYPES:
        return
    # The core takes addresses: of a tensor subclass it must be known what is there.
    which = f"{name}: a parameter is a {type(param).__name__}"
    if isinstance(param, FakeTensor):
        raise NotImplementedError(f"{which}, which has no memory to step")
    if is_traceable_wrapper_subclass(param) and not is_sharded(param):
        raise NotImplementedError(f"{which}, a tensor made of other tensors: want a plain one")
    if is_sharded(param) and any(p.is_partial() for p in param.placements):
        raise NotImplementedError(f"{which} with a sum pending ({param.placements})")


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Raise ValueError unless the gradient fits its parameter."""
    if grad.layout is not torch.strided:
        raise ValueError(f"{name}: a gradient is sparse ({grad.layout}), want a dense one")
    if param.dtype not in FLOAT_DTYPES or grad.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: a parameter is {param.dtype} and its gradient {grad.dtype}, "
            f"want one of {FLOAT_DTYPES}"
        )
    if any(n > 1 and step == 0 for n, step in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name}: elements of a parameter share memory (shape {list(param.shape)}, strides "
            f"{param.stride()}), so that they cannot be stepped apart"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{name}: a gradient has shape {list(grad.shape)}, its parameter {list(param.shape)}"
        )
    if is_sharded(grad) != is_sharded(param) or (
        is_sharded(param) and grad.device_mesh != param.device_mesh
    ):
        raise ValueError(
            f"{name}: a gradient {describe(grad)}, its parameter {describe(param)}; "
            "want both over one mesh, or neither"
        )


def in_core(param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter and its gradient as plain contiguous memory of this rank.

    Where a parameter is not, it is a copy, to be written back. If the gradient is placed otherwise
    than the parameter, this is a collective.
    """
    return in_memory(local_part(param)), in_memory(local_part(as_placed(grad, param)))
