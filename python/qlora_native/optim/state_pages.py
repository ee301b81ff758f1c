"""The state of an optimiser's parameters in the core's pages.

All parameters of a device with state of one kind lie one after another in one `_core.PagedState`,
in the order of the optimiser's groups; small ones share pages. What `optimizer.state` shows are
tensors over that memory.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.ops.storage import execution, run_core
from qlora_native.optim.paging_options import PagingOptions
from qlora_native.optim.state_kind import BLOCK, StateKind, block_count
from qlora_native.sharding import as_shard_of, is_sharded, local_part


class Slot:
    """The place of one parameter's state.

    Attributes:
        views: what `optimizer.state` holds of it: the step count, and a tensor for each plane.
        is_zero: whether the memory is still as it was made, all zeros: no step has had it.
    """

    __slots__ = (
        "device", "first_element", "is_zero", "kind", "number", "pages", "param", "shape", "views",
    )  # fmt: skip

    def __init__(
        self, param: Tensor, kind: StateKind, number: int, pages: _core.PagedState, first: int
    ) -> None:
        self.param = param
        self.device = local_part(param).device
        self.shape = param.shape
        self.kind = kind
        self.number = number
        self.pages = pages
        self.first_element = first
        self.is_zero = True
        self.views: dict[str, Tensor] = {}

    def holds(self, state: Mapping[str, Any] | None) -> bool:
        """Whether a parameter's state is the tensors of this slot, and not others put there."""
        # Asked of every parameter at every step: this runs without a line of Python for each view.
        views = self.views
        if state is None or len(state) < len(views):
            return False
        if len(state) == len(views) and all(map(is_, state.values(), views.values())):
            return True
        return all(map(is_, map(state.get, views), views.values()))

    def fits(self, param: Tensor, kind: StateKind) -> bool:
        """Whether the parameter is as it was when its state was given this place."""
        return (
            param.shape == self.shape
            and local_part(param).device == self.device
            and kind == self.kind
        )

    def clear(self) -> None:
        """Make it the state of a parameter that takes its first step now."""
        self.views["step"].zero_()
        for name in self.kind.planes if not self.is_zero else ():
            local_part(self.views[name]).zero_()
        self.is_zero = False

    def write(self, state: Mapping[str, Any]) -> None:
        """Copy a checked state into the pages."""
        self.is_zero = False
        step = state["step"]
        if isinstance(step, Tensor):
            self.views["step"].copy_(step.reshape(()))
        else:
            self.views["step"].fill_(step)
        for name in self.kind.planes:
            local_part(self.views[name]).copy_(local_part(state[name]))


class StatePages:
    """The pages of an optimiser, and which parameter has which part of them."""

    def __init__(self, options: PagingOptions) -> None:
        self.options = options
        self.slots: dict[int, Slot] = {}  # by the id of the parameter, which a slot keeps
        self.buffers: list[_core.PagedState] = []
        self._owner = os.getpid()

    def get(self, param: Tensor) -> Slot | None:
        """The place of a parameter, if it has one."""
        return self.slots.get(id(param))

    def check_process(self, name: str) -> None:
        """Raise NotImplementedError in a forked child that shares a page file with its parent."""
        if self.options.page_file is not None and os.getpid() != self._owner:
            raise NotImplementedError(
                f"{name}: this process was forked from the one that made the optimiser, whose page "
                "file it would write to"
            )

    def own_copies(self, slot: Slot, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state that is to be written to a slot, with copies of what lies in other slots.

        Those may be written first.
        """
        ours = {
            local_part(view).untyped_storage().data_ptr()
            for other in self.slots.values()
            for view in other.views.values()
        }
        return {
            name: value.clone()
            if isinstance(value, Tensor)
            and value is not slot.views.get(name)
            and local_part(value).untyped_storage().data_ptr() in ours
            else value
            for name, value in state.items()
        }

    def lay_out(
        self, wanted: Iterable[tuple[int, Tensor, StateKind]], live: Iterable[Tensor]
    ) -> None:
        """Give each of the wanted parameters (number, parameter, kind) a place in new pages.

        What the `live` ones have in the old pages is copied. Nothing has changed if this raises.
        """
        by_pages: dict[tuple[torch.device, StateKind], list[tuple[int, Tensor]]]
        by_pages = defaultdict(list)
        for number, param, kind in wanted:
            by_pages[local_part(param).device, kind].append((number, param))
        options = {
            device.type: self.options.of_device(device.type, {other.type for other, _ in by_pages})
            for device, _ in by_pages
        }
        budgets = self._split_budget(by_pages, options)
        slots: dict[int, Slot] = {}
        buffers = []
        for (device, kind), members in by_pages.items():
            pages = _make_pages(device, kind, members, options[device.type], budgets[device, kind])
            buffers.append(pages)
            slots.update(_make_slots(pages, device, kind, members))
        for param in live:
            old, new = self.slots[id(param)], slots[id(param)]
            new.write(old.views)
        self.slots, self.buffers = slots, buffers

    def page_bytes_of(self, kind: StateKind) -> int:
        """Of a page of such state, which the core cuts at what its kernels can.

        Raises ValueError if it can cut none so small.
        """
        page_bytes = self.options.page_bytes
        return _core.PagedState("cpu", kind.rule, kind.is_8bit, 0, page_bytes=page_bytes).page_bytes

    def _split_budget(
        self,
        by_pages: Mapping[tuple[torch.device, StateKind], list[tuple[int, Tensor]]],
        options: Mapping[str, PagingOptions],
    ) -> dict[tuple[torch.device, StateKind], int | None]:
        """resident_bytes for each kind of state on a device: two pages, and a share of the rest.

        With several devices, each has resident_bytes.
        """
        if self.options.resident_bytes is None:
            return dict.fromkeys(by_pages)
        sizes = {
            key: sum(_room_of(param) for _, param in members) * _bytes_per_block(key[1]) // BLOCK
            for key, members in by_pages.items()
        }
        page_bytes = {kind: self.page_bytes_of(kind) for _, kind in by_pages}
        needs = {key: min(size, 2 * page_bytes[key[1]]) for key, size in sizes.items()}
        budgets: dict[tuple[torch.device, StateKind], int | None] = {}
        for device in {device for device, _ in by_pages}:
            keys = [key for key in by_pages if key[0] == device]
            total = options[device.type].resident_bytes
            if total is None:
                budgets.update(dict.fromkeys(keys))
                continue
            rest = total - sum(needs[key] for key in keys)
            beyond = sum(sizes[key] - needs[key] for key in keys)
            for key in keys:
                if rest < 0:  # too little, which the core says of one
                    share = rest * needs[key] // (total - rest)
                else:
                    share = rest * (sizes[key] - needs[key]) // beyond if beyond else rest
                budgets[key] = needs[key] + share
        return budgets


def _make_pages(
    device: torch.device,
    kind: StateKind,
    members: list[tuple[int, Tensor]],
    options: PagingOptions,
    resident_bytes: int | None,
) -> _core.PagedState:
    elements = sum(_room_of(param) for _, param in members)
    try:
        pages = run_core(
            _core.PagedState,
            str(device),
            kind.rule,
            kind.is_8bit,
            elements,
            page_bytes=options.page_bytes,
            strategy=options.paging,
            resident_bytes=resident_bytes,
            page_file=options.page_file,
        )
    except ValueError as error:
        if resident_bytes in (None, options.resident_bytes):
            raise
        raise ValueError(
            f"{error} (the share of {8 if kind.is_8bit else 32}-bit state on {device}; "
            f"all is resident_bytes {options.resident_bytes})"
        ) from error
    if pages.strategy == "pinned" and any(is_sharded(param) for _, param in members):
        raise NotImplementedError(
            "paging is 'pinned', which keeps state on the host, and a parameter is sharded: "
            "its state must be where the parameter is; use 'managed'"
        )
    return pages


def _make_slots(
    pages: _core.PagedState,
    device: torch.device,
    kind: StateKind,
    members: list[tuple[int, Tensor]],
) -> dict[int, Slot]:
    if device.type == "cuda":  # the pages are zeros for what follows on this stream
        pages.join(execution(torch.empty(0, device=device))[1])
    steps = torch.zeros(len(members), dtype=torch.float32, device=device)
    slots = {}
    first = 0
    for step, (number, param) in zip(steps.unbind(), members, strict=True):
        slot = Slot(param, kind, number, pages, first)
        slot.views["step"] = step
        for plane, name in enumerate(kind.planes):
            slot.views[name] = _view(pages, plane, name, kind, param, first)
        slots[id(param)] = slot
        first += _room_of(param)
    return slots


def _view(
    pages: _core.PagedState, plane: int, name: str, kind: StateKind, param: Tensor, first: int
) -> Tensor:
    """The state of a parameter in one plane: of this rank's part, if it is sharded."""
    local = local_part(param)
    memory = torch.from_dlpack(pages.memory(plane, first, local.numel()))
    view = memory.view(kind.dtype_of(name)).view(kind.shape_of(name, local))
    return as_shard_of(view, param, kind.shape_of(name, param)) if is_sharded(param) else view


def _room_of(param: Tensor) -> int:
    """The elements that a parameter takes: whole blocks, and one if it has no element."""
    return max(1, block_count(local_part(param).numel())) * BLOCK


def _bytes_per_block(kind: StateKind) -> int:
    return sum(
        BLOCK * kind.dtype_of(name).itemsize if name in kind.moments else 4 for name in kind.planes
    )
