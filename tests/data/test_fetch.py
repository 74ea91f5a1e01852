import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from orchestrate.data.fetch import ByteRange, Fetcher, Pace, merge_ranges
from orchestrate.data.retry import ForbiddenObjectError, MissingObjectError, Patience
from orchestrate.errors import DataError, StorageError
from tests.data.fault_proxy import FaultProxy, Kind
from tests.data.object_store import ObjectStore, object_store

__all__ = ["object_store"]  # a fixture

QUICK = Patience(first_pause_seconds=0.01, longest_pause_seconds=0.05, stall_seconds=0.5, budget_seconds=60.0)
DATA = random.Random(0).randbytes(200_000)


class GatedStore(MemoryFileSystem):  # type: ignore[misc]
    """A store that answers when it is told to, and notes what was asked of it."""

    protocol = "gated"
    store: dict[str, object] = {}  # noqa: RUF012  (fsspec keeps it on the class)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    def cat_file(self, path: str, start: int = 0, end: int = 0, **kwargs: object) -> bytes:
        with changed:
            asked.append((start, end))
            under_way.add((start, end))
            changed.notify_all()
            assert changed.wait_for(lambda: (start, end) in opened or everything in opened, timeout=60)
            under_way.discard((start, end))
            changed.notify_all()
        return DATA[start:end]


changed = threading.Condition()
asked: list[tuple[int, int]] = []
under_way: set[tuple[int, int]] = set()
opened: set[tuple[int, int]] = set()
everything = (-1, -1)


def answer(*ranges: tuple[int, int]) -> None:
    with changed:
        opened.update(ranges)
        changed.notify_all()


def wait_until_asked(count: int) -> list[tuple[int, int]]:
    with changed:
        assert changed.wait_for(lambda: len(asked) >= count, timeout=60)
        return list(asked)


@pytest.fixture
def gated() -> Iterator[str]:
    fsspec.register_implementation("gated", GatedStore, clobber=True)
    for kept in (asked, under_way, opened):
        kept.clear()
    yield "gated://x"
    answer(everything)


@pytest.fixture
def local_file(tmp_path: Path) -> str:
    (tmp_path / "a.tar").write_bytes(DATA)
    return str(tmp_path / "a.tar")


@pytest.fixture
def proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(object_store.endpoint) as proxy:
        object_store.use(monkeypatch, endpoint=proxy.url)
        yield proxy


@pytest.fixture
def s3_file(object_store: ObjectStore, proxy: FaultProxy) -> str:
    return object_store.put(f"{uuid.uuid4().hex}.tar", DATA)


def ask(fetcher: Fetcher, url: str, *places: tuple[int, int], urgent: bool = False) -> list[Future[bytes]]:
    return [fetcher.submit(ByteRange(url, start, stop), urgent=urgent) for start, stop in places]


def test_all_ranges_arrive_whole_and_right(local_file: str) -> None:
    fetcher = Fetcher(max_bytes=5000, max_concurrency=8)
    places = [(start, start + 777) for start in range(0, 150_000, 500)]
    futures = ask(fetcher, local_file, *places)
    assert [future.result(60) for future in futures] == [DATA[start:stop] for start, stop in places]
    assert fetcher.counts.snapshot()["bytes"] == 777 * len(places)
    fetcher.close()


def test_no_more_requests_than_allowed_and_no_more_bytes_than_the_budget(gated: str) -> None:
    fetcher = Fetcher(max_bytes=1000, max_concurrency=3)
    futures = ask(fetcher, gated, *[(at * 400, at * 400 + 400) for at in range(4)])
    assert wait_until_asked(2) == [(0, 400), (400, 800)]  # a third would be 1,200 bytes
    answer((0, 400))
    futures[0].result(60)
    assert wait_until_asked(3) == [(0, 400), (400, 800), (800, 1200)]
    answer(everything)
    assert all(len(future.result(60)) == 400 for future in futures)


def test_urgent_ranges_go_first_and_others_in_order(gated: str) -> None:
    fetcher = Fetcher(max_concurrency=1)
    futures = ask(fetcher, gated, (0, 1), (1, 2), (2, 3))
    wait_until_asked(1)
    futures += ask(fetcher, gated, (7, 8), (8, 9), urgent=True)
    answer(everything)
    assert [future.result(60) for future in futures] == [DATA[at : at + 1] for at in (0, 1, 2, 7, 8)]
    assert asked == [(0, 1), (7, 8), (8, 9), (1, 2), (2, 3)]


def test_a_range_larger_than_the_budget_runs_alone_and_is_not_overtaken(gated: str) -> None:
    fetcher = Fetcher(max_bytes=100, max_concurrency=8)
    futures = ask(fetcher, gated, (0, 50), (0, 5000), (1, 2))
    assert wait_until_asked(1) == [(0, 50)]
    answer((0, 50))
    assert wait_until_asked(2) == [(0, 50), (0, 5000)]
    assert futures[0].result(60) == DATA[:50]
    answer((0, 5000))
    assert wait_until_asked(3)[2] == (1, 2)
    answer(everything)
    assert [len(future.result(60)) for future in futures] == [50, 5000, 1]


def test_a_cancelled_range_costs_no_request(gated: str) -> None:
    fetcher = Fetcher(max_concurrency=1)
    first, second, third = ask(fetcher, gated, (0, 1), (1, 2), (2, 3))
    wait_until_asked(1)
    assert second.cancel()
    answer(everything)
    assert (first.result(60), third.result(60)) == (DATA[:1], DATA[2:3])
    assert asked == [(0, 1), (2, 3)]


def test_closing_ends_every_wait(gated: str) -> None:
    fetcher = Fetcher(max_concurrency=1)
    running, waiting = ask(fetcher, gated, (0, 1), (1, 2))
    wait_until_asked(1)
    fetcher.close()
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result(60)
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.submit(ByteRange(gated, 0, 1))


def test_a_callback_may_ask_for_more(local_file: str) -> None:
    fetcher = Fetcher(max_concurrency=1)
    more: Future[Future[bytes]] = Future()
    first = fetcher.submit(ByteRange(local_file, 0, 10))
    first.add_done_callback(lambda done: more.set_result(fetcher.submit(ByteRange(local_file, 10, 20))))
    assert more.result(60).result(60) == DATA[10:20]


def test_a_file_that_ends_within_the_range_is_named_and_counted(local_file: str, s3_file: str) -> None:
    fetcher = Fetcher()
    for url in (local_file, s3_file):
        with pytest.raises(DataError, match=f"{url}: ends at byte 200,000, the index has a sample up to 200,001"):
            fetcher.submit(ByteRange(url, 199_000, 200_001)).result(60)
    assert fetcher.counts.snapshot()["wrong_length"] == 2


def test_missing_and_forbidden_objects_fail_at_once(s3_file: str, proxy: FaultProxy) -> None:
    fetcher = Fetcher(patience=QUICK)
    with pytest.raises(MissingObjectError, match="nothing"):
        fetcher.submit(ByteRange("s3://datasets/nothing", 0, 10)).result(60)
    proxy.add("403", times=-1)
    with pytest.raises(ForbiddenObjectError, match=s3_file):
        fetcher.submit(ByteRange(s3_file, 0, 10)).result(60)
    assert fetcher.counts.snapshot()["requests"] == proxy.counts["GET"] == 2


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_store_full_of_faults_gives_every_byte(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A third of all answers are broken, in eight ways."""
    with FaultProxy(object_store.endpoint, seed=1) as proxy:
        object_store.use(monkeypatch, endpoint=proxy.url)
        url = object_store.put("faults.tar", DATA)
        url = url if scheme == "s3" else object_store.http_url("faults.tar", proxy.url)
        likely: tuple[Kind, ...] = ("429", "500", "503", "reset", "half", "short")
        for kind in likely:
            proxy.add(kind, times=-1, probability=0.05)
        proxy.add("stall", times=-1, probability=0.02)
        proxy.add("silent", times=-1, probability=0.02)
        fetcher = Fetcher(max_bytes=20_000, max_concurrency=16, patience=QUICK)
        places = [(start, start + 1500) for start in range(0, 190_000, 1500)]
        futures = ask(fetcher, url, *places)
        assert b"".join(future.result(120) for future in futures) == DATA[: places[-1][1]]
        seen = fetcher.counts.snapshot()
        fetcher.close()
        broken = sum(count for name, count in proxy.counts.items() if name.startswith("fault"))
        assert broken > 20  # else it tests nothing
        assert seen["retries"] + seen["hedges"] >= broken - proxy.counts["fault reset"]
        assert len(places) < seen["requests"] <= proxy.counts["GET"]


def test_a_dead_store_ends_in_a_resumable_error_for_every_range(s3_file: str, proxy: FaultProxy) -> None:
    proxy.add("503", times=-1)
    fetcher = Fetcher(patience=Patience(attempts=3, first_pause_seconds=0.01))
    for future in ask(fetcher, s3_file, *[(at, at + 9) for at in range(9)]):
        with pytest.raises(StorageError, match="asked 3 times"):
            future.result(60)
    assert fetcher.concurrency == 1


def test_an_answer_that_takes_too_long_is_overtaken_by_a_second_one(gated: str) -> None:
    fetcher = Fetcher(max_concurrency=4)
    for place in [(at, at + 1) for at in range(40)]:
        answer(place)
        fetcher.submit(ByteRange(gated, *place)).result(60)
    slow, filler = ask(fetcher, gated, (100, 200), (300, 301))
    assert wait_until_asked(43).count((100, 200)) == 2
    answer((100, 200), (300, 301))
    assert slow.result(60) == DATA[100:200]
    assert filler.result(60) == DATA[300:301]
    assert fetcher.counts.snapshot()["hedges"] >= 1


class SimulatedStore:
    """Answers with a rate that grows with the number of requests up to a point; time is virtual."""

    def __init__(self, best: int, refuse_above: int = 10**9) -> None:
        self.best, self.refuse_above, self.now = best, refuse_above, 0.0

    def run(self, pace: Pace, rounds: int) -> list[int]:
        limits = []
        for _ in range(rounds):
            running = pace.limit
            started = self.now
            self.now += 1.0 * max(1.0, running / self.best)
            if running > self.refuse_above:
                for _ in range(running):
                    pace.pushed_back(started, self.now)
            for _ in range(running):
                pace.was_reached()
                pace.answered(1000, self.now)
            limits.append(pace.limit)
        return limits


def test_concurrency_grows_to_where_throughput_ends_to_grow() -> None:
    limits = SimulatedStore(best=20).run(Pace(64), 600)
    assert 16 <= sorted(limits[200:])[len(limits[200:]) // 2] <= 26
    assert max(limits[200:]) <= 32


def test_concurrency_reaches_its_bound_on_a_fast_store_and_never_passes_it() -> None:
    limits = SimulatedStore(best=1000).run(Pace(32), 300)
    assert max(limits) == 32
    assert limits[-1] >= 25


def test_concurrency_is_halved_once_for_a_flight_of_refusals() -> None:
    store = SimulatedStore(best=1000, refuse_above=10)
    limits = store.run(Pace(64), 400)
    assert max(limits) <= 14  # one step above what is refused
    assert min(limits[50:]) >= 5  # halved once, not once per refusal
    assert sum(limits[50:]) / len(limits[50:]) > 6


def test_concurrency_stays_when_too_little_is_asked_for() -> None:
    pace = Pace(64)
    for second in range(1000):
        pace.answered(1000, float(second))
    assert pace.limit == 4


def test_a_store_that_pushes_back_is_asked_less(s3_file: str, proxy: FaultProxy) -> None:
    fetcher = Fetcher(max_concurrency=8, patience=QUICK)
    proxy.add("429", times=4)
    futures = ask(fetcher, s3_file, *[(at * 10, at * 10 + 10) for at in range(8)])
    assert b"".join(future.result(60) for future in futures) == DATA[:80]
    assert fetcher.counts.snapshot()["pushbacks"] >= 4
    assert fetcher.concurrency <= 2


RANGES = st.lists(
    st.builds(
        lambda url, start, length: ByteRange(url, start, start + length),
        st.sampled_from(["a", "b"]),
        st.integers(0, 200),
        st.integers(1, 30),
    ),
    max_size=20,
)


@given(ranges=RANGES, max_gap=st.integers(0, 20), max_bytes=st.integers(1, 100))
def test_merged_requests_cover_each_range_once_within_gap_and_length(
    ranges: list[ByteRange], max_gap: int, max_bytes: int
) -> None:
    merged = merge_ranges(ranges, max_gap, max_bytes=max_bytes)
    order = [part for _, parts in merged for part in parts]
    assert sorted(order, key=repr) == sorted(ranges, key=repr)
    for whole, parts in merged:
        assert all(part.url == whole.url and whole.start <= part.start < part.stop <= whole.stop for part in parts)
        assert whole.length <= max(max_bytes, *(part.length for part in parts))
        bare = set(range(whole.start, whole.stop)) - {at for part in parts for at in range(part.start, part.stop)}
        runs = "".join("x" if at in bare else " " for at in range(whole.start, whole.stop)).split()
        assert all(len(run) <= max_gap for run in runs)


def test_neighbours_become_one_request() -> None:
    parts = [ByteRange("a", 20, 30), ByteRange("a", 0, 10), ByteRange("b", 12, 20), ByteRange("a", 12, 20)]
    assert merge_ranges(parts, 2) == [
        (ByteRange("a", 0, 30), [ByteRange("a", 0, 10), ByteRange("a", 12, 20), ByteRange("a", 20, 30)]),
        (ByteRange("b", 12, 20), [ByteRange("b", 12, 20)]),
    ]
