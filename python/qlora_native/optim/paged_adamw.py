"""PagedAdamW and PagedAdamW8bit: AdamW in one native call for a list of parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qlora_native import _core
from qlora_native.ops.storage import execution

_BLOCK = 256  # elements of 8-bit state that share a scale
_STATE_32BIT = ("exp_avg", "exp_avg_sq")
_STATE_8BIT = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with fp32 state.

    For each parameter p with gradient g, at step t, in fp32 whatever their dtype:

        p <- p (1 - lr · weight_decay)
        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g²
        p <- p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    which is `torch.optim.AdamW`, to fp32 rounding. A state dict of either loads into the other,
    with one difference: this class keeps the moments in fp32 for 16-bit parameters too.

    Parameters, gradients and state are on the CPU, where state lives in ordinary memory, which the
    system pages. A CUDA parameter raises NotImplementedError at the first step.

    Args:
        params: parameters or groups, as for every torch optimiser.
        lr: the learning rate; a float or a tensor of one element.
        betas: decay of the running means of g and of g².
        eps: added to the denominator.
        weight_decay: decoupled.
        maximize: step up the gradient instead of down.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

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
            ValueError: a gradient is sparse, or does not fit its parameter.
            NotImplementedError: a parameter is on a device that has no such operation yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or, in 32 bits, of `torch.optim.AdamW`.

        The moments keep their own dtype.

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
        for param, state in self._pair_with_parameters(given):
            self.state[param] = {
                name: value.to("cpu" if name == "step" else param.device, copy=True)
                for name, value in state.items()
            }

    # ---- what a kind of state decides

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return False

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for key in ("lr", "eps", "weight_decay"):
            if not float(group[key]) >= 0.0:
                raise ValueError(f"{name}: {key} is {group[key]}, want at least 0")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: betas[{i}] is {beta}, want 0 <= beta < 1")

    # ---- one step

    def _step_group(self, group: dict[str, Any]) -> None:
        # One call of the core takes the parameters of one device, kind of state and step count:
        # nearly always all of them.
        batches: dict[tuple[torch.device, bool, int], list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise ValueError(f"{type(self).__name__}: a gradient is sparse, want a dense one")
            state = self.state[param]
            if not state:
                self._init_state(param, state)
            batches[param.device, "exp_avg_absmax" in state, int(state["step"])].append(param)
        for (_, is_8bit, steps_done), params in batches.items():
            self._step_batch(group, params, is_8bit, steps_done + 1)

    def _step_batch(
        self, group: dict[str, Any], params: list[Tensor], is_8bit: bool, step: int
    ) -> None:
        # The core wants contiguous memory; a parameter that is not is stepped as a copy.
        dense = [param if param.is_contiguous() else param.contiguous() for param in params]
        grads = [param.grad.contiguous() for param in params]
        states = [self.state[param] for param in params]
        names = _STATE_8BIT if is_8bit else _STATE_32BIT
        num_threads, stream = execution(dense[0])
        beta1, beta2 = group["betas"]
        core_step = _core.adamw8bit_step if is_8bit else _core.adamw_step
        core_step(
            dense,
            grads,
            *([state[name] for state in states] for name in names),
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            maximize=group["maximize"],
            num_threads=num_threads,
            stream=stream,
        )
        for param, stepped, state in zip(params, dense, states, strict=True):
            if stepped is not param:
                param.copy_(stepped)
            state["step"] += 1

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        if not self._keeps_8bit_state(param):
            for name in _STATE_32BIT:
                state[name] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            return
        blocks = -(-param.numel() // _BLOCK)
        for name in _STATE_32BIT:
            # A scale of zero makes every code stand for zero.
            state[name] = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
            state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)

    # ---- loading

    def _pair_with_parameters(
        self, state_dict: dict[str, Any]
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters, in order, that `state_dict` has a state for, with that state."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        states = state_dict["state"]
        return [(p, states[i]) for i, p in zip(ids, params, strict=True) if states.get(i)]

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise ValueError(
                f"{name}: the state dict has groups of {sizes} parameters, want {own_sizes}"
            )
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError(
                f"{name}: the state dict is of AdamW with amsgrad, which is not done here"
            )
        for i, (param, state) in enumerate(self._pair_with_parameters(state_dict)):
            self._check_state(f"{name}: state of parameter {i}", param, state)

    def _check_state(self, where: str, param: Tensor, state: dict[str, Any]) -> None:
        is_8bit = self._keeps_8bit_state(param)
        wanted = {"step", *(_STATE_8BIT if is_8bit else _STATE_32BIT)}
        if set(state) != wanted:
            raise ValueError(f"{where} has {sorted(state)}, want {sorted(wanted)}")
        for moment in _STATE_32BIT:
            value = state[moment]
            if value.shape != param.shape:
                raise ValueError(
                    f"{where}: {moment} has shape {list(value.shape)}, want {list(param.shape)}"
                )
            if (value.dtype == torch.uint8) != is_8bit:
                wanted_dtype = "uint8" if is_8bit else "a float dtype"
                raise ValueError(f"{where}: {moment} is {value.dtype}, want {wanted_dtype}")


class PagedAdamW8bit(PagedAdamW):
    """AdamW with 8-bit block-wise state: 2.03 bytes of state a parameter, not 8.

    Block-wise 8-bit state is by Dettmers et al. 2022.

    A block of 256 elements of a moment is stored as its fp32 absmax and 8-bit codes: of the signed
    dynamic map for the first moment, of the unsigned for the second. A step decodes a block,
    updates in fp32 as PagedAdamW does, and encodes it again.

    Args:
        params: as PagedAdamW.
        lr: as PagedAdamW.
        betas: as PagedAdamW.
        eps: as PagedAdamW.
        weight_decay: as PagedAdamW.
        maximize: as PagedAdamW.
        min_8bit_size: parameters of fewer elements keep 32-bit state, whose cost is small there.

    A state dict of a 32-bit optimiser is refused, and one of this class by 32-bit ones.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        min_8bit_size: int = 4096,
    ) -> None:
        self.min_8bit_size = min_8bit_size
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return param.numel() >= self.min_8bit_size
