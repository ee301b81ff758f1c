"""PagedBuffer as Python sees it: tensors over its memory, its account, its errors."""

import gc

import pytest
import torch

from qlora_native._core import PagedBuffer, PagedMemory
from support import run_python

PAGE = 65536


def tensor_of(memory: PagedMemory) -> torch.Tensor:
    return torch.from_dlpack(memory)


def test_pages_are_parts_of_one_memory():
    buffer = PagedBuffer("cpu", 2 * PAGE + 100, page_bytes=PAGE)
    assert (buffer.device, buffer.strategy) == ("cpu", "ordinary")
    assert (buffer.bytes, buffer.page_bytes, buffer.page_count) == (2 * PAGE + 100, PAGE, 3)
    whole = tensor_of(buffer.memory(0, buffer.bytes))
    assert whole.dtype == torch.uint8
    assert whole.device.type == "cpu"
    assert whole.data_ptr() == buffer.memory(0, 1).address
    for page in range(buffer.page_count):
        piece = buffer.begin(page, 0)
        assert piece.address == whole.data_ptr() + page * PAGE
        tensor_of(piece).fill_(page + 1)
        buffer.end(page, 0)
    buffer.join(0)
    assert whole.tolist() == [1] * PAGE + [2] * PAGE + [3] * 100


def test_a_tensor_keeps_the_buffer_and_the_last_one_lets_go():
    buffer = PagedBuffer("cpu", PAGE)
    tensor = tensor_of(buffer.memory(64, 16)).view(torch.float32)
    del buffer
    gc.collect()
    tensor.fill_(2.5)
    assert tensor.tolist() == [2.5] * 4


def test_a_capsule_that_nobody_takes_lets_go():
    buffer = PagedBuffer("cpu", PAGE)
    for _ in range(3):
        buffer.memory(0, PAGE).__dlpack__()
    capsule = buffer.memory(0, 4).__dlpack__()
    del buffer
    assert torch.from_dlpack(capsule).shape == (4,)


def test_memory_comes_and_goes_without_a_leak():
    code = """
import resource, torch
from qlora_native._core import PagedBuffer
def work():
    buffer = PagedBuffer("cpu", 64 << 20)
    torch.from_dlpack(buffer.memory(0, 64 << 20)).fill_(1)
def peak_kib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work()
before = peak_kib()
for _ in range(20): work()
assert peak_kib() - before < 256 << 10, (before, peak_kib())
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_other_threads_run_while_a_buffer_is_freed():
    # The interpreter takes the GIL from nobody here: the thread runs when the GIL is let go.
    code = """
import sys, threading, time, torch
from qlora_native._core import PagedBuffer
sys.setswitchinterval(1000)
turns, is_over = 0, False
def take_turns():
    global turns
    while not is_over:
        turns += 1
        time.sleep(0)
thread = threading.Thread(target=take_turns)
thread.start()
seen = []
for keep_tensor in (False, True):
    for _ in range(20):
        owner = PagedBuffer("cpu", 256 << 20)
        tensor = torch.from_dlpack(owner.memory(0, owner.bytes)).fill_(1)
        if keep_tensor:
            owner = tensor
        del tensor
        before = turns
        del owner
        is_seen = turns > before
        if is_seen:
            break
    seen.append(is_seen)
is_over = True
thread.join()
assert seen == [True, True], seen
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_other_devices_and_copies_are_refused():
    memory = PagedBuffer("cpu", 16).memory(0, 16)
    assert memory.__dlpack_device__() == (1, 0)
    memory.__dlpack__(dl_device=(1, 0), copy=False, max_version=(1, 0))
    with pytest.raises(BufferError, match="this memory is on cpu and is not copied elsewhere"):
        memory.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match="not copied"):
        memory.__dlpack__(copy=True)


def test_no_bytes_are_no_pages():
    buffer = PagedBuffer("cpu", 0)
    assert buffer.page_count == 0
    assert tensor_of(buffer.memory(0, 0)).numel() == 0
    with pytest.raises(ValueError, match="page is 0, want 0 to -1"):
        buffer.begin(0, 0)


def test_on_the_cpu_nothing_moves():
    buffer = PagedBuffer("cpu", 3 * PAGE, page_bytes=PAGE)
    buffer.prefetch_to_device(0, 3 * PAGE, 0)
    buffer.prefetch_to_host(0, 3 * PAGE, 0)
    assert buffer.report() == {
        "unknown_bytes": 0,
        "host_bytes": 3 * PAGE,
        "device_bytes": 0,
        "moved_to_device_bytes": 0,
        "moved_to_host_bytes": 0,
        "refused_bytes": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("cpu", -1), {}, "bytes is -1, want 0 to"),
        (("cpu", 1), {"page_bytes": 4097}, "page_bytes is 4097, want a positive multiple of 4096"),
        (("cpu", 1), {"strategy": "managed"}, "strategy is managed, on the CPU want automatic"),
        (
            ("cpu", 1),
            {"strategy": "disk"},
            "strategy is 'disk', want automatic, ordinary, file, man",
        ),
        (("cpu", 1), {"resident_bytes": 1 << 30}, "on the CPU give page_file too"),
        (("cuda", 1), {}, "device is 'cuda', want cpu or cuda:N"),
        (("cuda:", 1), {}, "device is 'cuda:', want cpu or cuda:N"),
        (("cuda:-1", 1), {}, "device is 'cuda:-1'"),
        (("cuda:99999999999", 1), {}, "device is 'cuda:99999999999'"),
        (("xpu", 1), {}, "device is 'xpu'"),
    ],
)
def test_what_cannot_be_right_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=f"PagedBuffer: .*{message}"):
        PagedBuffer(*arguments, **options)


def test_calls_out_of_turn_are_named():
    buffer = PagedBuffer("cpu", PAGE)
    with pytest.raises(ValueError, match="page 0 is not in use; begin it first"):
        buffer.end(0, 0)
    buffer.begin(0, 0)
    with pytest.raises(ValueError, match="page 0 is in use; end it first"):
        buffer.begin(0, 0)
    with pytest.raises(ValueError, match="the range is 2 bytes from 65535 on"):
        buffer.memory(65535, 2)


def test_host_memory_that_runs_out_is_pythons_own_error():
    with pytest.raises(MemoryError, match="no 1152921504606846976 bytes of host memory"):
        PagedBuffer("cpu", 1 << 60)


# ---- on a GPU


def gpu_bytes(pages: int, page_bytes: int) -> int:
    """The size of a buffer of so many pages, unless a quarter of what is free is less."""
    bytes_ = pages * page_bytes
    if bytes_ > torch.cuda.mem_get_info()[0] // 4:
        pytest.skip("too little free GPU memory")
    return bytes_


def gpu_buffer(pages: int, page_bytes: int, strategy: str, resident: int | None) -> PagedBuffer:
    budget = None if resident is None else resident * page_bytes
    size = gpu_bytes(pages, page_bytes)
    try:
        return PagedBuffer(
            "cuda:0", size, page_bytes=page_bytes, strategy=strategy, resident_bytes=budget
        )
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("strategy", "resident"),
    [("managed", None), ("managed", 2), ("managed", 4), ("pinned", None), ("pinned", 2)],
)
@pytest.mark.parametrize("page_bytes", [2 << 20, 8 << 20])
def test_steps_on_a_gpu_give_the_bytes_of_the_cpu(page_bytes, strategy, resident):
    pages = 7
    buffer = gpu_buffer(pages, page_bytes, strategy, resident)
    values = torch.randn(pages * page_bytes // 4)
    state = tensor_of(buffer.memory(0, buffer.bytes)).view(torch.float32)
    buffer.join(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert not state.any()
    state.copy_(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in range(3):
            for page in range(pages):
                piece = buffer.begin(page, stream.cuda_stream)
                memory = tensor_of(piece).view(torch.float32)
                assert memory.is_cuda
                memory.mul_(0.5).add_(float(step))
                buffer.end(page, stream.cuda_stream)
        buffer.join(stream.cuda_stream)
    stream.synchronize()
    for step in range(3):
        values = values * 0.5 + float(step)
    assert torch.equal(state.cpu(), values)
    report = buffer.report()
    assert report["unknown_bytes"] + report["host_bytes"] + report["device_bytes"] == buffer.bytes
    if resident is not None:
        assert report["device_bytes"] <= resident * page_bytes


@pytest.mark.cuda
def test_device_memory_that_runs_out_is_torchs_error_and_nothing_stays():
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError, match="bytes of device memory"):
            PagedBuffer("cuda:0", 1 << 46, page_bytes=1 << 44, strategy="pinned")
    assert torch.cuda.mem_get_info()[0] >= before - (64 << 20)  # what the context itself took


@pytest.mark.cuda
def test_without_torch_it_is_pythons_error():
    code = """
import sys, types
import qlora_native
from qlora_native._core import PagedBuffer
torch, sys.modules["torch"] = sys.modules["torch"], types.ModuleType("torch")
try:
    PagedBuffer("cuda:0", 1 << 46, page_bytes=1 << 44, strategy="pinned")
except MemoryError as error:
    assert "bytes of device memory" in str(error)
else:
    raise AssertionError("no error")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.cuda
def test_paging_refuses_to_be_captured():
    buffer = gpu_buffer(2, 2 << 20, "pinned", None)
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(NotImplementedError, match="records a CUDA graph"),
    ):
        buffer.begin(0, torch.cuda.current_stream().cuda_stream)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_stream_of_another_gpu_is_refused_by_name():
    buffer = gpu_buffer(2, 2 << 20, "pinned", None)
    stream = torch.cuda.Stream(device="cuda:1")
    with pytest.raises(ValueError, match="belongs to cuda:1, but the memory is on cuda:0"):
        buffer.begin(0, stream.cuda_stream)
