"""One step of AdamW: lists of parameters that the core steps in one call each."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora_native import _core
from qlora_native.ops.storage import FLOAT_DTYPES, PLAIN_TYPES, execution, in_memory, run_core
from qlora_native.optim.adamw_state import STATE_8BIT, STATE_32BIT, has_8bit_state, new_state
from qlora_native.sharding import as_placed, describe, is_sharded, local_part

_CPU = torch.device("cpu")
_States = Mapping[Tensor, dict[str, Any]]


class Scaling(NamedTuple):
    """What a GradScaler has set on the optimiser that it steps; each a tensor of one element."""

    grad_scale: Tensor | None  # the gradients are divided by it
    found_inf: Tensor | None  # not zero: the step does nothing


class Batch(NamedTuple):
    """Parameters that one call of the core steps: of one device, kind of state and step count."""

    group: dict[str, Any]
    params: list[Tensor]
    is_8bit: bool
    steps_done: int | None  # None: the core counts, in each parameter's state


def make_batches(
    name: str,
    group: dict[str, Any],
    states: _States,
    keeps_8bit_state: Callable[[Tensor], bool],
    scaling: Scaling,
) -> list[Batch]:
    """The parameters of a group that have a gradient, checked: one batch, as a rule."""
    core_counts = group["capturable"] or scaling.found_inf is not None
    batches: dict[tuple[torch.device, bool, int | None], list[Tensor]] = defaultdict(list)
    for param in group["params"]:
        if param.grad is None:
            continue
        state = states.get(param)
        is_8bit = has_8bit_state(state) if state else keeps_8bit_state(param)
        if param.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                f"{name}: a parameter is on {param.device}, where there is no such step; "
                "want cpu or cuda"
            )
        _check_gradient(name, param, param.grad)
        _check_memory(name, param, is_8bit)
        steps_done = None if core_counts else _steps_done(state)
        batches[param.device, is_8bit, steps_done].append(param)
    return [
        Batch(group, params, is_8bit, steps_done)
        for (_, is_8bit, steps_done), params in batches.items()
    ]


def check_capture(name: str, batches: list[Batch], states: _States) -> None:
    """Raise RuntimeError where a CUDA graph is recorded that would repeat this step wrongly."""
    on_cuda = [batch for batch in batches if batch.params[0].is_cuda]
    if not on_cuda or not torch.cuda.is_current_stream_capturing():
        return
    for batch in on_cuda:
        for param in batch.params:
            state = states.get(param)
            if not state:
                raise RuntimeError(
                    f"{name}: a CUDA graph is captured, and a parameter has no state yet, which "
                    "every replay would reset; take a step before the capture"
                )
            if batch.steps_done is not None or not state["step"].is_cuda:
                raise RuntimeError(
                    f"{name}: a CUDA graph is captured, but the steps are counted on the host, "
                    "where a replay does not count; want capturable=True"
                )


def run_batch(batch: Batch, states: _States, scaling: Scaling) -> None:
    """Step the parameters of a batch, and make the state of those that have none."""
    group, params, is_8bit, steps_done = batch
    device = params[0].device
    for param in params:
        if not states[param]:
            step_device = _CPU if steps_done is not None else device
            states[param].update(new_state(param, is_8bit, step_device))
        elif steps_done is None:
            states[param]["step"] = states[param]["step"].to(device)  # stays there
    of_params = [states[param] for param in params]
    steps = [state["step"] for state in of_params]
    local = [local_part(param) for param in params]
    # The core wants plain memory; a parameter that is not is stepped as a copy.
    dense = [in_memory(param) for param in local]
    grads = [in_memory(local_part(as_placed(param.grad, param))) for param in params]
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    reads_lr = device.type == "cuda" and isinstance(lr, Tensor) and lr.is_cuda
    num_threads, stream = execution(dense[0])
    core_step = _core.adamw8bit_step if is_8bit else _core.adamw_step
    run_core(
        core_step,
        dense,
        grads,
        *(
            [local_part(state[name]) for state in of_params]
            for name in (STATE_8BIT if is_8bit else STATE_32BIT)
        ),
        step_counts=steps if steps_done is None else [],
        lr=0.0 if reads_lr else float(lr),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        step=1 if steps_done is None else steps_done + 1,
        maximize=bool(group["maximize"]),
        lr_tensor=_on_device(lr, device) if reads_lr else None,
        grad_scale=_on_device(scaling.grad_scale, device),
        found_inf=_on_device(scaling.found_inf, device),
        num_threads=num_threads,
        stream=stream,
    )
    for param, stepped in zip(local, dense, strict=True):
        if stepped is not param:
            param.copy_(stepped)
        else:
            increment_version(param)  # so that autograd sees the write, as of any in-place one
    if steps_done is not None:
        torch._foreach_add_(steps, 1)


def _steps_done(state: dict[str, Any] | None) -> int | None:
    if not state:
        return 0
    return None if state["step"].is_cuda else int(state["step"])


def _on_device(number: Tensor | None, device: torch.device) -> Tensor | None:
    """As the core reads it. Only a copy to a GPU may be under way when this returns."""
    if number is None:
        return None
    return local_part(number).detach().to(device, torch.float32, non_blocking=device.type == "cuda")


def _check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise ValueError(f"{name}: a gradient is sparse ({grad.layout}), want a dense one")
    if param.dtype not in FLOAT_DTYPES or grad.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name}: a parameter is {param.dtype} and its gradient {grad.dtype}, "
            f"want one of {FLOAT_DTYPES}"
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


def _check_memory(name: str, param: Tensor, is_8bit: bool) -> None:
    """The core takes addresses: of a tensor subclass it must be known what is there."""
    if type(param) in PLAIN_TYPES:
        return
    which = f"{name}: a parameter is a {type(param).__name__}"
    if isinstance(param, FakeTensor):
        raise NotImplementedError(f"{which}, which has no memory to step")
    if is_traceable_wrapper_subclass(param) and not is_sharded(param):
        raise NotImplementedError(f"{which}, a tensor made of other tensors: want a plain one")
    if is_sharded(param) and any(p.is_partial() for p in param.placements):
        raise NotImplementedError(f"{which} with a sum pending ({param.placements})")
    if is_8bit and is_sharded(param):
        raise NotImplementedError(
            f"{which}; sharded parameters have no 8-bit state yet: use PagedAdamW"
        )
