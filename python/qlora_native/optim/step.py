"""One step: calls of the core, each for the parameters of a group with state in the same pages."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qlora_native import _core
from qlora_native.ops.storage import PLAIN_TYPES, execution, run_core
from qlora_native.optim.gradients import check_gradient, check_steppable, in_core
from qlora_native.optim.state_pages import Slot
from qlora_native.sharding import local_part, shard_index

_GOLDEN = 0x9E3779B97F4A7C15  # spreads the parts of a sharded parameter over the seeds


class Scaling(NamedTuple):
    """What a GradScaler has set on the optimiser that it steps; each a tensor of one element."""

    grad_scale: Tensor | None  # the gradients are divided by it
    found_inf: Tensor | None  # not zero: the step does nothing


class Stepped(NamedTuple):
    """A parameter that a step updates."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    slot: Slot


class Call(NamedTuple):
    """A call of the core, checked, with the tensors that it reads and writes."""

    step: _core.PagedStep
    device: torch.device
    kept: list[Any]  # memory that the call needs and nobody else may keep
    written: list[Tensor]  # parameters that it writes
    copies: list[tuple[Tensor, Tensor]]  # parameters that it steps as a copy, and the copies


def make_calls(name: str, stepped: list[Stepped], scaling: Scaling) -> list[Call]:
    """The calls that a step makes, all checked: one a group, as a rule.

    Raises ValueError or NotImplementedError, naming what is wrong.
    """
    batches: dict[tuple[int, _core.PagedState, int], list[Stepped]] = defaultdict(list)
    for one in stepped:
        part = shard_index(one.param) if one.group["stochastic_rounding"] else 0
        batches[id(one.group), one.slot.pages, part].append(one)
    try:
        return [_make_call(name, batch, part, scaling) for (_, _, part), batch in batches.items()]
    except ValueError:
        for one in stepped:  # the core does not know parameters by these names
            _explain(name, one)
        raise


def run_calls(calls: list[Call]) -> None:
    """Run them, one after the other, on the current stream of each one's device."""
    for call in calls:
        run_core(call.step.run, *execution(torch.empty(0, device=call.device)))
        for param, stepped in call.copies:
            param.copy_(stepped)
        if call.written:
            increment_version(call.written)  # autograd sees the write, as of any in-place one


def _make_call(name: str, batch: list[Stepped], part: int, scaling: Scaling) -> Call:
    batch.sort(key=lambda one: one.slot.first_element)
    group, device = batch[0].group, batch[0].slot.device
    params, grads = [], []
    written: list[Tensor] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for one in batch:
        param, grad = one.param, one.grad
        if type(param) not in PLAIN_TYPES or type(grad) not in PLAIN_TYPES or grad.is_sparse:
            _explain(name, one)  # before their memory is asked for
        dense, grad = in_core(param, grad)
        params.append(dense)
        grads.append(grad)
        local = local_part(param)
        if dense is local:
            written.append(local)
        else:
            copies.append((local, dense))
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    reads_lr = device.type == "cuda" and isinstance(lr, Tensor) and lr.is_cuda
    numbers = {
        "lr_tensor": _on_device(lr, device) if reads_lr else None,
        "grad_scale": _on_device(scaling.grad_scale, device),
        "found_inf": _on_device(scaling.found_inf, device),
    }
    seed = group["rounding_seed"] if group["stochastic_rounding"] else None
    step = _core.PagedStep(
        batch[0].slot.pages,
        params,
        grads,
        [one.slot.views["step"] for one in batch],
        [one.slot.first_element for one in batch],
        [one.slot.number for one in batch],
        lr=0.0 if reads_lr else float(lr),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group.get("eps", 0.0)),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
        rounding_seed=None if seed is None else (seed + part * _GOLDEN) % 2**64,
        **numbers,
    )
    return Call(step, device, [params, grads, numbers], written, copies)


def _on_device(number: Tensor | None, device: torch.device) -> Tensor | None:
    """As the core reads it. Only a copy to a GPU may be under way when this returns."""
    if number is None:
        return None
    return local_part(number).detach().to(device, torch.float32, non_blocking=device.type == "cuda")


def _explain(name: str, one: Stepped) -> None:
    """Raise a ValueError that says what is wrong with a parameter, if it is this one."""
    check_steppable(name, one.param)
    check_gradient(name, one.param, one.grad)
    device = local_part(one.param).device
    if device != one.slot.device:
        raise ValueError(
            f"{name}: parameter {one.slot.number} was on {one.slot.device} when its state was "
            f"made, and is on {device} now; move parameters before the optimiser's first step"
        )
    if local_part(one.grad).device != device:
        raise ValueError(
            f"{name}: the gradient of parameter {one.slot.number} is on {one.grad.device}, "
            f"its parameter on {device}"
        )
