from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate.data.order import Order
from orchestrate.data.readplan import plan_reads


@st.composite
def plans(draw: st.DrawFn) -> tuple[Order, int, int]:
    """An order with chunks and windows small enough for several blocks, a number of ranks, and a step to start at."""
    world_size = draw(st.integers(1, 4))
    order = Order(
        draw(st.integers(1, 400)), draw(st.integers(0, 9)),
        global_batch=world_size * draw(st.integers(1, 12)),
        chunk=draw(st.integers(1, 8)), window=draw(st.integers(1, 3)),
    )  # fmt: skip
    return order, world_size, draw(st.integers(0, 30))


@given(plans())
def test_every_sample_that_a_rank_uses_lies_in_one_planned_read(plan: tuple[Order, int, int]) -> None:
    order, world_size, start_step = plan
    for rank in range(world_size):
        blocks = list(islice(plan_reads(order, rank=rank, world_size=world_size, start_step=start_step), 4))
        first = position = start_step * order.global_batch
        for _ in blocks:
            position = order.block_at(position).stop
        positions = np.arange(first, position)
        mine = positions[order.rank_of(positions, world_size) == rank]
        wanted = list(zip(order.epochs(mine).tolist(), order.sample_ids(mine).tolist(), strict=True))
        reads = [read for block in blocks for read in block]
        assert sum(read.uses for read in reads) == len(wanted)
        for block in blocks:
            assert [read.position for read in block] == sorted(read.position for read in block)
        held = Counter((read.epoch, sample_id) for read in reads for sample_id in read.ids)
        assert all(held[use] == 1 for use in wanted)  # blocks of one epoch share no chunk
        used = set(wanted)
        assert all(read.uses == sum((read.epoch, sample_id) in used for sample_id in read.ids) for read in reads)


@given(plans())
def test_ranks_share_the_batch_as_the_read_plan_says(plan: tuple[Order, int, int]) -> None:
    order, world_size, step = plan
    positions = step * order.global_batch + np.arange(order.global_batch)
    owner = order.rank_of(positions, world_size)
    for rank in range(world_size):
        ids, _ = order.rank_slice(step, rank, world_size)
        assert sorted(order.sample_ids(positions[owner == rank]).tolist()) == sorted(ids.tolist())


def test_chunks_of_a_lane_are_read_whole_and_by_one_rank() -> None:
    order = Order(100_000, 0, global_batch=256, chunk=32, window=4)
    reads = [next(plan_reads(order, rank=rank, world_size=8, start_step=0)) for rank in range(8)]
    assert all(len(read.ids) == read.uses == 32 for rank in reads for read in rank)
    starts = [read.ids.start for rank in reads for read in rank]
    assert len(starts) == len(set(starts)) == 256 * 4


def test_a_resume_reads_no_more_than_is_left_of_one_block() -> None:
    order = Order(10_000_000, 0, global_batch=256, chunk=32, window=4)
    steps_of_a_block = 4 * 32
    for step in (0, 1, 100, 127, 128, 30_001):
        (block,) = islice(plan_reads(order, rank=3, world_size=8, start_step=step), 1)
        assert sum(read.uses for read in block) == (steps_of_a_block - step % steps_of_a_block) * 256 // 8


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_substitute_is_a_neighbour_in_the_chunk_and_every_sample_is_named_at_last(epoch: int) -> None:
    order = Order(500, 7, global_batch=20)
    for sample_id in (0, 5, 250, 499):
        choices = [order.substitute(epoch, sample_id, attempt) for attempt in range(1, 33)]
        chunk = order.chunk_of(epoch, sample_id)
        assert {int(order.chunk_of(epoch, choice)) for choice in choices} == {int(chunk)}
        assert {order.substitute(epoch, sample_id, attempt) for attempt in range(33, 533)} == set(range(500))
    assert order.substitute(epoch, 250, 1) == Order(500, 7, global_batch=40).substitute(epoch, 250, 1)
