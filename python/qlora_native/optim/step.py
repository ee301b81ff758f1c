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
from qlora_native.sharding import is_sharded, local_part, shard_index

_PLAIN = frozenset(PLAIN_TYPES)


class Scaling(NamedTuple):
    """What a GradScaler has set on the optimiser that it steps; each a tensor of one element."""

    grad_scale: Tensor | None  # the gradients are divided by it
    found_inf: Tensor | None  # not zero: the step does nothing


class Batch(NamedTuple):
    """Parameters of a group that a step updates, with state in the same pages: lists as long."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    slots: list[Slot]


class Call(NamedTuple):
    """A call of the core, checked, with the tensors that it reads and writes."""

    step: _core.PagedStep
    slots: list[Slot]
    kept: list[Any]  # memory that the call needs and nobody else may keep; parameters first
    written: list[Tensor]  # parameters that it writes
    copies: list[tuple[Tensor, Tensor]]  # parameters that it steps as a copy, and the copies


def make_calls(name: str, batches: list[Batch], scaling: Scaling) -> list[Call]:
    """The calls that a step makes, all checked: one for each batch, as a rule.

    Raises ValueError or NotImplementedError, naming what is wrong.
    """
    calls = []
    for batch in batches:
        try:
            calls += [_make_call(name, part, scaling) for part in _parts(batch)]
        except ValueError:
            if len(set(map(id, batch.params))) < len(batch.params):
                raise ValueError(f"{name}: a parameter is in a group twice") from None
            for one in zip(batch.params, batch.grads, batch.slots, strict=True):
                _explain(name, *one)  # the core does not know parameters by these names
            raise
    return calls


def prepare_calls(calls: list[Call]) -> None:
    """Take the memory that they need, on the current stream of each one's device, or none."""
    try:
        for call in calls:
            run_core(call.step.prepare, *execution(call.kept[0][0]))
    except BaseException:
        calls.clear()  # a traceback would keep what was taken
        raise


def run_calls(calls: list[Call]) -> None:
    """Run them, one after the other. After an error `calls` are those that have not run.

    That a page file could not be written is told when a step is done: that error comes last.
    """
    of_files: OSError | None = None
    while calls:
        call = calls[0]
        try:
            call.step.run()
        except OSError as error:
            of_files = of_files or error
        for param, stepped in call.copies:
            param.copy_(stepped)
        if call.written:
            increment_version(call.written)  # autograd sees the write, as of any in-place one
        calls.pop(0)
    if of_files is not None:
        raise of_files


def _parts(batch: Batch) -> list[Batch]:
    """The batch, in the order of its pages; apart what has another seed of its own."""
    slots = batch.slots
    places = [slot.first_element for slot in slots]
    if places != sorted(places):
        order = sorted(range(len(places)), key=places.__getitem__)
        batch = Batch(batch.group, *([values[i] for i in order] for values in batch[1:]))
    if not batch.group["stochastic_rounding"] or not any(map(is_sharded, batch.params)):
        return [batch]
    by_shard: dict[int, list[int]] = defaultdict(list)
    for i, param in enumerate(batch.params):
        by_shard[shard_index(param)].append(i)
    return [
        Batch(
            {**batch.group, "rounding_seed": _seed_of_shard(batch.group["rounding_seed"], shard)},
            *([values[i] for i in members] for values in batch[1:]),
        )
        for shard, members in by_shard.items()
    ]


def _seed_of_shard(seed: int, shard: int) -> int:
    golden = 0x9E3779B97F4A7C15  # odd, and far from all that users take for seeds
    return (seed + shard * golden) % 2**64


def _make_call(name: str, batch: Batch, scaling: Scaling) -> Call:
    group, slots = batch.group, batch.slots
    device = slots[0].device
    params, grads = batch.params, batch.grads
    written, copies = params, []
    if not _are_in_core(params, grads):
        params, grads, written = [], [], []
        for param, grad, slot in zip(batch.params, batch.grads, slots, strict=True):
            local, dense, dense_grad = param, param, grad
            if not _are_in_core([param], [grad]):
                _explain(name, param, grad, slot)  # before their memory is asked for
                local = local_part(param)
                dense, dense_grad = in_core(param, grad)
            params.append(dense)
            grads.append(dense_grad)
            if dense is not local:
                copies.append((local, dense))
            elif local is not param:
                written.append(local)
            written.append(param)
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    reads_lr = device.type == "cuda" and isinstance(lr, Tensor) and lr.is_cuda
    numbers = {
        "lr_tensor": _on_device(lr, device) if reads_lr else None,
        "grad_scale": _on_device(scaling.grad_scale, device),
        "found_inf": _on_device(scaling.found_inf, device),
    }
    step = _core.PagedStep(
        slots[0].pages,
        params,
        grads,
        [slot.views["step"] for slot in slots],
        [slot.first_element for slot in slots],
        [slot.number for slot in slots],
        lr=0.0 if reads_lr else float(lr),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group.get("eps", 0.0)),
        weight_decay=float(group["weight_decay"]),
        maximize=bool(group["maximize"]),
        rounding_seed=group["rounding_seed"] if group["stochastic_rounding"] else None,
        **numbers,
    )
    return Call(step, slots, [params, grads, numbers], written, copies)


def _on_device(number: Tensor | None, device: torch.device) -> Tensor | None:
    """As the core reads it. Only a copy to a GPU may be under way when this returns."""
    if number is None:
        return None
    return local_part(number).detach().to(device, torch.float32, non_blocking=device.type == "cuda")


def _are_in_core(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether the core can read all of them as they are."""
    # A line for each tensor would take as long as the rest of a step on small ones.
    return (
        _PLAIN.issuperset(map(type, params))
        and _PLAIN.issuperset(map(type, grads))
        and all(grad.layout is torch.strided for grad in grads)
        and all(map(Tensor.is_contiguous, params))
        and all(map(Tensor.is_contiguous, grads))
        and not any(map(Tensor.is_neg, params))
        and not any(map(Tensor.is_neg, grads))
    )


def _explain(name: str, param: Tensor, grad: Tensor, slot: Slot) -> None:
    """Raise a ValueError that says what is wrong with a parameter, if it is this one."""
    check_steppable(name, param)
    check_gradient(name, param, grad)
    device = local_part(param).device
    if device != slot.device:
        raise ValueError(
            f"{name}: parameter {slot.number} was on {slot.device} when its state was "
            f"made, and is on {device} now; move parameters before the optimiser's first step"
        )
    if local_part(grad).device != device:
        raise ValueError(
            f"{name}: the gradient of parameter {slot.number} is on {grad.device}, "
            f"its parameter on {device}"
        )
