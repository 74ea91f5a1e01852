from collections.abc import Iterator

import pytest
import torch.distributed as dist

from orchestrate.engine.base import Engine
from orchestrate.engine.ranks import leave_ranks
from tests.engine.stores import small_engine


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Make this process the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    leave_ranks()


@pytest.fixture
def engine(one_rank: None) -> Engine:
    return small_engine()
