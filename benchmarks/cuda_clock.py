"""Timing on a GPU: calls replayed as a CUDA graph, kernels alone, or calls with the host's part.

The same on CPU tensors by the wall clock: no measurement, but every row runs where there is no GPU.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness import Times, summarise

# How a row is timed.
GRAPH = "graph"  # a CUDA graph of the calls, replayed: no host time; the gaps between kernels count
KERNELS = "kernels"  # the sum of the kernels' own times, by CUPTI: for calls that wait for the host
HOST = "host"  # from the first call to the end of the last one's work, as a program meets it

_TURN_SECONDS, _FEWEST_TURNS = 5e-3, 5


@dataclass(frozen=True)
class Round:
    """One call for each of the items, which together exceed the cache that they must not be in."""

    items: Sequence[Any]
    call: Callable[[Any], object]

    def __call__(self) -> None:
        for item in self.items:
            self.call(item)

    def first(self) -> Any:
        """What the first call returns, to be checked."""
        return self.call(self.items[0])


def time_rounds(
    rounds: dict[str, Round], device: torch.device, clock: str, seconds: float
) -> tuple[dict[str, Times], list[str]]:
    """Time contenders in turns, each for about `seconds`; the times of one call, and remarks."""
    notes: list[str] = []
    turns: dict[str, Callable[[], float]] = {}
    for name, one in rounds.items():
        turns[name], note = _turn_of(one, device, clock)
        if note:
            notes.append(f"{name}: {note}")
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    start, turn = time.perf_counter(), 0
    while turn < _FEWEST_TURNS or time.perf_counter() - start < seconds * len(rounds):
        for name, take in turns.items():
            samples[name].append(1e3 * take())
        turn += 1
    return {name: summarise(times) for name, times in samples.items()}, notes


def _turn_of(one: Round, device: torch.device, clock: str) -> tuple[Callable[[], float], str]:
    """A function that takes a turn and returns the seconds of a call; and a remark."""
    if device.type != "cuda":
        one()
        return _repeated(one, len(one.items), _wall_seconds), ""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture wants to be warmed up on a stream of its own
        one(), one()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if clock == HOST:
        return _repeated(one, len(one.items), _synchronised_seconds), ""
    if clock == KERNELS:
        if _kernel_seconds(one) > 0:
            return lambda: _kernel_seconds(one) / len(one.items), ""
        return _repeated(one, len(one.items), _event_seconds), "timed with its host part (no CUPTI)"
    try:
        graph = _captured(one)
    except Exception as error:
        # A peer may wait for the GPU where a capture forbids it; ours may not.
        torch.cuda.synchronize()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            _repeated(one, len(one.items), _event_seconds),
            f"timed with its host part: it cannot be captured ({reason[:80]}){_generator_remark()}",
        )
    return _repeated(graph.replay, len(one.items), _event_seconds), ""


def _captured(one: Round) -> torch.cuda.CUDAGraph:
    """As torch.cuda.graph, but without its collection of all garbage, a third of a second each."""
    graph = torch.cuda.CUDAGraph()
    is_enabled = gc.isenabled()
    gc.disable()  # what it frees might wait for the GPU, which a capture forbids
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            try:
                one()
            except BaseException:
                # This ends the capture but raises, as it is no longer valid; why that is so is what
                # the first error says.
                with contextlib.suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if is_enabled:
            gc.enable()
    return graph


def _generator_remark() -> str:
    """Empty, unless torch's generator still takes itself for captured, which fails all that draws.

    torch unregisters it at the end of a capture, but not of one that fails.
    """
    try:
        torch.rand(1, device="cuda")
    except RuntimeError as error:
        return f"; since then torch draws no random numbers ({str(error).strip()[:80]})"
    return ""


def _repeated(
    run: Callable[[], object], calls: int, measure: Callable[[Callable[[], object]], float]
) -> Callable[[], float]:
    """Turns of as many runs as take some milliseconds."""
    once = max(measure(run), 1e-7)
    count = max(1, round(_TURN_SECONDS / once))

    def runs() -> None:
        for _ in range(count):
            run()

    return lambda: measure(runs) / (count * calls)


def _wall_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _synchronised_seconds(run: Callable[[], object]) -> float:
    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return _wall_seconds(run_and_wait)


def _event_seconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _kernel_seconds(run: Callable[[], object]) -> float:
    """The time of all kernels and copies of a run, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return 1e-6 * sum(e.time_range.elapsed_us() for e in events)
