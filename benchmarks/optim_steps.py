"""An optimiser with parameters and gradients of its own: made, checked, ready to be timed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cuda_clock import Round
from harness import copies_past_l3
from optim_kinds import RATE, Kind, second_gradient

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# How far from the reference's an element may be, in rates (a step moves it by about one), and the
# part of all elements that may be farther. What is rounded to bf16 may be rounded the other way,
# by 0.05 where it is largest; in 8 bits a moment far below its block's largest is known badly.
OURS_MAY_MISS = {
    (32, torch.float32): (1e-4, 0.0),
    (32, torch.bfloat16): (0.1, 0.0),
    (8, torch.float32): (0.25, 0.005),
    (8, torch.bfloat16): (0.25, 0.005),
}
PEERS_MAY_MISS = (0.25, 0.02)  # only that a peer does the same work: some have state in bf16
Check = Callable[[str, "Steps"], None]
Copies = Callable[[Callable[[], "Steps"], int], "list[Steps]"]


def one_copy(make: Callable[[], "Steps"], bytes_each: int) -> "list[Steps]":
    """Of what is so small that its call is timed, and may stay in a cache."""
    return [make()]


class Problem:
    """Where parameters start, their gradients, and where two steps of a kind lead."""

    def __init__(
        self,
        kind: Kind,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rate: float = RATE,
        copies: Copies = copies_past_l3,
    ) -> None:
        """`copies` makes as many of a thing, of so many bytes, as a contender passes round."""
        self.kind, self.dtype, self.device, self.rate = kind, dtype, torch.device(device), rate
        self.copies = copies
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device)
            return (0.02 * drawn).to(dtype)

        self.starts = [draw(shape) for shape in shapes]
        self.gradients = [draw(shape) for shape in shapes]
        self.elements = sum(start.numel() for start in self.starts)

    @property
    def moved_bytes(self) -> int:
        """Of a step at least."""
        return int(self.kind.moved_bytes(self.dtype) * self.elements)

    @property
    def state_bytes(self) -> int:
        return int(self.kind.state_bytes * self.elements)

    def round_of(self, name: str, make: Make, check: Check | None = None) -> Round:
        """A contender, checked; by default as a peer."""
        bytes_each = 2 * self.dtype.itemsize * self.elements + self.state_bytes
        copies = self.copies(lambda: Steps(self, make), bytes_each)
        copies[0].take_two()
        (check or self.check_that_most_fit(PEERS_MAY_MISS))(name, copies[0])
        return Round(copies, lambda one: one())

    def round_of_ours(self, name: str, check: Check | None = None, **settings: object) -> Round:
        """Ours with `settings`, held to what ours may miss."""
        return self.round_of(
            name,
            lambda params: self.kind.ours(params, self.rate, **settings),
            check or self.check_that_most_fit(OURS_MAY_MISS[self.kind.bits, self.dtype]),
        )

    def check_that_most_fit(self, may_miss: tuple[float, float], kind: Kind | None = None) -> Check:
        """Stop the run unless elements are where two steps (of another `kind`) lead."""
        tolerance, part = may_miss

        def check(name: str, steps: "Steps") -> None:
            wrong = sum(
                int((~(error.abs() <= tolerance * self.rate)).sum())  # NaN is wrong, too
                for error, _ in self._errors(steps, kind or self.kind)
            )
            if wrong > part * self.elements:
                raise SystemExit(
                    f"WRONG: {name}: {(kind or self.kind).name}: {wrong} of {self.elements} "
                    f"elements are off by more than {tolerance:g} of a step, "
                    f"want at most {part:.1%}"
                )

        return check

    def check_stochastic_rounding(self, name: str, steps: "Steps") -> None:
        """Stop the run unless every element is rounded to a neighbour, and their mean is right.

        Rounded to the nearest the mean is wrong where a step is less than half of a last place.
        """
        total = squares = 0.0
        for i, (error, moved) in enumerate(self._errors(steps, self.kind, rounded=False)):
            # A last place a step, which is a part of the element at most; and what 8 bits may miss.
            reach = 2 * torch.finfo(self.dtype).eps * (self.starts[i].double().abs() + self.rate)
            if not bool((error.abs() <= reach + 2 * self.rate).all()):
                raise SystemExit(f"WRONG: {name}: {self.kind.name}: an element is no neighbour")
            total += float((error * moved.sign()).sum())
            squares += float((error * error).sum())
        mean, deviation = total / self.elements, (squares / self.elements) ** 0.5
        limit = 6 * deviation / self.elements**0.5 + 0.02 * self.rate
        if not abs(mean) <= limit:
            raise SystemExit(
                f"WRONG: {name}: {self.kind.name}: in the mean elements are short of the reference "
                f"by {-mean / self.rate:.2f} of a step, want at most {limit / self.rate:.2f}"
            )

    def _errors(
        self, steps: "Steps", kind: Kind, rounded: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each parameter in fp64: its error, and how far the reference has moved."""
        for parameter, start, gradient in zip(
            steps.parameters, self.starts, self.gradients, strict=True
        ):
            reference = kind.two_steps(start, gradient, self.rate, rounded)
            yield parameter.detach().double() - reference, reference - start.double()


class Steps:
    """A call is a step; the gradients stay."""

    def __init__(self, problem: Problem, make: Make) -> None:
        self.parameters = [nn.Parameter(start.clone()) for start in problem.starts]
        for parameter, gradient in zip(self.parameters, problem.gradients, strict=True):
            parameter.grad = gradient.clone()
        self.optimizer = make(self.parameters)

    def __call__(self) -> None:
        self.optimizer.step()

    def take_two(self) -> None:
        """With the two gradients that the reference has."""
        self()
        for parameter in self.parameters:
            parameter.grad.copy_(second_gradient(parameter.grad))
        self()
