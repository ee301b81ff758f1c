"""The optimisers' benchmark: its checks find what is wrong, its goals are of rows, all rows run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_optim
import cuda_harness
import cuda_peers
import harness
import report
import rows_optim
import rows_optim_paging
from cuda_device import COPY, LINK, CudaLimits
from goals import BNB, GOALS, LORA_SET, ONE_TENSOR, PREFETCH_LOOP, TINY_SET
from harness import OURS, Case, Work
from optim_kinds import DECAY, KINDS, RATE, Kind, second_gradient, torch_adamw
from optim_steps import OURS_MAY_MISS, PEERS_MAY_MISS, Problem, Steps

BENCHMARKS = Path(bench_optim.__file__).parent
CPU = torch.device("cpu")
ADAMW_32, ADAMW_8, LION_32, LION_8 = KINDS
EXACT = OURS_MAY_MISS[32, torch.float32]
SHAPES = [(128, 3), (5,)]


class PlainLion(torch.optim.Optimizer):
    """Lion by torch in the parameters' dtype but for what a test changes."""

    def __init__(self, params, rate=RATE, *, forgets=False, rounds=None):
        self.forgets, self.rounds = forgets, rounds or (lambda value, dtype: value.to(dtype))
        super().__init__(params, {"lr": rate})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m = self.state[p].get("m", torch.zeros_like(p, dtype=torch.float32))
            g = p.grad.float()
            rate = self.param_groups[0]["lr"]
            stepped = p.float() * (1 - rate * DECAY) - rate * (0.9 * m + 0.1 * g).sign()
            p.copy_(self.rounds(stepped, p.dtype))
            self.state[p]["m"] = m if self.forgets else 0.99 * m + 0.01 * g


def stochastic(value, dtype):
    assert dtype == torch.bfloat16
    drawn = torch.randint(0, 2**16, value.shape, dtype=torch.int32)
    return ((value.view(torch.int32) + drawn) & -(2**16)).view(torch.float32)


def after_two(problem, make):
    steps = Steps(problem, make)
    steps.take_two()
    return steps


# ---- what is checked before it is timed


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}])
def test_the_reference_is_adamw(settings):
    problem = Problem(ADAMW_32, SHAPES)
    steps = after_two(problem, lambda p: torch_adamw(p, **settings))
    problem.check_that_most_fit(EXACT)("torch", steps)


def test_the_reference_is_lion():
    problem = Problem(LION_32, SHAPES)
    problem.check_that_most_fit(EXACT)("plain", after_two(problem, PlainLion))


@pytest.mark.parametrize("may_miss", [EXACT, *OURS_MAY_MISS.values(), PEERS_MAY_MISS])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (LION_32, lambda p: PlainLion(p, forgets=True)),
        (LION_32, lambda p: PlainLion(p, 0.5 * RATE)),
        (LION_32, lambda p: torch_adamw(p, fused=True)),
        (LION_32, lambda p: torch.optim.SGD(p, 0.0)),
        (ADAMW_32, lambda p: torch.optim.SGD(p, 0.0)),
        (ADAMW_32, PlainLion),
        (ADAMW_32, lambda p: torch.optim.AdamW(p, RATE, betas=(0.0, 0.999), weight_decay=DECAY)),
        (ADAMW_32, lambda p: torch.optim.AdamW(p, 0.5 * RATE, weight_decay=DECAY)),
        (ADAMW_32, lambda p: PlainLion(p, float("nan"))),
    ],
)
def test_a_wrong_step_is_seen(kind, make, may_miss):
    problem = Problem(kind, SHAPES)
    steps = after_two(problem, make)
    with pytest.raises(SystemExit, match=rf"WRONG: it: {kind.name}: \d+ of 389 elements are off"):
        problem.check_that_most_fit(may_miss)("it", steps)


def test_a_step_without_weight_decay_is_seen_in_32_bits():
    problem = Problem(ADAMW_32, SHAPES)
    steps = after_two(problem, lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.0))
    with pytest.raises(SystemExit, match="WRONG"):
        problem.check_that_most_fit(EXACT)("it", steps)


def test_one_tensor_of_a_set_that_is_left_out_is_seen():
    problem = Problem(ADAMW_32, [(64, 64), (5,), (64, 64)])
    steps = after_two(problem, lambda p: torch_adamw([p[0], p[2]], fused=True))
    with pytest.raises(SystemExit, match="5 of 8197 elements"):
        problem.check_that_most_fit(EXACT)("it", steps)


def test_the_second_gradient_turns_half_of_lions_steps_round():
    start, gradient = torch.zeros(1000), torch.randn(1000)
    moved = LION_32.two_steps(start, gradient) / RATE
    turned = moved.abs() < 0.1
    assert turned[1::2].all()
    assert not turned[0::2].any()
    assert (second_gradient(gradient).sign() == -gradient.sign()).all()


def test_stochastic_rounding_is_told_from_rounding_to_the_nearest():
    problem = Problem(LION_32, [(2**17,)], torch.bfloat16, rate=1e-5)
    good = after_two(problem, lambda p: PlainLion(p, 1e-5, rounds=stochastic))
    problem.check_stochastic_rounding("it", good)
    nearest = after_two(problem, lambda p: PlainLion(p, 1e-5))
    with pytest.raises(SystemExit, match=r"short of the reference by 0\.\d+ of a step"):
        problem.check_stochastic_rounding("it", nearest)
    with torch.no_grad():
        good.parameters[0][7] += 0.01
    with pytest.raises(SystemExit, match="no neighbour"):
        problem.check_stochastic_rounding("it", good)


# ---- floors


@pytest.mark.parametrize(
    ("kind", "dtype", "bytes_"),
    [
        (ADAMW_32, torch.float32, 28),
        (ADAMW_8, torch.float32, 16 + 1 / 16),
        (LION_32, torch.float32, 20),
        (LION_8, torch.float32, 14 + 1 / 32),
        (ADAMW_32, torch.bfloat16, 22),
        (ADAMW_8, torch.bfloat16, 10 + 1 / 16),
    ],
)
def test_a_parameter_moves_itself_its_gradient_and_its_moments(kind, dtype, bytes_):
    assert kind.moved_bytes(dtype) == bytes_


def test_of_a_file_the_rate_is_shown_and_no_share():
    case = Case({OURS: lambda: None}, bytes_moved=3_000_000, bandwidth="file", notes=["a note"])
    row = harness.run_work(Work("paged", "x", lambda: case), None, "avx2", 0.001, 0)
    assert row.share_of_limit is None
    assert row.notes == ["a note"]
    row.times[OURS] = harness.Times(2.0, 1.9, 2.1, 7)
    assert report.cells(row, goals=False)[-1] == "1.50 GB/s"
    assert report.notes_of([row, row]) == ["- paged, x: a note"]


# ---- rows and goals


def test_every_goal_of_an_optimiser_is_of_a_row_that_there_is():
    works = list(bench_optim.cpu_works(Path("unused")))
    found = {(work.key, work.size) for work in works}
    goals = [goal for goal in GOALS if "AdamW" in goal.key or "Lion" in goal.key]
    assert len(goals) == 11
    assert {(goal.key, size) for goal in goals for size in goal.sizes} <= found
    assert all(goal.sizes for goal in goals)
    small = {work.size for work in bench_optim.cpu_works(Path("unused"), 64)}
    assert not small & {ONE_TENSOR, LORA_SET, TINY_SET}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_names_of_rows_are_distinct(device):
    works = list(bench_optim.cuda_works(torch.device(device), Path("unused")))
    names = [work.name for work in works]
    assert len(names) == len(set(names))
    names = [work.name for work in bench_optim.cpu_works(Path("unused"))]
    assert len(names) == len(set(names))


def test_a_lora_set_is_of_448_tensors_and_29_million_parameters():
    shapes = rows_optim.lora_set(1)
    assert len(shapes) == len(rows_optim.tiny_set(1)) == 448
    assert sum(a * b for a, b in shapes) == 224 * 2 * 16 * 4096


def test_what_pages_nothing_is_no_contender():
    problem, notes = Problem(ADAMW_32, SHAPES), []
    rounds = {}
    rows_optim._add_bitsandbytes(problem, rounds, notes, paged=True)
    assert rounds == {}
    assert notes == [
        f"without {BNB} paged: Paged optimizers are not supported on CPU. Falling back to "
        "non-paged optimizer behavior."
    ]


def test_a_peer_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setattr(rows_optim, "bitsandbytes", None)
    notes = []
    rows_optim._add_bitsandbytes(Problem(ADAMW_32, SHAPES), {}, notes)
    assert notes == [f"without {BNB}: it cannot be imported"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_of_torchs_and_bitsandbytes_steps_has_all_its_peers(kind: Kind):
    case = rows_optim._with_peers(kind, [(256, 16), (16, 256)])
    torchs = {"AdamW": ["torch fused"], "Lion": [rows_optim.YARDSTICK]}[kind.algorithm]
    if kind == ADAMW_8:
        torchs = ["torch fused, 32-bit"]
    if kind == ADAMW_32:
        torchs.append("torch foreach")
    assert list(case.contenders) == [OURS, *torchs, BNB]
    assert case.bytes_moved == int(kind.moved_bytes(torch.float32) * 2 * 256 * 16)


def test_a_plain_loop_writes_a_file_that_goes_with_it(tmp_path):
    loop = rows_optim_paging._PlainLoop(tmp_path, 2**18, 2**16)
    loop()
    assert [int(page.unique()) for page in loop._pages] == [2, 2, 2, 2]
    assert list(tmp_path.iterdir()) == []


# ---- the program


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_optim.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2():
    done = run("--device", "cuda")
    assert done.returncode == 2
    assert "bench_optim.py: torch sees no GPU" in done.stderr


@pytest.mark.slow
def test_every_row_runs_and_is_right(tmp_path):
    path = tmp_path / "optim.json"
    options = ("--shrink", "64", "--quick", "--seconds", "0.004", "--settle", "0", "--threads", "1")
    state = ("--folder", str(tmp_path), "--no-limits", "--force", "--json", str(path))
    done = run(*options, *state)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    expected = [work.name for work in bench_optim.cpu_works(tmp_path, 64)]
    assert [row["work"] for row in rows] == expected
    assert all(next(iter(row["times"])) == OURS for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["optim.json"]
    again = run("--markdown", str(path))
    assert again.stdout.strip() in done.stdout


@pytest.mark.slow
def test_every_row_of_a_gpu_runs_on_cpu_tensors(tmp_path):
    limits = CudaLimits(copy=4e12, gemm=8e14, link=1e11)
    rows = {}
    for work in bench_optim.cuda_works(CPU, tmp_path, 64):
        rows[work.name] = row = cuda_harness.run_work(work, limits, CPU, 0.001)
        assert next(iter(row.times)) == OURS
        moves_over_link = "a quarter resident" in row.key or row.key == "paging"
        assert row.limit == (LINK if moves_over_link else COPY)
    paged = next(row for row in rows.values() if "a quarter resident" in row.key)
    assert list(paged.times)[:3] == [OURS, "ordinary memory", PREFETCH_LOOP]
    missing = {note.split(":")[0] for row in rows.values() for note in row.notes}
    assert missing <= {f"without {BNB} paged"}
    assert not cuda_peers.MISSING
