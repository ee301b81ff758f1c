"""Which adapter does which rows: `set_lora`, and what a layer remembers of it."""

import inspect
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_native.ops.lora import LoRAFactors
from qlora_native.ops.lora_groups import LoRAGroup

BASE = "__base__"  # in place of an adapter's name: none, as in PEFT

# One adapter for all rows, one (or BASE) for each element of a batch, or the base alone.
Names: TypeAlias = str | tuple[str, ...] | None

# What `set_lora` asks with the model and the names before it changes anything; each may raise.
set_lora_checks: list[Callable[[nn.Module, Names], None]] = []

_REMEMBERED_CHANGES = 64


def set_lora(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Say which adapter every LoRA layer of `model` applies, from now until the next call.

    It is in force for forward and for backward, and for what gradient checkpointing computes again.
    It does not change which parameters require a gradient; only adapters in force get one. A layer
    that has no adapter of a name applies its base to those rows.

    Args:
        model: any module with LoRA layers, this library's own or PEFT's on an NF4 base.
        names: an adapter's name, for all rows; a list of names, one for each element of the first
            dimension of a layer's input, `"__base__"` for none (a call with another number of
            elements raises ValueError); or None for the base alone.

    Raises:
        ValueError: the model has no LoRA layer, none of its layers has an adapter of a name (the
            message lists those that exist), an adapter is merged (`merge_lora` with `reversible`),
            or the model has layers of PEFT that would do otherwise (its own, beside those on an NF4
            base, go by `set_adapter` alone). What was in force stays so.

    Checkpointing computes a forward again inside its backward. If another routing is in force then
    than was at the forward, the layer raises RuntimeError: see `Routing.check_recomputation`.
    """
    layers = list(routed_layers(model))
    if not layers:
        raise ValueError("set_lora: the model has no LoRA layer")
    wanted: Names = names if names is None or isinstance(names, str) else tuple(names)
    check_names("set_lora", wanted, {name for layer in layers for name in layer.lora_names()})
    for layer in layers:
        layer.check_unmerged("set_lora")
    for check in set_lora_checks:
        check(model, wanted)
    moment = _Moment.now()
    for layer in layers:
        layer.routing.change(None if wanted == BASE else wanted, moment)


def check_names(operation: str, names: Names, existing: Collection[str]) -> None:
    """Raise ValueError unless each of `names` is BASE or among `existing`."""
    each = () if names is None else (names,) if isinstance(names, str) else names
    for name in each:
        if not isinstance(name, str):
            raise ValueError(f"{operation}: a name is {name!r}, want a string")
    check_exist(operation, set(each) - {BASE}, existing)


def check_exist(operation: str, names: Collection[str], existing: Collection[str]) -> None:
    """Raise ValueError unless there is an adapter of each name."""
    if unknown := sorted(set(names) - set(existing)):
        raise ValueError(
            f"{operation}: there is no adapter {', '.join(map(repr, unknown))}; there are: "
            + (", ".join(map(repr, sorted(existing))) or "none")
        )


class RoutedLayer:
    """What `set_lora` looks for: a mixin of modules that have adapters.

    A layer sets `self.routing = Routing()` in its constructor, reads `routing.names` at each call,
    and calls `routing.check_recomputation()` before that.
    """

    routing: "Routing"

    def lora_names(self) -> Collection[str]:
        """The names of the adapters that this layer has."""
        raise NotImplementedError

    def check_unmerged(self, operation: str) -> None:
        """Raise ValueError if a merged weight does all, whatever the adapters are."""


def routed_layers(model: nn.Module) -> Iterator[RoutedLayer]:
    """Every layer of `model` that `set_lora` speaks to."""
    return (module for module in model.modules() if isinstance(module, RoutedLayer))


class _Moment(NamedTuple):
    """When a call of `set_lora` was."""

    next_node: int  # the number that the next node of autograd's graph gets
    node_in_backward: int | None  # the number of the node that backward is at, if it is running
    in_checkpoint: bool  # a non-reentrant checkpoint's function was running, in its forward

    @classmethod
    def now(cls) -> "_Moment":
        return cls(
            torch.autograd._get_sequence_nr(), _number_of_node_in_backward(), _is_in_checkpoint()
        )


class _Period(NamedTuple):
    """What was in force for nodes with numbers below `end`."""

    end: int
    names: Names
    began_in_checkpoint: bool


class Routing:
    """What is in force in one layer, and what was when a node of autograd's graph was made.

    Autograd numbers its nodes in the order in which a thread makes them. With each change the
    number that the next node will have is kept: a node tells by its own what was in force then.
    """

    def __init__(self, names: Names = None) -> None:
        self.names = names
        self._began_in_checkpoint = False
        self._changed_in_node: int | None = None
        self._past: deque[_Period] = deque(maxlen=_REMEMBERED_CHANGES)  # oldest first
        self._forgot_changes = False
        self.has_changed = False
        # A tensor, since a graph would hold a number as a constant, and be good for one layer.
        number = next(_numbers)
        self._key = torch.tensor(number, device="cpu")
        _routings[number] = self

    def __deepcopy__(self, memo: dict[int, object]) -> "Routing":
        """A copy has no graph yet, so nothing was ever otherwise."""
        return Routing(self.names)

    def __reduce__(self) -> tuple[type["Routing"], tuple[Names]]:
        return Routing, (self.names,)

    def change(self, names: Names, moment: _Moment | None = None) -> None:
        """Put `names` in force, now or at a moment just taken."""
        moment = _Moment.now() if moment is None else moment
        self._changed_in_node = moment.node_in_backward
        if names == self.names and moment.in_checkpoint >= self._began_in_checkpoint:
            return
        self._forgot_changes |= len(self._past) == _REMEMBERED_CHANGES
        self._past.append(_Period(moment.next_node, self.names, self._began_in_checkpoint))
        self.names = names
        self.has_changed = True
        self._began_in_checkpoint = moment.in_checkpoint

    def check_recomputation(self) -> None:
        """Raise RuntimeError if a forward is computed again under another routing than its own.

        Call it at each forward. It does nothing outside a backward. Inside one a forward is a
        recomputation of gradient checkpointing, reentrant or not, and the node that backward is at
        was made by the forward that is computed again, or just before it: what was in force then
        must be so now. A recomputation that calls `set_lora` itself, as its forward did, passes.

        What it cannot see: a `set_lora` called in another thread than the forward's, since each
        thread has numbers of its own. While a graph is compiled it does nothing: see `checked`.
        """
        if torch.compiler.is_compiling():
            return
        node = _number_of_node_in_backward()
        if node is None or node == self._changed_in_node:
            return
        if self._forgot_changes and node < self._past[0].end:
            raise RuntimeError(
                f"set_lora was called with other names more than {_REMEMBERED_CHANGES} times "
                "between a forward and its backward under gradient checkpointing: what was in "
                "force at the forward is no longer known"
            )
        now = _Period(node + 1, self.names, self._began_in_checkpoint)
        then = next((period for period in self._past if node < period.end), now)
        if then.began_in_checkpoint:
            # The node may be of what ran after that set_lora, and this layer of what ran before.
            raise RuntimeError(
                "gradient checkpointing computes a forward again, and what was in force at it is "
                f"not known: set_lora put {then.names!r} in force inside a checkpointed function, "
                "after a layer of it had run or without setting it back after the checkpoint. "
                "Call set_lora first in the function, and again after the checkpoint"
            )
        if then.names != self.names:
            raise RuntimeError(
                "gradient checkpointing computes a forward again under another routing: set_lora "
                f"had put {then.names!r} in force at the forward, now it is {self.names!r}. Call "
                f"set_lora(model, {then.names!r}) before backward"
            )

    def checked(self, y: Tensor) -> Tensor:
        """The result of a layer; where a graph is compiled, one that does `check_recomputation`.

        A graph holds its routing, and which graph runs is decided anew when a checkpoint around it
        computes it again: the check has to be a part of it. It multiplies y by a one that an
        operator makes after the check.
        """
        if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return y
        return y * torch.ops.qlora_native.check_recomputation(self._key)


_numbers = itertools.count()
_routings: WeakValueDictionary[int, Routing] = WeakValueDictionary()


@torch.library.custom_op(
    "qlora_native::check_recomputation", mutates_args=(), schema="(Tensor key) -> Tensor"
)
def _check_recomputation_op(key: Tensor) -> Tensor:
    in_this_process = _routings.get(int(key.item()))
    if in_this_process is not None:
        in_this_process.check_recomputation()
    return torch.ones((), dtype=torch.float32, device="cpu")


@_check_recomputation_op.register_fake
def _(key: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=key.device)


def _number_of_node_in_backward() -> int | None:
    """The sequence number of the node at which this thread's backward is; None outside of one."""
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


_CHECKPOINT = inspect.unwrap(checkpoint).__code__


def _is_in_checkpoint() -> bool:
    """Whether the function of a non-reentrant checkpoint is running, in its forward.

    (The reentrant kind's forward runs without gradients, and its node is made before.)
    """
    frame = sys._getframe() if torch.is_grad_enabled() else None
    while frame is not None and frame.f_code is not _CHECKPOINT:
        frame = frame.f_back
    return frame is not None


def groups_of_batch(
    names: Sequence[str], x: Tensor, factors: Mapping[str, LoRAFactors]
) -> list[LoRAGroup]:
    """The rows of x[batch, ..., k] that each adapter does, one name to an element of the batch.

    Neighbours of one name make one group. Rows of a name that `factors` has not, as BASE, are in no
    group: the base does them alone. Where an adapter with dropout has several groups, each has a
    seed of its own.

    Raises ValueError where x has another number of elements than there are names.
    """
    rows = rows_of_each_element(names, x)
    groups: list[LoRAGroup] = []
    begin = 0
    seen: set[str] = set()
    for name, neighbours in groupby(names):
        end = begin + rows * sum(1 for _ in neighbours)
        factors_here = factors.get(name)
        if factors_here is not None:
            if name in seen and factors_here.seed is not None:
                factors_here = factors_here._replace(seed=factors_here.seed + len(groups))
            groups.append(LoRAGroup(begin, end, factors_here))
            seen.add(name)
        begin = end
    return groups


def rows_of_each_element(names: Sequence[str], x: Tensor) -> int:
    """How many rows of x.reshape(-1, k) an element of the batch x[batch, ..., k] has."""
    if x.dim() < 2 or x.shape[0] != len(names):
        raise ValueError(
            f"set_lora: {len(names)} names are in force, one for each element of a batch, but a "
            f"layer's input has shape {list(x.shape)}: want [{len(names)}, ..., k]"
        )
    return math.prod(x.shape[1:-1])
