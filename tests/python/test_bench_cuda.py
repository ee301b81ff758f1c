"""The CUDA benchmark without a GPU: goals, floors, statistics, the table; all rows on a CPU."""

import contextlib
import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench_cuda
import bench_optim
import cuda_clock
import cuda_device
import cuda_harness
import cuda_peers
import cuda_report
import rows_cuda_paging
from cuda_clock import Round
from cuda_device import COPY, GEMM, LINK, CudaLimits
from goals import BNB, CUDA_GOALS, LIMIT, OWN_ONE_TOKEN, Goal, judge
from harness import OURS, Case, Row, Times, Work
from support import run_python

BENCHMARKS = Path(bench_cuda.__file__).parent
CPU = torch.device("cpu")
LIMITS = CudaLimits(copy=4e12, gemm=8e14, link=1e11)


def times(milliseconds: float) -> Times:
    return Times(milliseconds, 0.9 * milliseconds, 1.2 * milliseconds, 7)


def make_row(key: str, m: int | None, size: str = "4096×4096", **milliseconds: float) -> Row:
    shown = {OURS: milliseconds.pop("ours"), **milliseconds}
    name = Work(key, size, lambda: None, m).name
    return Row(name, key, m, size, {who: times(ms) for who, ms in shown.items()})


# ---- goals


def test_a_time_is_held_against_the_goal_of_its_size():
    row = make_row("forward", 1, ours=0.005)
    (verdict,) = judge(row, "", CUDA_GOALS)
    assert (verdict.wanted, verdict.reached, verdict.met) == ("≤ 4.5 µs", "5.0 µs", False)
    row.size = "4096×14336"
    (verdict,) = judge(row, "", CUDA_GOALS)
    assert verdict.wanted == "≤ 9.5 µs"
    assert verdict.met
    row.size = "8192×8192"
    assert judge(row, "", CUDA_GOALS) == []


def test_a_peer_and_a_share_of_the_floor_are_goals_too():
    row = make_row("quantise", None, ours=0.010, bitsandbytes=0.049)
    row.limit, row.share_of_limit = COPY, 0.75
    share, peer = judge(row, "", CUDA_GOALS)
    assert share.met
    assert COPY in share.wanted
    assert not peer.met
    assert (peer.wanted, peer.reached) == ("≥ 5× bitsandbytes", "4.90×")


def test_a_goal_without_its_contender_has_no_verdict():
    assert judge(make_row("forward", 16, ours=0.005), "", CUDA_GOALS) == []
    row = make_row("forward", 16, ours=0.005, **{OWN_ONE_TOKEN: 0.0041})
    (verdict,) = judge(row, "", CUDA_GOALS)
    assert verdict.met


def test_every_goal_is_of_a_row_that_there_is():
    works = list(bench_cuda.all_works(["4096x4096", "4096x14336"], CPU, quick=False))
    works += bench_optim.cuda_works(torch.device("cuda"), Path("unused"))
    keys = {work.key for work in works}
    sizes = {work.size for work in works}
    assert {goal.key for goal in CUDA_GOALS} <= keys
    assert {size for goal in CUDA_GOALS for size in goal.sizes} <= sizes


def test_a_run_whose_time_is_short_has_some_of_everything():
    works = list(bench_cuda.all_works(["4096x4096", "4096x14336"], CPU, quick=False))
    second = next(i for i, work in enumerate(works) if "14336" in work.size)
    assert {work.key for work in works[:second]} == {work.key for work in works}
    assert all("14336" in work.size for work in works[second:])


def test_the_names_of_rows_are_distinct():
    names = [work.name for work in bench_cuda.all_works(["64x64"], CPU, quick=True)]
    assert len(names) == len(set(names))


# ---- floors


@pytest.mark.parametrize(
    ("case", "floor"),
    [
        (Case({}, bytes_moved=4_000_000, operations=8e7, bandwidth="copy"), (COPY, 1e-6)),
        (Case({}, bytes_moved=4_000_000, operations=8e9, bandwidth="copy"), (GEMM, 1e-5)),
        (Case({}, bytes_moved=4_000, operations=8e9, bandwidth="copy", dtype="fp32"), (COPY, 1e-9)),
        (Case({}, bytes_moved=1_000_000, bandwidth="link"), (LINK, 1e-5)),
    ],
)
def test_the_floor_is_what_takes_longest_at_best(case, floor):
    name, seconds = LIMITS.at_best(case)
    assert name == floor[0]
    assert seconds == pytest.approx(floor[1])


@pytest.mark.parametrize(
    ("bytes_each", "count"), [(1, 2**21), (2**20, 2), (2**20 + 1, 2), (2**22, 1)]
)
def test_copies_exceed_twice_the_cache(bytes_each, count):
    assert len(cuda_device.copies_past_l2(object, bytes_each, CPU)) == count


# ---- timing


def test_contenders_take_turns_and_a_time_is_of_one_call(monkeypatch):
    clock, log = [0.0], []
    monkeypatch.setattr(cuda_clock, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(item):
        log.append(item)
        clock[0] += {"a": 2e-3, "b": 6e-3}[item[0]]

    rounds = {OURS: Round(["a1", "a2"], call), "peer": Round(["b1"], call)}
    found, notes = cuda_clock.time_rounds(rounds, CPU, "graph", 0.02)
    assert found[OURS].median_ms == pytest.approx(2.0)
    assert found["peer"].median_ms == pytest.approx(6.0)
    assert found[OURS].samples == found["peer"].samples >= 5
    assert notes == []
    assert log.count("a1") == log.count("a2")
    assert "b1" in log[log.index("a1") : -log[::-1].index("a1")]


class FakeGraph:
    """A capture that cannot be ended after an error in it, as CUDA's."""

    def __init__(self):
        self.is_open = self.is_ended = False

    def capture_begin(self):
        self.is_open = True

    def capture_end(self):
        self.is_ended = True
        if not self.is_open:
            raise RuntimeError("capture_end: the capture was invalidated")


def test_a_capture_that_fails_is_ended_and_says_why(monkeypatch):
    graph = FakeGraph()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def wait_for_the_gpu(_):
        graph.is_open = False
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        cuda_clock._captured(Round([1], wait_for_the_gpu))
    assert graph.is_ended
    assert gc.isenabled()
    assert cuda_clock._captured(Round([1], lambda _: None)) is graph


def test_a_generator_that_a_failed_capture_has_spoiled_is_in_the_note(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, device: None)
    assert cuda_clock._generator_remark() == ""

    def spoiled(*_, device):
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch, "rand", spoiled)
    assert "torch draws no random numbers (Offset increment" in cuda_clock._generator_remark()


def test_a_row_has_its_share_of_the_floor_and_no_verdicts_without_a_gpu():
    case = cuda_harness.CudaCase({OURS: Round([0], lambda _: None)}, bytes_moved=10)
    row = cuda_harness.run_work(Work("quantise", "4×4", lambda: case), LIMITS, CPU, 0.001)
    assert row.limit == COPY
    assert row.share_of_limit == pytest.approx(10 / 4e12 / (1e-3 * row.times[OURS].median_ms))
    assert row.verdicts == []


@pytest.mark.parametrize("error", [SystemExit("WRONG: off"), RuntimeError("WRONG: off\nmore")])
def test_a_row_that_fails_is_named_and_the_others_go_on(error):
    def fail():
        raise error

    row, reason = cuda_harness.try_work(fail)
    assert row is None
    assert reason == f"{type(error).__name__}: WRONG: off"


class FakePagedBuffer:
    """Ordinary memory in pages, as the CPU's PagedBuffer."""

    forgets = False

    def __init__(self, device, bytes, *, page_bytes, strategy="automatic"):
        self.device, self.bytes, self.page_bytes = device, bytes, page_bytes
        self.page_count = bytes // page_bytes
        self._memory = torch.zeros(bytes, dtype=torch.uint8)

    def memory(self, offset, bytes):
        return self._memory[offset : offset + bytes]

    def begin(self, page, stream):
        memory = self.memory(page * self.page_bytes, self.page_bytes)
        return memory.clone() if self.forgets else memory

    def end(self, page, stream):
        pass

    def join(self, stream):
        pass


def test_paging_counts_each_page_both_ways_and_sees_one_that_is_lost(monkeypatch):
    monkeypatch.setattr(rows_cuda_paging._core, "PagedBuffer", FakePagedBuffer, raising=False)
    (work,) = rows_cuda_paging.works(CPU)
    case = work.prepare()
    assert case.bytes_moved == 2 * 4 * 2**16
    assert LIMITS.at_best(case)[0] == LINK
    monkeypatch.setattr(FakePagedBuffer, "forgets", True)
    with pytest.raises(SystemExit, match="a page was not written back"):
        work.prepare()


# ---- peers


def test_a_peer_that_fails_or_is_wrong_is_left_out_with_the_reason():
    rounds: dict[str, Round] = {}
    notes: list[str] = []

    def wrong(_):
        raise SystemExit("off by far")

    def failing():
        raise RuntimeError("no kernel\nand more")

    cuda_peers.add_peer(rounds, notes, "right", lambda: Round([1], lambda one: one))
    cuda_peers.add_peer(rounds, notes, "wrong", lambda: Round([1], lambda one: one), wrong)
    cuda_peers.add_peer(rounds, notes, "failing", failing)
    assert list(rounds) == ["right"]
    assert notes == ["without wrong: off by far", "without failing: no kernel"]


def test_peers_are_imported_without_a_look_at_a_hub():
    done = run_python(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import os, cuda_peers\n"
        "print(os.environ['HF_HUB_OFFLINE'], sys.modules['kernels'])"
    )
    assert done.stdout.split()[-2:] == ["1", "None"], done.stderr


def test_a_peer_that_cannot_be_imported_is_left_out(monkeypatch):
    monkeypatch.setattr(cuda_peers, "bitsandbytes", None)
    rounds: dict[str, Round] = {}
    for name in (BNB, "PEFT on bitsandbytes"):
        cuda_peers.add_peer(rounds, [], name, lambda: Round([1], lambda one: one))
    assert rounds == {}
    module, reason = cuda_peers._import("no_such_package")
    assert module is None
    assert reason.startswith("no_such_package is missing: ModuleNotFoundError")


# ---- the table


def header(**more: object) -> dict:
    return {
        "gpu": {"device": "A GPU", "driver": "580.1", "cuda": "13.0"},
        "versions": {"torch": "2.11", "bitsandbytes": None, "peft": "0.20"},
        "build": {
            "version": "0.1",
            "cuda_archs": "90a-real",
            "cuda_compiler": "nvcc 13.0",
            "cxx_compiler": "GNU 13",
        },
        "commit": "abc",
        "date": "2026-11-22T00:00:00",
        "limits": {"copy": 4e12, "gemm": 8e14, "link": 1e11},
        **more,
    }


def test_the_table_shows_microseconds_rates_peers_floors_and_goals():
    row = make_row("forward", 1, ours=0.005, bitsandbytes=0.010)
    row.limit, row.share_of_limit, row.bytes_moved = COPY, 0.4, 8_700_000
    row.verdicts = judge(row, "", CUDA_GOALS)
    product = make_row("forward", 2048, ours=0.1)
    product.limit, product.share_of_limit, product.operations = GEMM, 0.87, 6.9e10
    product.notes = ["without torch bf16: broken"]
    failures = {"dX, m = 1, 4096×4096": "RuntimeError: no"}
    text = cuda_report.markdown(
        header(failures=failures, not_begun=["a", "b"], missing_peers=["x is missing"]),
        [row, product],
    )
    first, second = text.splitlines()[2:4]
    assert first == (
        "| forward, m = 1, 4096×4096 | 5.00 (4.50–6.00) | 1,740 GB/s | 2.00× bitsandbytes "
        "| 2.50× copy bandwidth | MISSED ≤ 4.5 µs (5.0 µs); met ≥ 1.5× bitsandbytes (2.00×) |"
    )
    assert "| 100 (90.0–120) | 690 TFLOP/s |" in second
    assert "1.15× bf16 GEMM" in second
    for line in (
        "1 of 2 goals met.",
        "- dX, m = 1, 4096×4096: RuntimeError: no",
        "Not begun, as the time was over: a; b.",
        "- x is missing",
        "- forward, m = 2048, 4096×4096: without torch bf16: broken",
        "Measured floors: copy 4,000 GB/s (read + written), bf16 GEMM 800 TFLOP/s, host link 100.0 "
        "GB/s (both ways).",
    ):
        assert line in text.splitlines()
    assert "A GPU, driver 580.1, CUDA 13.0; torch 2.11" in text


# ---- the program


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_cuda.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2():
    done = run()
    assert done.returncode == 2
    assert "bench_cuda.py: torch sees no GPU" in done.stderr


def test_rows_that_are_not_begun_are_no_failure(tmp_path):
    path = tmp_path / "cuda.json"
    options = ("--device", "cpu", "--quick", "--seconds", "0.004", "--budget", "0")
    done = run(*options, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["failures"] == {}
    assert written["rows"] == []
    expected = [work.name for work in bench_cuda.all_works(["128x256"], CPU, quick=True)]
    assert written["not_begun"] == expected


@pytest.mark.slow
def test_every_row_runs_on_cpu_tensors(tmp_path):
    path = tmp_path / "cuda.json"
    done = run("--device", "cpu", "--quick", "--seconds", "0.004", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["failures"] == {}
    expected = [work.name for work in bench_cuda.all_works(["128x256"], CPU, quick=True)]
    assert [row["work"] for row in written["rows"]] == expected
    assert all(next(iter(row["times"])) == OURS for row in written["rows"])
    again = run("--markdown", str(path))
    assert again.stdout.strip() == done.stdout[done.stdout.index("| Work |") :].strip()


def test_goals_are_data_that_says_what_it_wants():
    for goal in CUDA_GOALS:
        assert isinstance(goal, Goal)
        assert goal.reach > 0
        if goal.against == (LIMIT,):
            assert goal.reach <= 1
