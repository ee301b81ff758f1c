"""What is timed must be right first: references that share no code with what they check."""

import torch
from torch import Tensor

# Of a result's error, relative to the largest reference value. One rounding to bf16 is at most
# 2^-9; fp32 sums over k = 14,336 measure below 2e-6, and sums in bf16 would be a hundred times off.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}
PEER_TOLERANCE = 2**-5  # only that a peer does the same work: some round scales to bf16
CHECKED_ROWS = 64


def assert_close(what: str, result: Tensor, reference: Tensor, tolerance: float) -> None:
    """Stop the run if a result is wrong."""
    reference = reference.double()
    error = (result.double() - reference).abs().max() / reference.abs().max()
    if not error <= tolerance:  # NaN is wrong, too
        raise SystemExit(
            f"WRONG: {what}: off by {error:.2e} of the largest value, want {tolerance:.1e}"
        )


def some_rows(m: int) -> Tensor:
    """Indices of rows to check: at most 64, evenly spread from the first to the last."""
    return torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).round().long()


def assert_product(what: str, result: Tensor, x: Tensor, w: Tensor, tolerance: float) -> None:
    """`result = x · wᵀ`, on some rows in fp64, w being what the layer stands for."""
    rows = some_rows(x.shape[0])
    reference = x.detach()[rows].double() @ w.double().T
    assert_close(what, result.detach()[rows], reference, tolerance)
