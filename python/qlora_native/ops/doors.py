"""Which of an operation's two doors a call takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import Function, forward_ad

from qlora_native.ops.storage import PLAIN_TYPES

is_dead_tensor_wrapper = torch._C._functorch.is_dead_tensor_wrapper


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call must go through `torch.ops.qlora_native`, to be traced or intercepted.

    True when compiling or tracing, under a dispatch mode or a functorch transform, for tensor
    subclasses, for what has leaked out of a transform, and on the meta device. Otherwise the direct
    door gives the same result without the dispatcher's cost: measured on 64 × 64 layers,
    forward + backward, 67 µs of NF4Linear's 117 and 127 of LoRALinear's 210.

    Raises NotImplementedError while forward-mode derivatives are taken (torch.func.jvp, jacfwd):
    an operator of torch.library would drop the tangent without a word.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    is_intercepted = _len_torch_dispatch_stack() or _are_functorch_transforms_active()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN_TYPES or tensor.is_meta or is_dead_tensor_wrapper(tensor)
        ):
            is_intercepted = True
    if is_intercepted and forward_ad._current_level >= 0:
        raise NotImplementedError(
            "qlora_native has no forward-mode derivatives (torch.func.jvp, jacfwd, "
            "torch.autograd.forward_ad); use the reverse mode, torch.autograd.grad"
        )
    return bool(is_intercepted)


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """`function.apply` for calls that need no dispatcher.

    That of `Function` asks first what `needs_dispatcher` has: whether a functorch transform is
    active or an argument a dead wrapper. Its base's is what it then calls; 2 µs less.
    """
    apply: Callable[..., Any] = super(Function, function).apply
    return apply


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a plain eager call must go through its `autograd.Function`.

    True where a gradient is to be recorded; and while forward-mode derivatives are taken, which the
    Function refuses.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 (any() of a generator costs as much as all else here)
        if tensor is not None and tensor.requires_grad:
            return True
    return False
