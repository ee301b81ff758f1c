"""Wrapping functions of PEFT: their parameters are checked first, and each is wrapped once."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import peft

Function = Callable[..., Any]


def checked(owner: Any, name: str, parameters: Sequence[str]) -> Function:
    """`owner.name`, a function that has these parameters.

    Raises ImportError, which says what PEFT lacks, where it is not there or has other parameters.
    """
    function = getattr(owner, name, None)
    if callable(function):
        found = inspect.signature(function).parameters
        if all(parameter in found for parameter in parameters):
            return function
        problem = f"has the parameters {', '.join(found)}"
    else:
        problem = "does not exist"
    raise ImportError(
        f"qlora_native.hf: {_name_of(owner)}.{name} of PEFT {peft.__version__} {problem}, want "
        f"{', '.join(parameters)}; peft 0.21 is what this was made for"
    )


def wrap(
    owner: Any, name: str, parameters: Sequence[str], make: Callable[[Function], Function]
) -> None:
    """Put `make(original)` in the place of `owner.name`, a module's function or a class's method.

    Doing it again with the same `make` changes nothing. Raises ImportError where the original has
    not these parameters.
    """
    original = checked(owner, name, parameters)
    if make in _makers_of(original):
        return
    plain = getattr(original, "__func__", original)
    wrapper: Any = functools.wraps(plain)(make(plain))
    wrapper._made_by = make
    if inspect.ismethod(original):
        wrapper = classmethod(wrapper)
    elif isinstance(inspect.getattr_static(owner, name), staticmethod):
        wrapper = staticmethod(wrapper)
    setattr(owner, name, wrapper)


def wrap_everywhere(
    owner: Any, name: str, parameters: Sequence[str], make: Callable[[Function], Function]
) -> None:
    """`wrap` a module's function, and put it too where it has been imported by name already."""
    original = checked(owner, name, parameters)
    wrap(owner, name, parameters, make)
    wrapper = getattr(owner, name)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, wrapper)


def _makers_of(function: Any) -> list[Any]:
    """What has wrapped `function` already, from the outermost in."""
    makers = []
    while function is not None:
        makers.append(vars(function).get("_made_by"))
        function = getattr(function, "__wrapped__", None)
    return makers


def _name_of(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"
