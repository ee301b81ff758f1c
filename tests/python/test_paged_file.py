"""Optimiser state in a file: its errors as Python's, and that it may exceed memory."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_native._core import PagedBuffer, PagedState
from support import run_python

MIB = 1 << 20


def file_system(directory: Path) -> str:
    """Its type, as `ext4`."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


@pytest.fixture
def disk() -> Iterator[Path]:
    """An empty directory whose files are not memory."""
    for parent in (Path(tempfile.gettempdir()), Path.cwd(), Path.home(), Path("/var/tmp")):
        if os.access(parent, os.W_OK) and file_system(parent) not in ("tmpfs", "ramfs"):
            directory = Path(tempfile.mkdtemp(prefix="qlora_native_", dir=parent))
            yield directory
            assert list(directory.iterdir()) == []
            shutil.rmtree(directory)
            return
    pytest.skip("every directory that can be written is on a tmpfs")


def test_a_page_file_makes_the_strategy(tmp_path):
    for directory in (tmp_path, str(tmp_path)):
        buffer = PagedBuffer("cpu", 3 * MIB, page_bytes=MIB, page_file=directory)
        assert (buffer.strategy, buffer.page_count) == ("file", 3)
        assert buffer.make_resident(0) is False
        whole = torch.from_dlpack(buffer.memory(0, buffer.bytes))
        assert not whole.any()
        for page in range(3):
            torch.from_dlpack(buffer.begin(page, 0)).fill_(page + 1)
            buffer.end(page, 0)
        buffer.join(0)
        assert whole[::MIB].tolist() == [1, 2, 3]
        assert buffer.report()["device_bytes"] == 3 * MIB
    assert PagedBuffer("cpu", MIB).make_resident(0) is True
    state = PagedState("cpu", "lion", True, 10**6, strategy="file", page_file=tmp_path)
    assert state.strategy == "file"
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_utf8(tmp_path):
    directory = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(FileNotFoundError) as error:
        PagedBuffer("cpu", MIB, page_file=directory)
    assert error.value.filename == str(directory)
    directory.mkdir()
    assert PagedBuffer("cpu", MIB, page_file=directory).strategy == "file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "file"}, "strategy is file, but there is no page_file"),
        (
            {"strategy": "ordinary", "page_file": "."},
            "page_file is for strategy file, but",
        ),
        (
            {"strategy": "managed", "page_file": "."},
            "strategy is managed, on the CPU want",
        ),
        ({"resident_bytes": 1 << 30}, "resident_bytes is for .* give page_file too"),
        ({"page_file": ".", "resident_bytes": 1}, "resident_bytes is 1, want at least two pages"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=f"PagedBuffer: {message}"):
        PagedBuffer("cpu", 128 * MIB, **options)
    with pytest.raises(ValueError, match=message.replace("two pages", ".*two pages")):
        PagedState("cpu", "adamw", False, 16 * MIB, **options)


def test_a_page_file_is_for_the_cpu():
    with pytest.raises(ValueError, match="page_file is for the CPU, but device is cuda:0"):
        PagedBuffer("cuda:0", MIB, page_file=".")


def test_what_is_no_directory_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="want a directory to make a file in") as missing:
        PagedBuffer("cpu", MIB, page_file=tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")
    with pytest.raises(NotADirectoryError) as no_directory:
        PagedState("cpu", "adamw", True, MIB, page_file=tmp_path / "file")
    assert no_directory.value.filename == str(tmp_path / "file")


def test_a_disk_that_is_too_small_is_an_os_error(tmp_path):
    before = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match=r"no file of \d+ bytes in .* are free") as full:
        PagedState("cpu", "adamw", False, 1 << 50, page_file=tmp_path)
    assert full.value.errno == 28  # ENOSPC
    assert full.value.filename == str(tmp_path)
    assert shutil.disk_usage(tmp_path).free > before // 2
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_is_refused_by_name(tmp_path):
    code = f"""
import os
from qlora_native._core import PagedBuffer
buffer = PagedBuffer("cpu", 1 << 20, page_file={str(tmp_path)!r})
child = os.fork()
if child == 0:
    try:
        buffer.begin(0, 0)
    except NotImplementedError as error:
        assert "PagedBuffer.begin: this process was forked" in str(error)
        del buffer
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
buffer.begin(0, 0)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


# ---- more than memory

# Steps a state of 192 MiB twice, in `page_file` or in memory, and leaves it to the caller what may
# be in memory meanwhile. Parameters, gradients and torch are there before `enter` is called.
STEPS = """
import sys, os, torch
from pathlib import Path
from qlora_native._core import PagedState, PagedStep
MIB = 1 << 20
elements = 24 * MIB
def steps(enter, page_file):
    torch.manual_seed(0)
    params = [torch.zeros(elements // 4) for _ in range(4)]
    grads = [torch.full_like(p, 0.5 + i) for i, p in enumerate(params)]
    counts = [torch.zeros(()) for _ in params]
    enter()
    budget = None if page_file is None else 48 * MIB
    state = PagedState("cpu", "adamw", False, elements, page_bytes=8 * MIB,
                       resident_bytes=budget, page_file=page_file)
    step = PagedStep(state, params, grads, counts, [i * (elements // 4) for i in range(4)],
                     [0, 1, 2, 3], lr=0.25, beta1=0.5, beta2=0.5, eps=0.0, weight_decay=0.0,
                     maximize=False)
    for _ in range(2):
        step.prepare(2, 0)
        step.run()
    assert [c.item() for c in counts] == [2.0] * 4
    for p in params:  # a gradient that does not change: a step of lr each time
        assert max(abs(p.min() + 0.5), abs(p.max() + 0.5)) < 1e-6, p
    return state
"""


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup below this process's own, of version 1 or 2, or a skip that says why not."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    homes = [
        (Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes")
        for _, controllers, path in lines
        if "memory" in controllers.split(",")
    ] + [
        (Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max")
        for _, controllers, path in lines
        if controllers == ""
    ]
    reasons = []
    for home, limit in homes:
        group = home / f"qlora_native_test_{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            reasons.append(str(error))
            continue
        try:
            if not (group / limit).exists():  # version 2 hands out its controllers by name
                reasons.append(f"{home} hands out no memory controller")
                continue
            try:
                (group / limit).write_text(str(limit_bytes))
                swap = group / "memory.swap.max"
                if swap.exists():
                    swap.write_text("0")
            except OSError as error:
                reasons.append(str(error))
                continue
            yield group
            return
        finally:
            group.rmdir()
    pytest.skip(f"no memory cgroup can be made here: {'; '.join(reasons) or 'none is mounted'}")


def run_in_group(group: Path, page_file: Path | None):
    enter = f"lambda: Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))"
    where = None if page_file is None else str(page_file)
    return run_python(f"{STEPS}\nsteps({enter}, {where!r})")


def test_state_may_exceed_the_memory_that_a_process_may_use(disk):
    with memory_group(96 * MIB) as group:
        in_memory = run_in_group(group, None)
        assert in_memory.returncode == -signal.SIGKILL, in_memory.stderr  # so the limit is real
        in_file = run_in_group(group, disk)
        assert in_file.returncode == 0, in_file.stderr


def test_a_budget_is_what_stays_in_the_resident_set(disk):
    code = f"""{STEPS}
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
before = []
state = steps(lambda: before.append(resident()), {str(disk)!r})
grown = resident() - before[0]
assert state.report()["device_bytes"] <= 48 * MIB
assert state.report()["host_bytes"] >= 144 * MIB
assert grown < 64 * MIB, grown / MIB
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
