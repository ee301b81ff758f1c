"""PagedAdamW: AdamW in one native call for a list of parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qlora_native.optim.adamw_state import check_state, own_copy
from qlora_native.optim.adamw_step import Scaling, check_capture, make_batches, run_batch

_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize")
_CPU = torch.device("cpu")


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with fp32 state.

    For each parameter p with gradient g, at step t, in fp32 whatever their dtype:

        p <- p (1 - lr · weight_decay)
        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g²
        p <- p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    which is `torch.optim.AdamW`, to fp32 rounding. A state dict of either loads into the other,
    with one difference: this class keeps the moments in fp32 for 16-bit parameters too.

    Parameters are on the CPU or on CUDA devices, which give the same bits; on a device, a step of
    any number of parameters is one launch or a few, on the current stream, and waits for nothing.
    State is not paged yet: it is in ordinary memory of the parameter's device. Of a sharded
    parameter (DTensor, as FSDP2 makes them) each rank steps its own part.

    A `torch.amp.GradScaler` steps it as it does torch's fused optimisers, without waiting for the
    device: the gradients are unscaled inside the step, and stay as they are; a step that found an
    Inf or NaN changes nothing, and does not count. To know that, the device keeps the step counts
    from the first such step on: `state[p]["step"]` is then on the parameter's device.

    Args:
        params: parameters or groups, as for every torch optimiser.
        lr: the learning rate; a float or a tensor of one element. A CUDA tensor is read when the
            step runs, without waiting for it, in fp32, and is not checked.
        betas: decay of the running means of g and of g².
        eps: added to the denominator.
        weight_decay: decoupled.
        maximize: step up the gradient instead of down.
        capturable: keep the step counts on the parameters' device, so that a CUDA graph can capture
            `step` (once a step outside has made the state) and a replay counts. Other numbers than
            a CUDA tensor `lr` are those of the capture.

    Raises:
        ValueError: a number is out of its range.
    """

    # Asks a GradScaler for the attributes grad_scale and found_inf instead of its own handling.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What copy, pickle and load_state_dict restore; older state has no `capturable`."""
        super().__setstate__(state)
        capturable = self.defaults.setdefault("capturable", False)
        for group in self.param_groups:
            group.setdefault("capturable", capturable)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where the group has them."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient; returns the closure's loss.

        Raises:
            ValueError: a gradient is sparse or does not fit its parameter, a parameter is of no
                float dtype that the core has, or a number is out of its range. Nothing has then
                been updated.
            NotImplementedError: a parameter is on a device that has no such operation, or on a CUDA
                device that this build cannot use.
            RuntimeError: a CUDA graph is captured, without `capturable` or before the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        name = type(self).__name__
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        # All groups are checked before the first is updated.
        batches = []
        for group in self.param_groups:
            self._check_group(group)
            batches += make_batches(name, group, self.state, self._keeps_8bit_state, scaling)
        check_capture(name, batches, self.state)
        for batch in batches:
            run_batch(batch, self.state, scaling)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or, in 32 bits, of `torch.optim.AdamW`.

        The moments are kept in fp32 (8-bit codes: as they are), whatever the parameter's dtype.

        Raises:
            ValueError: the state is of another kind of optimiser, or of parameters of other shapes.
                Nothing is then loaded.
        """
        # torch casts a parameter's state to the parameter's dtype, which would ruin fp32 moments of
        # 16-bit parameters and 8-bit codes alike. What it was given is kept by a hook, which runs
        # after the user's own, and put in place again.
        given: dict[str, Any] = {}

        def keep(_: torch.optim.Optimizer, final_state_dict: dict[str, Any]) -> None:
            self._check_state_dict(final_state_dict)
            given.update(final_state_dict)

        hook = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, param, state in self._pair_with_parameters(given):
            step_device = param.device if group["capturable"] else _CPU
            self.state[param] = own_copy(state, param.device, step_device)

    # ---- what a kind of state decides

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return False

    def _check_state(self, where: str, param: Tensor, state: dict[str, Any]) -> None:
        check_state(where, param, state, self._keeps_8bit_state(param))

    # ---- checks

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for key in ("lr", "eps", "weight_decay"):
            if isinstance(group[key], Tensor) and group[key].is_cuda:
                if key == "lr":
                    continue  # to look at it would wait for the device
                raise ValueError(
                    f"{name}: {key} is a tensor on {group[key].device}, want a number: only lr is "
                    "read on a device"
                )
            if not 0.0 <= float(group[key]) < math.inf:
                raise ValueError(
                    f"{name}: {key} is {group[key]}, want a finite number of at least 0"
                )
        if len(group["betas"]) != 2:
            raise ValueError(f"{name}: betas is {group['betas']}, want two numbers")
        for i, beta in enumerate(group["betas"]):
            if isinstance(beta, Tensor) and beta.is_cuda:
                raise ValueError(
                    f"{name}: betas[{i}] is a tensor on {beta.device}, want a number: only lr is "
                    "read on a device"
                )
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: betas[{i}] is {beta}, want 0 <= beta < 1")

    def _pair_with_parameters(
        self, state_dict: dict[str, Any]
    ) -> list[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
        """The parameters, in order, that `state_dict` has a state for: group, parameter, state."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        states = state_dict["state"]
        return [(*p, states[i]) for i, p in zip(ids, params, strict=True) if states.get(i)]

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise ValueError(
                f"{name}: the state dict has groups of {sizes} parameters, want {own_sizes}"
            )
        for group in state_dict["param_groups"]:
            missing = [name for name in _SETTINGS if name not in group]
            if missing:
                raise ValueError(
                    f"{name}: the state dict is of another kind of optimiser: a group has no "
                    + ", ".join(missing)
                )
            if group.get("amsgrad"):
                raise ValueError(
                    f"{name}: the state dict is of AdamW with amsgrad, which is not done here"
                )
            if group.get("decoupled_weight_decay") is False:
                raise ValueError(
                    f"{name}: the state dict is of Adam, whose weight decay is not decoupled"
                )
            self._check_group(group)
        for i, (_, param, state) in enumerate(self._pair_with_parameters(state_dict)):
            self._check_state(f"{name}: state of parameter {i}", param, state)
