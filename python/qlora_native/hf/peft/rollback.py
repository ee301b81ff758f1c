"""A model that is as it was if something fails on the way."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module, overwritten: Iterable[Tensor] = ()) -> Iterator[None]:
    """If what is done inside raises, take back what it did to the modules of `model`.

    PEFT replaces layers one after another and loads weights into them afterwards, so that an error
    leaves a model that is neither the one nor the other. What comes back: the class, submodules,
    parameters, buffers and other attributes of every module, one level deep; the config's;
    `requires_grad`; and the memory of a parameter whose `.data` was replaced. Numbers that were
    changed in place stay changed, but for those of the tensors `overwritten`, which are copied.
    """
    owners: list[Any] = list(model.modules())
    config = getattr(model, "config", None)
    if hasattr(config, "__dict__"):
        owners.append(config)
    attributes = [(owner, type(owner), dict(vars(owner))) for owner in owners]
    containers = [
        (value, value.copy())
        for *_, saved in attributes
        for value in saved.values()
        if isinstance(value, _CONTAINERS)
    ]
    parameters = [(p, p.requires_grad, p.data) for p in model.parameters()]
    copies = [(tensor, tensor.detach().clone()) for tensor in overwritten]
    try:
        yield
    except BaseException:
        for owner, kind, saved in attributes:
            if type(owner) is not kind:
                owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(saved)
        for container, contents in containers:
            container.clear()
            container.extend(contents) if isinstance(container, list) else container.update(
                contents
            )
        for parameter, requires_grad, data in parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)
        raise
