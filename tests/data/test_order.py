import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrate.data.order import Order, fingerprint, shuffled


@settings(max_examples=80, deadline=None)
@given(
    num_samples=st.integers(1, 2000),
    seed=st.integers(-(2**70), 2**70),
    lanes=st.integers(1, 48),
    batch_per_lane=st.integers(1, 6),
    chunk=st.integers(1, 40),
    window=st.integers(1, 20),
)
@example(num_samples=1, seed=0, lanes=48, batch_per_lane=6, chunk=32, window=16)
@example(num_samples=31, seed=0, lanes=1, batch_per_lane=1, chunk=32, window=1)
@example(num_samples=6000, seed=0, lanes=128, batch_per_lane=1, chunk=32, window=16)
@example(num_samples=300, seed=0, lanes=1, batch_per_lane=1, chunk=1, window=1)
def test_every_epoch_holds_each_sample_exactly_once(
    num_samples: int, seed: int, lanes: int, batch_per_lane: int, chunk: int, window: int
) -> None:
    order = Order(num_samples, seed, global_batch=lanes * batch_per_lane, lanes=lanes, chunk=chunk, window=window)
    ids = order.sample_ids(np.arange(3 * num_samples)).reshape(3, num_samples)
    assert (np.sort(ids) == np.arange(num_samples)).all()


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 500), global_batch=st.integers(1, 300), first=st.integers(0, 20))
def test_batches_are_full_and_tile_the_stream(num_samples: int, global_batch: int, first: int) -> None:
    order = Order(num_samples, 1, global_batch=global_batch)
    ids, epochs = order.batch(first)
    positions = np.arange(first * global_batch, (first + 1) * global_batch)
    assert sorted(zip(ids, epochs, strict=True)) == sorted(
        zip(order.sample_ids(positions), positions // num_samples, strict=True)
    )


def test_batches_that_straddle_epochs_show_each_sample_once_an_epoch() -> None:
    order = Order(50_021, 5, global_batch=240)
    num_steps = 3 * 50_021 // 240
    batches = [order.batch(step) for step in range(num_steps + 1)]
    ids, epochs = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    for epoch in range(3):
        assert (np.sort(ids[epochs == epoch]) == np.arange(50_021)).all()


@pytest.mark.parametrize("num_samples", [20_003, 100])  # 100 samples: a batch holds whole epochs
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 24, 30, 40, 48, 60, 80, 120, 240])
def test_ranks_together_hold_the_global_batch(num_samples: int, world_size: int) -> None:
    order = Order(num_samples, 7, global_batch=240)
    for step in (0, 41, 83, 84):  # 83 straddles the first epoch of the larger set
        runs = [order.rank_slice(step, rank, world_size) for rank in range(world_size)]
        assert {len(ids) for ids, _ in runs} == {240 // world_size}
        joined = np.concatenate([ids for ids, _ in runs])
        np.testing.assert_array_equal(joined, order.batch(step)[0])
        assert fingerprint(joined) == fingerprint(order.batch(step)[0])


def test_any_position_is_found_alone_as_in_a_run() -> None:
    order = Order(6_000, 3, global_batch=128)
    positions = np.random.default_rng(0).integers(0, 30_000, (7, 11))
    alone = [[int(Order(6_000, 3, global_batch=128).sample_ids(p)) for p in row] for row in positions]
    np.testing.assert_array_equal(order.sample_ids(positions), alone)


def test_order_is_the_same_for_ever() -> None:
    # A change here breaks the resume of every run in progress and the identity of every published one.
    ids, _ = Order(60_000, 42, global_batch=256).batch(10_000)
    assert fingerprint(ids) == "439e70bd904839b3"
    assert shuffled(8, 0).tolist() == [0, 7, 5, 3, 4, 1, 2, 6]


def test_epochs_and_seeds_differ() -> None:
    order = Order(6_000, 0, global_batch=128)
    first, second = order.sample_ids(np.arange(12_000)).reshape(2, 6_000)
    other = Order(6_000, 1, global_batch=128).sample_ids(np.arange(6_000))
    # Two random permutations agree at 1 place on average; 10 has a probability below 1e-7.
    assert (first == second).sum() < 10
    assert (first == other).sum() < 10


@pytest.mark.parametrize(("num_samples", "global_batch"), [(6_000, 128), (60_000, 256), (1_500, 512)])
def test_batches_mix_a_sorted_dataset(num_samples: int, global_batch: int) -> None:
    # Ten classes in order of id, the worst case. An ideal shuffle puts about a tenth of a batch in each class; half
    # and double that is more than four standard deviations away at these batch sizes.
    order = Order(num_samples, 0, global_batch=global_batch)
    for step in range(2 * num_samples // global_batch):
        counts = np.bincount(order.batch(step)[0] * 10 // num_samples, minlength=10)
        assert counts.min() > 0
        assert counts.max() < 2.5 * global_batch / 10


def test_neighbours_part_ways_in_the_next_epoch() -> None:
    # Samples of one batch that were in one chunk must not always be together: the grid of chunks shifts.
    order = Order(60_000, 0, global_batch=256)
    phases = {order._grid(epoch).phase for epoch in range(20)}
    assert len(phases) > 10


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_chunk_is_read_by_one_rank(epoch: int) -> None:
    # A chunk belongs to a lane, and a lane to a rank: else several ranks would fetch the same bytes.
    order = Order(100_003, 0, global_batch=64, lanes=8)
    readers: dict[int, set[int]] = {}
    phase, first_step = order._grid(epoch).phase, -(-epoch * 100_003 // 64)
    for step in range(first_step, first_step + 8 * 16 * 32 // 64 - 1):  # within the first block of the epoch
        for rank in range(4):
            for sample in order.rank_slice(step, rank, 4)[0]:
                readers.setdefault((int(sample) - phase) // 32, set()).add(rank)
    assert {len(ranks) for ranks in readers.values()} == {1}


def test_a_billion_samples_need_no_array_of_epoch_length() -> None:
    tracemalloc.start()
    ids, _ = Order(1_000_000_000, 0, global_batch=4_096).batch(123_456)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert len(np.unique(ids)) == 4_096
    assert ids.max() < 1_000_000_000


def test_lanes_are_the_largest_divisor_up_to_512() -> None:
    lanes = {batch: Order(10, 0, global_batch=batch).lanes for batch in (1, 100, 512, 521, 1000, 4096)}
    assert lanes == {1: 1, 100: 100, 512: 512, 521: 1, 1000: 500, 4096: 512}


def test_ranks_that_do_not_divide_the_batch_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(ValueError, match=r"batch of 100 .* 3 equal parts; nearest rank counts: 2 and 4"):
        Order(10, 0, global_batch=100).rank_slice(0, 0, 3)
    with pytest.raises(ValueError, match="nearest rank counts: 100"):
        Order(10, 0, global_batch=100).rank_slice(0, 0, 128)
    with pytest.raises(ValueError, match="rank 4: must be from 0 to 3"):
        Order(10, 0, global_batch=100).rank_slice(0, 4, 4)


@pytest.mark.parametrize("name", ["num_samples", "global_batch", "lanes", "chunk", "window"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"num_samples": 10, "global_batch": 4, "lanes": 2, "chunk": 2, "window": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: 0, must be at least 1"):
        Order(sizes.pop("num_samples"), 0, **sizes)


def test_lanes_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="lanes: 3 does not divide"):
        Order(10, 0, global_batch=4, lanes=3)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions count from 0"):
        Order(10, 0, global_batch=4).sample_ids([3, -1])


def test_fingerprint_sees_order_and_content() -> None:
    assert len(fingerprint([1, 2, 3])) == 16
    assert len({fingerprint(ids) for ids in ([1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 4])}) == 4
    assert fingerprint(np.array([1, 2], dtype=np.int32)) == fingerprint([1, 2])


@pytest.mark.parametrize("num_items", [0, 1, 2, 1000])
def test_shuffled_is_a_permutation(num_items: int) -> None:
    assert sorted(shuffled(num_items, 3).tolist()) == list(range(num_items))
