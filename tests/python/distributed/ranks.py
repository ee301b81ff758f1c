"""Two processes that stay and run what tests give them, so that torch is imported once.

Nothing here can hang: a call has a deadline, after which the processes are killed and what each
was doing is shown. A call that fails ends them too, for one rank may be left in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

WORLD_SIZE = 2
START_SECONDS = 120  # of importing torch, on a busy machine
CALL_SECONDS = 120  # likewise, of what takes a few alone
GRACE_SECONDS = 3  # for the other rank, when one has failed


class RankError(AssertionError):
    """What went wrong on which rank."""


class Ranks:
    """Processes of one gloo group; `run` calls a function on all of them."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")

    def run(
        self, function: Callable[..., Any], *args: Any, seconds: float = CALL_SECONDS
    ) -> list[Any]:
        """What `function(*args)` returns on each rank, in order.

        The function is of the top level of a module; it finds the group initialised, one thread
        and the seed 0. RankError has the traceback of each rank that raised, and the stack of each
        that had not come back in time.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect(function.__name__, seconds)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = tempfile.mktemp(dir=self._folder.name)
        for rank in range(WORLD_SIZE):
            here, there = context.Pipe()
            arguments = (rank, there, rendezvous, self._stack_file(rank))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._collect("start", START_SECONDS)

    def _collect(self, what: str, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < WORLD_SIZE and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, left):
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    answers[rank] = (False, f"the process ended with code {code}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(answers) == WORLD_SIZE and all(is_good for is_good, _ in answers.values()):
            return [answers[rank][1] for rank in range(WORLD_SIZE)]
        report = []
        for rank in range(WORLD_SIZE):
            is_good, answer = answers.get(rank, (False, None))
            if answer is None and not is_good:
                report.append(f"rank {rank} has not come back; it was at\n{self._stack(rank)}")
            else:
                report.append(f"rank {rank}: {'came back' if is_good else answer}")
        self.stop()
        raise RankError(f"{what}, on {WORLD_SIZE} ranks:\n" + "\n".join(report))

    def _stack_file(self, rank: int) -> str:
        return os.path.join(self._folder.name, f"stack{rank}")

    def _stack(self, rank: int) -> str:
        """Where a rank is, which it writes on a signal; the process may be beyond that."""
        path = Path(self._stack_file(rank))
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.1)
            if path.exists() and path.stat().st_size:
                break
        return path.read_text() if path.exists() else "(it does not say)"


def _serve(rank: int, pipe: Connection, rendezvous: str, stack_file: str) -> None:
    with open(stack_file, "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        try:
            torch.set_num_threads(1)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=WORLD_SIZE,
                timeout=timedelta(seconds=CALL_SECONDS),
            )
            pipe.send((True, None))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            raise
        while True:
            function, args = pipe.recv()
            torch.manual_seed(0)
            try:
                answer = (True, function(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
