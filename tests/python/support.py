"""Helpers of the tests: bits, layers, and tolerances that are derived instead of chosen."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_native import LoRALinear, NF4Linear, NF4Weight

# Where the tests marked `cuda` run; conftest.py says what "cpu" is good for.
CUDA_TEST_DEVICE = os.environ.get("QLORA_TEST_CUDA_DEVICE", "cuda")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

over_dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda d: str(d)[6:])
over_nesting = pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat: -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def state_bits(module: nn.Module) -> dict[str, bytes]:
    """A copy of everything that a module stores."""
    return {name: bytes(bits(t).tolist()) for name, t in module.state_dict().items()}


def nf4_layer(n: int, k: int, bias: bool = True, **options) -> NF4Linear:
    """An NF4Linear with a random weight and bias."""
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias), **options)


def lora_layer(base: nn.Module, r: int = 4, **options) -> LoRALinear:
    """A LoRALinear whose B is not zero."""
    layer = LoRALinear(base, r, **options)
    nn.init.normal_(layer.lora_b, std=0.5)
    return layer


# ---- a small model


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


NAMES = [
    f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")
]  # its linear layers but the head


# ---- tolerances

FP32_ROUNDOFF = 2.0**-24


class Approximate:
    """A value in fp64, and how far a computation of it that sums in fp32 may be off.

    `@` bounds the error of a sum of K products by K units of roundoff on the sum of their absolute
    values, which holds for every order of summation (Higham 2002, section 3.1); `rounded_to` adds
    half a unit in the last place of a dtype. Errors of the operands are carried along.
    """

    def __init__(self, value: Tensor, error: Tensor | float = 0.0) -> None:
        self.value = value.detach().double()
        self.error = torch.zeros_like(self.value) + error

    @property
    def magnitude(self) -> Tensor:
        return self.value.abs() + self.error

    def __matmul__(self, other: Approximate) -> Approximate:
        rounding = (self.value.shape[-1] + 2) * FP32_ROUNDOFF * (self.magnitude @ other.magnitude)
        carried = self.magnitude @ other.error + self.error @ other.value.abs()
        return Approximate(self.value @ other.value, carried + rounding)

    def __add__(self, other: Approximate) -> Approximate:
        total = self.value + other.value
        error = self.error + other.error
        return Approximate(total, error + FP32_ROUNDOFF * (total.abs() + error))

    def __mul__(self, factor: float | Tensor) -> Approximate:
        """By a factor that is exact but for its own rounding to fp32."""
        total = self.value * factor
        error = self.error * abs(factor)
        return Approximate(total, error + 2 * FP32_ROUNDOFF * (total.abs() + error))

    def t(self) -> Approximate:
        return Approximate(self.value.t(), self.error.t())

    def rounded_to(self, dtype: torch.dtype) -> Approximate:
        info = torch.finfo(dtype)
        # tiny: a subnormal may be flushed to zero.
        return Approximate(self.value, self.error + info.eps / 2 * self.magnitude + info.tiny)


def assert_within(actual: Tensor, expected: Approximate) -> None:
    difference = (actual.detach().double() - expected.value).abs()
    worst = (difference / (expected.error + 1e-300)).nan_to_num(nan=torch.inf).max().item()
    assert actual.shape == expected.value.shape
    assert worst <= 1.0, f"{worst:.3g} times the derived tolerance, off by {difference.max():.3g}"


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    """Within `relative` of each element, or of the largest: where no bound was derived."""
    largest = expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=relative, atol=relative * largest)


def check_against_dense(layer: NF4Linear, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Forward and both gradients, with the tolerance of sums in fp32 and one rounding."""
    x = x.detach().requires_grad_()
    bias = layer.bias
    if bias is not None:
        bias.requires_grad_().grad = None
    y = layer(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], layer.out_features)
    dy = torch.randn_like(y)
    y.backward(dy)

    w = Approximate(layer.dequantize(dtype))
    x_2d = Approximate(x.to(dtype).reshape(-1, layer.in_features))
    dy_2d = Approximate(dy.to(dtype).reshape(-1, layer.out_features))
    expected = x_2d @ w.t()
    if bias is not None:
        expected = expected + Approximate(bias.to(dtype))
    expected = expected.rounded_to(dtype).rounded_to(y.dtype)
    assert_within(y.reshape(-1, layer.out_features), expected)
    expected_dx = (dy_2d @ w).rounded_to(dtype).rounded_to(x.dtype)
    assert x.grad.dtype == x.dtype
    assert_within(x.grad.reshape(-1, layer.in_features), expected_dx)
    if bias is not None:
        ones = Approximate(dy_2d.value.new_ones(1, dy_2d.value.shape[0]))
        expected_db = (ones @ dy_2d).rounded_to(dtype).rounded_to(bias.dtype)
        assert bias.grad.dtype == bias.dtype
        assert_within(bias.grad[None], expected_db)
        bias.requires_grad_(False).grad = None


# ---- LoRA

# The tokens up to which the core's kernels take a product in the tests (see conftest.py): both they
# and the workspace are then tested on every processor.
SWITCH = 4
BATCHES = sorted({1, 2, SWITCH, SWITCH + 1, 33})
N, K = 37, 70  # of the layers that make_base gives

over_bases = pytest.mark.parametrize("kind", ["nf4", "dense"])


def make_base(kind: str, dtype: torch.dtype = torch.float32, n: int = N, k: int = K) -> nn.Module:
    """An NF4Linear, or an nn.Linear that is kept in `dtype`."""
    return nf4_layer(n, k) if kind == "nf4" else nn.Linear(k, n).to(dtype)


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    return base.dequantize(dtype) if isinstance(base, NF4Linear) else base.weight.to(dtype)


def expected_lora_results(
    layer: LoRALinear, x: Tensor, dy: Tensor, mask: Tensor | None = None
) -> dict[str, Approximate]:
    """y and every gradient of 2-D x, with the tolerance of the steps that the docstrings name."""
    dtype = x.dtype
    w = Approximate(dense_weight(layer.base, dtype))
    a, b = (Approximate(f.to(dtype)) for f in (layer.lora_a, layer.lora_b))
    bias = Approximate(layer.base.bias.to(dtype))
    x_, dy_ = Approximate(x), Approximate(dy)
    dropped = x_ if mask is None else Approximate(x.double() * mask.double()).rounded_to(dtype)
    scaling = layer.scaling

    t = (dropped @ a.t()).rounded_to(dtype)
    base = (x_ @ w.t() + bias).rounded_to(dtype)
    y = (base + (t @ b.t()) * scaling).rounded_to(dtype)

    u = ((dy_ @ b) * scaling).rounded_to(dtype)
    dx_base = (dy_ @ w).rounded_to(dtype)
    dx_lora = u @ a
    if mask is not None:
        passed = dx_lora.rounded_to(dtype)
        dx_lora = Approximate(passed.value * mask, passed.error * mask).rounded_to(dtype)
    return {
        "y": y,
        "dx": (dx_base + dx_lora).rounded_to(dtype),
        "da": (u.t() @ dropped).rounded_to(layer.lora_a.dtype),
        "db": ((dy_.t() @ t) * scaling).rounded_to(layer.lora_b.dtype),
    }


def lora_results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, da, db = torch.autograd.grad(y, (x, layer.lora_a, layer.lora_b), dy)
    return {"y": y, "dx": dx, "da": da, "db": db}


# ---- peers


@contextlib.contextmanager
def import_bitsandbytes() -> Iterator[None]:
    """Inside, bitsandbytes imports quietly, and without a look at a hub for faster kernels."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "kernels", None)  # what it would fetch with
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        patch.undo()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# ---- doors


class _PassThrough(TorchDispatchMode):
    """Intercepts every operator and records the names of this library's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qlora_native":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def dispatcher() -> Iterator[list[str]]:
    """Inside, calls take the dispatcher's door; yields the operators that it saw."""
    with _PassThrough() as mode:
        yield mode.seen


# ---- a GPU that lags behind


def delay_the_gpu() -> None:
    """Work queued from here on the current stream starts some 100 ms late, long after the host."""
    torch.cuda._sleep(200_000_000)


@contextlib.contextmanager
def the_host_may_not_wait() -> Iterator[None]:
    """The GPU sleeps at first: if the sleep is over at the end, something has waited for it."""
    torch.cuda.synchronize()
    delay_the_gpu()
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")  # knows of torch's own waits, and where they are
    try:
        yield
        has_waited = slept.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert not has_waited


# ---- codes of another quantiser

NF4_LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def differs_only_near_thresholds(w: Tensor, ours: NF4Weight, codes: Tensor) -> bool:
    """Whether every code (flat, two a byte) is ours, or as near by an error of 1.5 ulp of w/absmax.

    w/absmax as w times the reciprocal of absmax has a rounding of each: ours is off by 2 * 2**-24
    at most, as a part of it. bitsandbytes' CUDA kernel is compiled with --use_fast_math, so its
    reciprocal is off by an ulp, 2**-23, and its quotient by 3 * 2**-24. Of two numbers that are
    off so little, a threshold lies between only if it is within 3 * 2**-24 of the exact quotient:
    2**-22 has room for the products of the errors. The codes are then neighbours. No quotient of
    two bf16 numbers is that near, so of bf16 weights all codes must be ours.
    """
    ours_, theirs = (_unpacked(one)[: w.numel()] for one in (ours.codes.flatten(), codes.flatten()))
    differs = (ours_ != theirs).nonzero().flatten()
    absmax = ours.absmax.double()[differs // ours.tensors.block_size]
    quotient = w.flatten()[differs].double() / absmax
    lower = torch.minimum(ours_, theirs)[differs].long()
    levels = NF4_LEVELS.to(w.device)
    threshold = ((levels[:-1] + levels[1:]) / 2).double()[lower.clamp(max=14)]
    is_near = (quotient - threshold).abs() <= 2.0**-22 * threshold.abs()
    are_neighbours = (ours_.int() - theirs.int()).abs()[differs] == 1
    return bool((is_near & are_neighbours).all())


def _unpacked(codes: Tensor) -> Tensor:
    return torch.stack((codes >> 4, codes & 15), dim=1).flatten()


# ---- a process of its own


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
