"""The processes that the other tests run in: what they report, and that they never hang."""

import time

import pytest
import torch.distributed as dist
from ranks import RankError


def sum_of_ranks() -> float:
    import torch

    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item()


def raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 gives up")
    dist.barrier()


def wait_for_ever_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        time.sleep(1000)


def test_a_function_runs_on_both_ranks(ranks):
    assert ranks.run(sum_of_ranks) == [3.0, 3.0]


def test_an_error_of_one_rank_is_shown_and_ends_both(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 0 .*barrier.*rank 1: .*rank 1 gives up"):
        ranks.run(raise_on_rank_one)
    assert ranks.run(sum_of_ranks) == [3.0, 3.0]


def test_a_rank_that_hangs_is_ended_and_its_stack_shown(ranks):
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 0 has not .*wait_for_ever.*rank 1: came back"):
        ranks.run(wait_for_ever_on_rank_zero, seconds=2)
    assert time.monotonic() - begin < 20
    assert ranks.run(sum_of_ranks) == [3.0, 3.0]
