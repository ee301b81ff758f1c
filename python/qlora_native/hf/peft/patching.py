"""Wrapping functions of PEFT: their parameters are checked first, and each is wrapped once."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import peft

_MARK = "_wrapped_by_qlora_native"

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

    A class gets an attribute of its own where it has inherited the method. Doing it again changes
    nothing. Raises ImportError where the original has not these parameters.
    """
    original = checked(owner, name, parameters)
    if vars(owner).get(name) is not None and hasattr(_plain(vars(owner)[name]), _MARK):
        return
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    is_classmethod = inspect.ismethod(original)
    plain = _plain(original)
    wrapper: Any = functools.wraps(plain)(make(plain))
    setattr(wrapper, _MARK, True)
    if is_static:
        wrapper = staticmethod(wrapper)
    setattr(owner, name, classmethod(wrapper) if is_classmethod else wrapper)


def wrap_everywhere(
    owner: Any, name: str, parameters: Sequence[str], make: Callable[[Function], Function]
) -> None:
    """`wrap` a module's function, and put it too where PEFT's modules have imported it by name."""
    original = checked(owner, name, parameters)
    wrap(owner, name, parameters, make)
    wrapper = getattr(owner, name)
    for module_name, module in list(sys.modules.items()):
        is_pefts = module_name == "peft" or module_name.startswith("peft.")
        if is_pefts and vars(module).get(name) is original:
            setattr(module, name, wrapper)


def _plain(function: Any) -> Any:
    """The function of a classmethod or of a bound method."""
    return getattr(function, "__func__", function)


def _name_of(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"
