"""PagedAdamW and PagedAdamW8bit: AdamW in one native call for a list of parameters."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora_native import _core
from qlora_native.ops.storage import FLOAT_DTYPES, PLAIN_TYPES, execution, in_memory

_BLOCK = 256  # elements of 8-bit state that share a scale
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "maximize")
_STATE_32BIT = ("exp_avg", "exp_avg_sq")
_STATE_8BIT = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


class _Batch(NamedTuple):
    """Parameters that one call of the core steps: of one device, kind of state and step count."""

    group: dict[str, Any]
    params: list[Tensor]
    is_8bit: bool
    steps_done: int


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with fp32 state.

    For each parameter p with gradient g, at step t, in fp32 whatever their dtype:

        p <- p (1 - lr · weight_decay)
        m <- m + (1 - beta1) (g - m)
        v <- beta2 v + (1 - beta2) g²
        p <- p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    which is `torch.optim.AdamW`, to fp32 rounding. A state dict of either loads into the other,
    with one difference: this class keeps the moments in fp32 for 16-bit parameters too.

    State is not paged yet: parameters, gradients and state are in ordinary CPU memory, and a
    parameter on another device raises NotImplementedError at the first step. Of a sharded
    parameter (DTensor, as FSDP2 makes them) each rank steps its own part.

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
            ValueError: a gradient is sparse or does not fit its parameter, a parameter is of no
                float dtype that the core has, or a number is out of its range. Nothing has then
                been updated.
            NotImplementedError: a parameter is on a device that has no such operation yet.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All groups are checked before the first is updated.
        batches = [batch for group in self.param_groups for batch in self._batches_of(group)]
        for batch in batches:
            self._step_batch(batch)
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
        for param, state in self._pair_with_parameters(given):
            self.state[param] = {
                name: _own_copy(name, value, param.device) for name, value in state.items()
            }

    # ---- what a kind of state decides

    def _keeps_8bit_state(self, param: Tensor) -> bool:
        return False

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for key in ("lr", "eps", "weight_decay"):
            if not 0.0 <= float(group[key]) < math.inf:
                raise ValueError(
                    f"{name}: {key} is {group[key]}, want a finite number of at least 0"
                )
        if len(group["betas"]) != 2:
            raise ValueError(f"{name}: betas is {group['betas']}, want two numbers")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: betas[{i}] is {beta}, want 0 <= beta < 1")

    # ---- one step

    def _batches_of(self, group: dict[str, Any]) -> list[_Batch]:
        """The parameters that have a gradient: one batch, as a rule."""
        self._check_group(group)
        batches: dict[tuple[torch.device, bool, int], list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state.get(param)
            is_8bit = "exp_avg_absmax" in state if state else self._keeps_8bit_state(param)
            if param.device.type != "cpu":
                raise NotImplementedError(
                    f"{type(self).__name__}: a parameter is on {param.device}, where there is no "
                    "such step yet; want cpu"
                )
            self._check_gradient(param, param.grad)
            self._check_memory(param, is_8bit)
            steps_done = int(state["step"]) if state else 0
            batches[param.device, is_8bit, steps_done].append(param)
        return [
            _Batch(group, params, is_8bit, steps_done)
            for (_, is_8bit, steps_done), params in batches.items()
        ]

    def _check_gradient(self, param: Tensor, grad: Tensor) -> None:
        name = type(self).__name__
        if grad.layout is not torch.strided:
            raise ValueError(f"{name}: a gradient is sparse ({grad.layout}), want a dense one")
        if param.dtype not in FLOAT_DTYPES or grad.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name}: a parameter is {param.dtype} and its gradient {grad.dtype}, "
                f"want one of {FLOAT_DTYPES}"
            )
        if grad.shape != param.shape:
            raise ValueError(
                f"{name}: a gradient has shape {list(grad.shape)}, its parameter "
                f"{list(param.shape)}"
            )

    def _check_memory(self, param: Tensor, is_8bit: bool) -> None:
        """The core takes addresses: of a tensor subclass it must be known what is there."""
        if type(param) in PLAIN_TYPES:
            return
        name = f"{type(self).__name__}: a parameter is a {type(param).__name__}"
        if isinstance(param, FakeTensor):
            raise NotImplementedError(f"{name}, which has no memory to step")
        if is_traceable_wrapper_subclass(param) and not hasattr(param, "to_local"):
            raise NotImplementedError(f"{name}, a tensor made of other tensors: want a plain one")
        if is_8bit and hasattr(param, "to_local"):
            raise NotImplementedError(
                f"{name}; sharded parameters have no 8-bit state yet: use PagedAdamW"
            )

    def _step_batch(self, batch: _Batch) -> None:
        group, params, is_8bit, steps_done = batch
        for param in params:
            if not self.state[param]:
                self._init_state(param, self.state[param], is_8bit)
        states = [self.state[param] for param in params]
        local = [_local(param) for param in params]
        # The core wants plain memory; a parameter that is not is stepped as a copy.
        dense = [in_memory(param) for param in local]
        grads = [in_memory(_local(param.grad)) for param in params]
        names = _STATE_8BIT if is_8bit else _STATE_32BIT
        num_threads, stream = execution(dense[0])
        beta1, beta2 = group["betas"]
        core_step = _core.adamw8bit_step if is_8bit else _core.adamw_step
        core_step(
            dense,
            grads,
            *([_local(state[name]) for state in states] for name in names),
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            step=steps_done + 1,
            maximize=bool(group["maximize"]),
            num_threads=num_threads,
            stream=stream,
        )
        for param, stepped in zip(local, dense, strict=True):
            if stepped is not param:
                param.copy_(stepped)
            else:
                increment_version(param)  # so that autograd sees the write, as of any in-place one
        torch._foreach_add_([state["step"] for state in states], 1)

    def _init_state(self, param: Tensor, state: dict[str, Any], is_8bit: bool) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name in _STATE_32BIT:
            # As 8-bit codes any bytes do: a scale of zero makes every code stand for zero.
            state[name] = torch.zeros_like(
                param,
                dtype=torch.uint8 if is_8bit else torch.float32,
                memory_format=torch.contiguous_format,
            )
            if is_8bit:
                state[f"{name}_absmax"] = torch.zeros(
                    _block_count(param), dtype=torch.float32, device=param.device
                )

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
            if is_8bit:
                absmax, blocks = state[f"{moment}_absmax"], _block_count(param)
                if absmax.shape != (blocks,) or absmax.dtype != torch.float32:
                    raise ValueError(
                        f"{where}: {moment}_absmax is {absmax.dtype} {list(absmax.shape)}, "
                        f"want torch.float32 [{blocks}]"
                    )


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

    def _check_state(self, where: str, param: Tensor, state: dict[str, Any]) -> None:
        try:
            super()._check_state(where, param, state)
        except ValueError as error:
            raise ValueError(f"{error} (min_8bit_size is {self.min_8bit_size} here)") from error

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: an Optimizer keeps its groups and state alone."""
        return {**super().__getstate__(), "min_8bit_size": self.min_8bit_size}


def _block_count(param: Tensor) -> int:
    return -(-param.numel() // _BLOCK)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, and any other tensor itself."""
    if type(tensor) in PLAIN_TYPES or not hasattr(tensor, "to_local"):
        return tensor
    return tensor.to_local()


def _own_copy(name: str, value: Any, device: torch.device) -> Tensor:
    """A loaded piece of state as this library keeps it: contiguous, moments in fp32 or uint8."""
    if name == "step":
        return torch.as_tensor(value, dtype=torch.float32, device="cpu").clone().reshape(())
    dtype = torch.uint8 if value.dtype == torch.uint8 else torch.float32
    return value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
