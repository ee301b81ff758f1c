"""Which kernel takes a product on the CPU, and that each choice gives the same numbers."""

import pytest
import torch

import qlora_native
from qlora_native import _core
from qlora_native.ops import kernel_choice
from support import FLOAT_DTYPES, check_against_dense, nf4_layer, over_dtypes

pytestmark = pytest.mark.real_kernel_choice


def forced(choice: int) -> dict[str, dict[torch.dtype, int]]:
    return {name: dict.fromkeys(FLOAT_DTYPES, choice) for name in kernel_choice._MAX_TOKENS}


def test_every_set_that_is_built_has_its_row_in_the_tables():
    for name in qlora_native.build_info()["cpu_sets"]:
        assert set(kernel_choice._MAX_TOKENS[name]) == set(FLOAT_DTYPES)
        assert name in kernel_choice._MAX_LORA_TOKENS


@over_dtypes
@pytest.mark.parametrize("choice", [None, 0, 1 << 62], ids=["measured", "workspace", "core"])
@pytest.mark.parametrize(("n", "k"), [(48, 64), (70, 192), (130, 448)])
def test_every_choice_is_the_dense_product(monkeypatch, dtype, choice, n, k):
    if choice is not None:
        monkeypatch.setattr(kernel_choice, "_MAX_TOKENS", forced(choice))
    layer = nf4_layer(n, k)
    for m in (1, 3, 8, 9, 16, 17, 70):
        check_against_dense(layer, torch.randn(m, k, dtype=dtype), dtype)


@pytest.mark.parametrize("limit", [4, 5])
@pytest.mark.parametrize(("k", "block_size"), [(128, 64), (100, 64), (128, 32)])
def test_the_table_decides(monkeypatch, limit, k, block_size):
    table = forced(0)
    is_regular = k % 64 == 0 and block_size >= 64
    used = qlora_native.build_info()["cpu_set"] if is_regular else "scalar"
    table[used] = dict.fromkeys(FLOAT_DTYPES, limit)
    monkeypatch.setattr(kernel_choice, "_MAX_TOKENS", table)
    calls = []
    kernel = _core.nf4_linear
    monkeypatch.setattr(_core, "nf4_linear", lambda *a: calls.append("core") or kernel(*a))
    layer = nf4_layer(24, k, block_size=block_size).eval()
    for tokens in (limit, limit + 1):
        calls.clear()
        layer(torch.randn(tokens, k))
        assert bool(calls) == (tokens <= limit)
