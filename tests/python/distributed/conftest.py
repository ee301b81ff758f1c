"""The two processes that all tests of this folder share."""

from collections.abc import Iterator

import pytest
import rank_models
import torch.distributed as dist
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two gloo processes; `ranks.run(function, ...)` calls it on both."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    processes = Ranks()
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def sharding_ranks(ranks: Ranks) -> Ranks:
    """The same, where this torch's FSDP2 shards parameters of bytes."""
    refusal = ranks.run(rank_models.refusal_of_bytes)[0]
    if refusal is not None:
        assert "only Tensors of floating point dtype can require gradients" in refusal
        pytest.skip(f"this torch's FSDP2 shards no integer parameters: {refusal}")
    return ranks
