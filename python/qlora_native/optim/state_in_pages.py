"""An optimiser whose state is in pages: its places, and how it is saved, loaded and copied."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.optim.bitsandbytes_state import from_bitsandbytes, is_bitsandbytes_state
from qlora_native.optim.gradients import check_steppable
from qlora_native.optim.groups import complete_group
from qlora_native.optim.paging_options import PagingOptions
from qlora_native.optim.paging_report import PagingReport, report_of
from qlora_native.optim.shards import check_shards
from qlora_native.optim.state_dicts import (
    check_state_dict,
    keep_rounding,
    pair_with_parameters,
    with_own_steps,
)
from qlora_native.optim.state_kind import Rule, StateKind, check_state
from qlora_native.optim.state_pages import Slot, StatePages
from qlora_native.sharding import is_sharded


class StateInPages(torch.optim.Optimizer):
    """What `PagedOptimizer` is but for its steps.

    Subclasses say which kind of state a parameter has.
    """

    _is_built = False
    _rule: ClassVar[Rule]
    _settings: ClassVar[tuple[str, ...]]  # that a group of this optimiser has

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], options: PagingOptions
    ) -> None:
        options.check(type(self).__name__)
        self._pages = StatePages(options)
        self._moved_before: list[_core.PagedReport] = []
        super().__init__(params, complete_group(type(self).__name__, defaults))
        self._reserve()

    # ---- places

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        """All parameters with their numbers, by which state dicts know them."""
        return enumerate(param for group in self.param_groups for param in group["params"])

    def _kind_of(self, param: Tensor) -> StateKind:
        kind = StateKind(self._rule, self._keeps_8bit_state(param))
        if kind.is_8bit and is_sharded(param):
            check_shards(type(self).__name__, param)
        return kind

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return False

    def _reserve(self) -> None:
        """With a page file, give every parameter its place now, so that a full disk is told now."""
        for is_8bit in {self._keeps_8bit_state(param) for _, param in self._numbered()}:
            self._pages.page_bytes_of(StateKind(self._rule, is_8bit))  # refuses one too small
        if self._pages.options.page_file is not None:
            self._lay_out(param for _, param in self._numbered() if param.requires_grad)
        self._is_built = True

    def _lay_out(self, params: Iterable[Tensor], *, keeps_state: bool = True) -> None:
        """Have a place for the parameters given, and for all that may be needed later.

        Their state moves there, unless it need not be kept; that of others does in any case.
        """
        name, pages = type(self).__name__, self._pages
        needed = {id(param): param for param in params}
        slots = {i: pages.get(param) for i, param in needed.items()}
        if all(
            slot and slot.fits(needed[i], self._kind_of(needed[i])) for i, slot in slots.items()
        ):
            return
        wanted, live = [], []
        for number, param in self._numbered():
            slot = pages.get(param)
            if not (id(param) in needed or slot is not None or param.requires_grad):
                continue
            try:
                check_steppable(name, param)
                kind = self._kind_of(param)
            except NotImplementedError:
                if id(param) in needed:
                    raise
                continue  # it may never have a gradient
            is_kept = keeps_state or id(param) not in needed
            if is_kept and slot is not None and slot.holds(self.state.get(param)):
                if not slot.fits(param, kind):
                    raise ValueError(
                        f"{name}: parameter {number} was {list(slot.shape)} on {slot.device} when "
                        f"its state was made, and is {list(param.shape)} on {param.device} now; "
                        "move or resize parameters before the optimiser's first step"
                    )
                live.append(param)
            wanted.append((number, param, kind))
        self._wait_for_copies()
        with torch.inference_mode(False), torch.no_grad():
            pages.lay_out(wanted, live)
        self._moved_before = []  # of pages that are no more
        for param in live:
            # In place: whoever holds the dict of a parameter sees its state.
            self.state[param].update(self._place_of(param).views)

    def _place_of(self, param: Tensor) -> Slot:
        slot = self._pages.get(param)
        assert slot is not None  # laid out before
        return slot

    def _write(self, states: list[tuple[Slot, dict[str, Any]]]) -> None:
        """Copy checked states into their places, whatever of them lies in other places of ours."""
        self._wait_for_copies()
        copies = [(slot, self._pages.own_copies(slot, state)) for slot, state in states]
        with torch.no_grad():
            for slot, state in copies:
                slot.write(state)

    def paging_report(self) -> PagingReport:
        """The pages, what was asked to be where, and what the last step moved."""
        return report_of(self._pages.buffers, self._moved_before)

    def _bring_into_pages(self, params: list[tuple[Tensor, Slot]]) -> list[tuple[Tensor, Slot]]:
        """Have the state of parameters in their places; returns those that had none."""
        of_others = [(slot, self.state[param]) for param, slot in params if self.state.get(param)]
        fresh = [(param, slot) for param, slot in params if not self.state.get(param)]
        if of_others or not all(slot.is_zero for _, slot in fresh):
            self._write(of_others)
        for slot, state in of_others:
            state.update(slot.views)
        for param, slot in fresh:
            slot.clear()
            self.state[param] = dict(slot.views)
        return fresh

    # ---- state dicts

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the step counts on the CPU; the moments are those in the pages."""
        self._wait_for_copies()
        # Before the user's hooks, which may put it into another form.
        hook = self.register_state_dict_post_hook(
            lambda _, state_dict: with_own_steps(state_dict), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class, of its like in torch or of its like in bitsandbytes.

        The moments come into the pages, in fp32 (8-bit codes: as they are) whatever the parameter's
        dtype, on the parameter's device.

        Raises:
            ValueError: the state is of another kind of optimiser, or of parameters of other shapes.

        Nothing is then loaded.
        """
        # torch casts a parameter's state to the parameter's dtype, which would ruin fp32 moments of
        # 16-bit parameters and 8-bit codes alike, and copies it once more. A hook, which runs after
        # the user's own, takes it away, and another puts it into the pages.
        loaded: list[tuple[Tensor, dict[str, Any]]] = []

        def take(_: torch.optim.Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            if is_bitsandbytes_state(final):
                final = from_bitsandbytes(final)
            check_state_dict(type(self).__name__, self._settings, self.param_groups, final)
            self._pages.check_process(type(self).__name__)
            pairs = pair_with_parameters(self.param_groups, final)
            for i, param, state in pairs:
                self._check_state(f"{type(self).__name__}: state of parameter {i}", param, state)
            # What is needed is taken before anything changes.
            self._lay_out((param for _, param, _ in pairs), keeps_state=False)
            loaded.extend((param, state) for _, param, state in pairs)
            return {**final, "state": {}, "param_groups": keep_rounding(self.param_groups, final)}

        def put(_: torch.optim.Optimizer) -> None:
            self._write([(self._place_of(param), state) for param, state in loaded])
            for param, _state in loaded:
                self.state[param] = dict(self._place_of(param).views)

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_state(self, where: str, param: Tensor, state: dict[str, Any]) -> None:
        kind = self._kind_of(param)
        unknown = sorted(set(state) - set(kind.names))
        if unknown:
            raise ValueError(f"{where} has {sorted(state)}, want {sorted(kind.names)}")
        check_state(where, param, state, kind)

    def _wait_for_copies(self) -> None:
        """For those to pinned memory, which the host is about to read or write."""
        for pages in self._pages.buffers:
            if pages.strategy == "pinned":
                torch.cuda.current_stream(torch.device(pages.device)).synchronize()

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: groups, state as ordinary tensors, and how it is paged."""
        self._wait_for_copies()
        return {
            **super().__getstate__(),
            "state": defaultdict(
                dict,
                {
                    param: {name: _ordinary_copy(value) for name, value in state.items()}
                    for param, state in self.state.items()
                },
            ),
            "paging_options": self._pages.options,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What copy, pickle and load_state_dict restore. State goes into pages at the next step."""
        options = state.get("paging_options")
        super().__setstate__({key: state[key] for key in state if key != "paging_options"})
        if options is not None:
            self._pages = StatePages(options)
            self._moved_before = []
            self._reserve()
        for group in self.param_groups:
            for key, value in complete_group(type(self).__name__, dict(self.defaults)).items():
                group.setdefault(key, value)


def _ordinary_copy(value: Any) -> Any:
    """A tensor of its own memory: on the CPU, where there is more of it, but for a DTensor."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if is_sharded(value) else value.detach().to("cpu", copy=True)
