"""Which of an operation's two doors a call takes."""

import torch
from torch import Tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must go through `torch.ops.qlora_native`, to be traced or intercepted.

    True when compiling or tracing, under a dispatch mode or a functorch transform, for tensor
    subclasses and on the meta device. Otherwise the direct door gives the same result without the
    dispatcher's cost (about 50 µs, forward + backward).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    return any(
        tensor is not None and (type(tensor) not in _PLAIN_TYPES or tensor.is_meta)
        for tensor in tensors
    )
