import hashlib
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrate.data.cache import DiskCache
from orchestrate.errors import DataError

A, B = ("a" * 64, "b" * 64)


def contents(shard: str, start: int, stop: int) -> bytes:
    """Bytes of a made-up shard: each place and each shard has its own."""
    blocks = (hashlib.sha256(f"{shard}{block}".encode()).digest() for block in range(start // 32, stop // 32 + 1))
    return b"".join(blocks)[start % 32 :][: stop - start]


def on_disk(folder: Path) -> int:
    """Sum the files as they are, whatever the index says."""
    total = 0
    for path in (folder / "files").rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # evicted while we looked
            continue
    return total


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DiskCache]:
    with closing(DiskCache(tmp_path / "cache", max_bytes=1000)) as cache:
        yield cache


def fill(cache: DiskCache, shard: str, start: int, stop: int, hold: str = "me") -> bool:
    return cache.admit(shard, start, contents(shard, start, stop), hold=hold)


def test_admitted_bytes_come_back_whole_and_in_parts(cache: DiskCache) -> None:
    assert fill(cache, A, 100, 300)
    assert cache.read(A, 100, 300) == contents(A, 100, 300)
    assert cache.read(A, 150, 151) == contents(A, 150, 151)
    assert cache.missing(A, 100, 300) == []


def test_a_range_is_put_together_from_neighbouring_files(cache: DiskCache) -> None:
    for start in (200, 0, 100):
        assert fill(cache, A, start, start + 100)
    assert cache.read(A, 50, 250) == contents(A, 50, 250)


def test_gaps_are_listed_and_nothing_is_read_across_them(cache: DiskCache) -> None:
    fill(cache, A, 100, 200)
    fill(cache, A, 300, 400)
    assert cache.missing(A, 50, 450) == [(50, 100), (200, 300), (400, 450)]
    assert cache.missing(A, 120, 180) == []
    assert cache.missing(B, 0, 10) == [(0, 10)]
    assert [cache.read(A, *place) for place in ((50, 150), (150, 350), (350, 450), (210, 220))] == [None] * 4


def test_what_is_there_is_not_stored_twice(cache: DiskCache) -> None:
    fill(cache, A, 100, 200)
    fill(cache, A, 300, 400)
    assert fill(cache, A, 0, 500)
    assert cache.used_bytes() == on_disk(cache.folder) == 500
    assert cache.read(A, 0, 500) == contents(A, 0, 500)


def test_shards_of_other_contents_never_meet(cache: DiskCache) -> None:
    """Two datasets with equal file names and ranges: names play no part."""
    fill(cache, A, 0, 100)
    assert cache.read(B, 0, 100) is None
    fill(cache, B, 0, 100)
    assert (cache.read(A, 0, 100), cache.read(B, 0, 100)) == (contents(A, 0, 100), contents(B, 0, 100))


def test_the_first_released_goes_first(cache: DiskCache) -> None:
    for start in range(0, 1000, 200):
        fill(cache, A, start, start + 200)
    for start in (400, 0, 800):
        cache.release(A, start, start + 200, "me")
    assert fill(cache, B, 0, 200)
    assert cache.missing(A, 0, 1000) == [(400, 600)]
    assert fill(cache, B, 200, 400)
    assert cache.missing(A, 0, 1000) == [(0, 200), (400, 600)]


def test_a_hold_on_released_bytes_saves_them(cache: DiskCache) -> None:
    fill(cache, A, 0, 500)
    fill(cache, A, 500, 1000)
    cache.release(A, 0, 1000, "me")
    cache.hold(A, 10, 20, "again")
    assert fill(cache, B, 0, 500)
    assert cache.missing(A, 0, 1000) == [(500, 1000)]


def test_held_bytes_stay_and_newcomers_are_refused(cache: DiskCache) -> None:
    fill(cache, A, 0, 600, hold="first")
    cache.hold(A, 0, 600, "second")
    fill(cache, A, 600, 1000, hold="first")
    cache.release(A, 0, 1000, "first")
    assert not fill(cache, B, 0, 500)  # 400 are free to go, but that is not enough
    assert cache.missing(A, 0, 1000) == []  # and nothing went for nothing
    assert fill(cache, B, 0, 400)
    assert cache.missing(A, 0, 1000) == [(600, 1000)]
    cache.release(A, 0, 600, "second")
    assert fill(cache, B, 400, 1000)


def test_a_hold_may_come_before_the_bytes(cache: DiskCache) -> None:
    cache.hold(A, 0, 100, "early")
    fill(cache, A, 0, 500, hold="")
    fill(cache, B, 0, 500, hold="")
    assert fill(cache, B, 500, 1000, hold="")
    assert cache.missing(A, 0, 500) == []
    assert cache.missing(B, 0, 1000) == [(0, 500)]


def test_bytes_that_nobody_holds_may_go_at_once(cache: DiskCache) -> None:
    assert fill(cache, A, 0, 1000, hold="")
    assert fill(cache, B, 0, 1000, hold="")
    assert cache.missing(A, 0, 1000) == [(0, 1000)]


def test_more_than_the_bound_is_refused(cache: DiskCache) -> None:
    fill(cache, A, 0, 10, hold="")
    assert not fill(cache, A, 100, 1101)
    assert cache.used_bytes() == 10


def test_room_is_reserved_before_the_bytes_are_there(cache: DiskCache) -> None:
    assert fill(cache, A, 100, 200)
    gaps = cache.reserve(A, 0, 800, hold="me")
    assert gaps is not None
    assert [(gap.start, gap.stop) for gap in gaps] == [(0, 100), (200, 800)]
    assert cache.used_bytes() == 800
    assert cache.reserve(B, 0, 300, hold="me") is None
    assert cache.missing(A, 0, 800) == [(0, 100), (200, 800)]
    assert cache.fill(gaps[1], contents(A, 200, 800))
    cache.give_up(gaps[0])
    assert cache.read(A, 100, 800) == contents(A, 100, 800)
    assert cache.used_bytes() == 700
    assert cache.reserve(B, 0, 300, hold="me") is not None


def test_what_was_released_while_it_was_on_its_way_may_go_at_once(cache: DiskCache) -> None:
    (gap,) = cache.reserve(A, 0, 600, hold="me") or []
    cache.release(A, 0, 600, "me")
    assert cache.fill(gap, contents(A, 0, 600))
    assert fill(cache, B, 0, 600)


def test_forgotten_bytes_are_gone_though_held(cache: DiskCache) -> None:
    fill(cache, A, 0, 100)
    fill(cache, A, 100, 200)
    cache.forget(A, 50, 60)
    assert cache.missing(A, 0, 200) == [(0, 100)]
    assert on_disk(cache.folder) == 100
    assert fill(cache, A, 0, 100)
    assert cache.read(A, 0, 200) == contents(A, 0, 200)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 50)])
def test_files_that_lost_bytes_are_read_from_the_store_again(cache: DiskCache, damage: Callable[[Path], None]) -> None:
    fill(cache, A, 0, 100)
    damage(next((cache.folder / "files").glob("*/*")))
    assert cache.read(A, 0, 100) is None
    assert cache.missing(A, 0, 100) == [(0, 100)]
    assert fill(cache, A, 0, 100)
    assert cache.read(A, 0, 100) == contents(A, 0, 100)


def test_a_later_process_finds_what_an_earlier_one_left(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, max_bytes=1000)) as first:
        fill(first, A, 0, 400)
        fill(first, A, 400, 800)
        first.release(A, 400, 800, "me")
    with closing(DiskCache(tmp_path, max_bytes=1000)) as second:
        assert second.read(A, 0, 800) == contents(A, 0, 800)
        assert fill(second, B, 0, 1000)  # nobody holds the old ones any more


def test_a_lower_bound_holds_from_the_start(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, max_bytes=1000)) as cache:
        for start in range(0, 1000, 100):
            fill(cache, A, start, start + 100, hold="")
    with closing(DiskCache(tmp_path, max_bytes=250)):
        assert on_disk(tmp_path) == 200


def test_strays_are_swept_by_the_first_process_only(tmp_path: Path) -> None:
    with closing(DiskCache(tmp_path, max_bytes=1000)) as cache:
        fill(cache, A, 0, 100)
        kept = next((tmp_path / "files").glob("*/*"))
        stray = kept.with_name(f"{A}-500-600.99")
        for path in (stray, stray.with_suffix(".99.part")):
            path.write_bytes(b"1" * 100)
        with closing(DiskCache(tmp_path, max_bytes=1000)):
            assert stray.exists()  # it may be a file of the process that is at work
    with closing(DiskCache(tmp_path, max_bytes=1000)) as cache:
        assert list((tmp_path / "files").glob("*/*")) == [kept]
        assert cache.used_bytes() == 100
        kept.unlink()
    with closing(DiskCache(tmp_path, max_bytes=1000)) as cache:
        assert cache.used_bytes() == 0


def test_a_cache_larger_than_its_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a cache of .* its disk has room for .* lower the bound"):
        DiskCache(tmp_path, max_bytes=1 << 60)


def test_a_damaged_index_is_named_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be used as a cache: .*remove it"):
        DiskCache(tmp_path, max_bytes=1000)


def test_a_full_disk_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    megabyte = 1 << 20
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(DiskCache(tmp_path, max_bytes=8 * megabyte)) as cache:
        fill(cache, A, 0, 100)
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabyte, limits[1]))  # the index is smaller, the data is not
        try:
            assert not cache.admit(B, 0, bytes(2 * megabyte), hold="me")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert cache.used_bytes() == on_disk(tmp_path) == 100
        assert cache.admit(B, 0, bytes(8 * megabyte - 100), hold="me")


def test_threads_share_one_cache(tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            start = draw.randrange(0, 5000, 50)
            stop = start + draw.randrange(50, 400)
            data = shared.read(A, start, stop)
            if data is None:
                shared.admit(A, start, contents(A, start, stop), hold=str(seed))
            elif data != contents(A, start, stop):
                wrong.append((start, stop))
            shared.release(A, start, stop, str(seed))

    with closing(DiskCache(tmp_path, max_bytes=2000)) as shared:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert shared.used_bytes() == on_disk(tmp_path) <= 2000


class CacheAgainstModel(RuleBasedStateMachine):
    """Any calls in any order: bytes are right, holds are kept, the bound holds, index and disk agree."""

    places = st.tuples(st.sampled_from([A, B]), st.integers(0, 30), st.integers(1, 12))
    owners = st.sampled_from(["x", "y"])

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.environ["CACHE_TEST_FOLDER"]) / os.urandom(8).hex()
        self.cache = DiskCache(self.folder, max_bytes=30)
        self.holds: list[tuple[str, int, int, str]] = []
        self.must_be_there: set[tuple[str, int]] = set()

    def teardown(self) -> None:
        self.cache.close()

    @rule(place=places, owner=st.sampled_from(["x", "y", ""]))
    def admit(self, place: tuple[str, int, int], owner: str) -> None:
        shard, start, length = place
        if fill(self.cache, shard, start, start + length, hold=owner):
            assert self.cache.missing(shard, start, start + length) == []
            if owner:
                self.holds.append((shard, start, start + length, owner))
                self.must_be_there |= {(shard, at) for at in range(start, start + length)}

    @rule(place=places, owner=owners)
    def hold(self, place: tuple[str, int, int], owner: str) -> None:
        shard, start, length = place
        self.cache.hold(shard, start, start + length, owner)
        self.holds.append((shard, start, start + length, owner))
        gaps = self.cache.missing(shard, start, start + length)
        absent = {at for first, last in gaps for at in range(first, last)}
        self.must_be_there |= {(shard, at) for at in range(start, start + length) if at not in absent}

    @rule(place=places, owner=owners)
    def release(self, place: tuple[str, int, int], owner: str) -> None:
        shard, start, length = place
        self.cache.release(shard, start, start + length, owner)
        self.holds = [hold for hold in self.holds
                      if not (hold[0] == shard and start <= hold[1] and hold[2] <= start + length
                              and hold[3] == owner)]  # fmt: skip
        self._drop_unheld()

    @rule(place=places)
    def forget(self, place: tuple[str, int, int]) -> None:
        shard, start, length = place
        self.cache.forget(shard, start, start + length)
        gaps = self.cache.missing(shard, 0, 50)
        self.must_be_there -= {(shard, at) for first, last in gaps for at in range(first, last)}
        assert all(self.cache.read(shard, at, at + 1) is None for at in range(start, start + length))

    @precondition(lambda self: self.holds)
    @rule()
    def reopen(self) -> None:
        self.cache.close()
        self.cache = DiskCache(self.folder, max_bytes=30)
        self.holds = []
        self._drop_unheld()

    def _drop_unheld(self) -> None:
        held = {(shard, at) for shard, start, stop, _ in self.holds for at in range(start, stop)}
        self.must_be_there &= held

    @invariant()
    def held_bytes_are_there_and_right(self) -> None:
        for shard, at in self.must_be_there:
            assert self.cache.read(shard, at, at + 1) == contents(shard, at, at + 1)
        for shard in (A, B):
            gaps = self.cache.missing(shard, 0, 50)
            edges = [0, *[edge for gap in gaps for edge in gap], 50]
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                if start < stop:
                    assert self.cache.read(shard, start, stop) == contents(shard, start, stop)

    @invariant()
    def index_and_disk_agree_within_the_bound(self) -> None:
        assert self.cache.used_bytes() == on_disk(self.folder) <= 30


def test_any_calls_in_any_order_keep_the_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("CACHE_TEST_FOLDER", str(tmp_path))
    run_state_machine_as_test(
        CacheAgainstModel, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
    )
