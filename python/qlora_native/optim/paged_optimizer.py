"""What all optimisers with paged state are: groups and steps."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.optim.groups import check_group, complete_group
from qlora_native.optim.paging_options import PagingOptions
from qlora_native.optim.state_in_pages import StateInPages
from qlora_native.optim.state_kind import check_state
from qlora_native.optim.state_pages import Slot
from qlora_native.optim.step import Batch, Scaling, make_calls, prepare_calls, run_calls

PAGE_BYTES = 32 << 20  # csrc/core/paged_buffer.h says why


class PagedOptimizer(StateInPages):
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
        super().__init__(params, defaults, options)

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
