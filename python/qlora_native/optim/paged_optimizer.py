"""What all optimisers with paged state are: groups, steps, state dicts, pages."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.optim.bitsandbytes_state import from_bitsandbytes, is_bitsandbytes_state
from qlora_native.optim.gradients import check_steppable
from qlora_native.optim.groups import check_group, complete_group
from qlora_native.optim.paging_report import PagingReport, report_of
from qlora_native.optim.shards import check_shards
from qlora_native.optim.state_dicts import (
    check_state_dict,
    keep_rounding,
    pair_with_parameters,
    with_own_steps,
)
from qlora_native.optim.state_kind import Rule, StateKind, check_state
from qlora_native.optim.state_pages import PagingOptions, Slot, StatePages
from qlora_native.optim.step import Batch, Scaling, make_calls, prepare_calls, run_calls
from qlora_native.sharding import is_sharded

PAGE_BYTES = 32 << 20  # csrc/core/paged_buffer.h says why


class PagedOptimizer(torch.optim.Optimizer):
    """The base of PagedAdamW, PagedLion and their 8-bit forms.

    **Pages.** All state is in pages that a device need not hold all at once; small parameters share
    them. On CUDA they are unified memory: a step asks for page i + 1 while it updates page i and,
    under `resident_bytes`, sends page i - 1 back to the host. State that fits is stepped at once.
    On a CPU they are ordinary memory or, with `page_file`, a file that is mapped. A step does not
    wait for the device. `paging_report()` says what was asked to be where.

    **State** is made at the first step that a parameter has a gradient in, and shows in `state` as
    tensors over the pages; what is written into them, or put in their place, is used. The step
    counts are on the parameters' device, so that a step may be captured in a CUDA graph once one
    outside has made the state, if the state is resident: that is, paging is 'managed' and
    resident_bytes is None or no less than the state.

    **What can be stepped.** float32, bfloat16 and float16 parameters in one list, on the CPU and on
    CUDA devices, which give the same bits. Of a sharded parameter (DTensor, as FSDP2 makes them)
    each rank steps its own part. A parameter without a gradient is left alone. A `GradScaler` steps
    these optimisers as it does torch's fused ones, without waiting for the device: the gradients
    are unscaled inside the step, and stay as they are; a step that found an Inf or NaN changes
    nothing, and does not count. Else a NaN propagates as in torch; in 8-bit state it reaches its
    block of 256 elements and no further.

    **Errors** of a step leave parameters and state as they were, but for one: that a page file
    could not be written (OSError) is known when a step is done, and leaves state that cannot be
    relied on.

    Subclasses say which rule steps a parameter, and which kind of state it has.
    """

    # Asks a GradScaler for the attributes grad_scale and found_inf instead of its own handling.
    _step_supports_amp_scaling = True

    _is_built = False
    _rule: ClassVar[Rule]
    _settings: ClassVar[tuple[str, ...]]  # that a group of this optimiser has

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        page_bytes: int,
        resident_bytes: int | None,
        paging: str,
        page_file: str | os.PathLike[str] | None,
    ) -> None:
        if page_file is not None and not os.fspath(page_file):
            raise ValueError(f"{type(self).__name__}: page_file is '', want a directory")
        directory = None if page_file is None else os.path.abspath(os.fspath(page_file))
        options = PagingOptions(page_bytes, resident_bytes, paging, directory)
        options.check(type(self).__name__)
        self._pages = StatePages(options)
        self._moved_before: list[_core.PagedReport] = []
        super().__init__(params, complete_group(type(self).__name__, defaults))
        self._reserve()

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where the group has them.

        With a page_file, room for their state is reserved now.
        """
        super().add_param_group(param_group)
        try:
            group = complete_group(type(self).__name__, self.param_groups[-1])
            self.param_groups[-1] = group
            check_group(type(self).__name__, self._settings, group)
            if self._is_built:
                self._reserve()
        except BaseException:
            self.param_groups.pop()
            raise

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        """All parameters with their numbers, by which state dicts know them."""
        return enumerate(param for group in self.param_groups for param in group["params"])

    # ---- pages

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

    # ---- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss.

        Raises:
            ValueError: a gradient is sparse or does not fit its parameter, a parameter is of no
                float dtype that the core has, or was moved or resized since its first step, or a
                number is out of its range.
            NotImplementedError: a parameter is on a device that has no such operation, or on a CUDA
                device that this build cannot use.
            OSError: state was to be reserved in the page file, and cannot be. (Or, after the step,
                the file could not be written.)
            RuntimeError: a CUDA graph is captured before the first step.
            torch.OutOfMemoryError, MemoryError: there is no memory for state or scratch.

        Nothing has then been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        name = type(self).__name__
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        for group in self.param_groups:
            check_group(name, self._settings, group)
        self._pages.check_process(name)
        batches, others = self._gather()
        # All groups are checked before the first is updated.
        calls = make_calls(name, batches, scaling)
        prepare_calls(calls)
        fresh = self._bring_into_pages(others)
        self._moved_before = [buffer.report() for buffer in self._pages.buffers]
        try:
            run_calls(calls)
        except BaseException:
            not_run = {id(slot) for call in calls for slot in call.slots}
            for param, slot in fresh:
                if id(slot) in not_run:
                    del self.state[param]
            raise
        return loss

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

    def _gather(self) -> tuple[list[Batch], list[tuple[Tensor, Slot]]]:
        """The parameters that have a gradient, and those of them whose state is not in its place.

        They have none yet, or others put it there, as unpickling does.
        """
        slots, states = self._pages.slots, self.state
        batches: list[Batch] = []
        others: list[tuple[Tensor, Slot]] = []
        for group in self.param_groups:
            of_pages: dict[_core.PagedState, Batch] = {}
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                slot = slots.get(id(param))  # a call for each parameter is most of a small step
                if slot is None or slot.shape != param.shape:
                    self._refuse_to_capture(param)
                    self._lay_out(p for _, p in self._numbered() if p.grad is not None)
                    return self._gather()
                state = states.get(param)
                if not slot.holds(state):
                    self._refuse_to_capture(param)
                    if not slot.fits(param, self._kind_of(param)):
                        self._lay_out([param])
                        return self._gather()
                    if state:
                        where = f"{type(self).__name__}: state of parameter {slot.number}"
                        check_state(where, param, state, slot.kind)
                    others.append((param, slot))
                batch = of_pages.get(slot.pages)
                if batch is None:
                    batch = of_pages[slot.pages] = Batch(group, [], [], [])
                batch.params.append(param)
                batch.grads.append(grad)
                batch.slots.append(slot)
            batches += of_pages.values()
        return batches, others

    def _refuse_to_capture(self, param: Tensor) -> None:
        if param.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: a CUDA graph is captured, and a parameter has no state "
                "yet, which every replay would reset; take a step before the capture"
            )

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
