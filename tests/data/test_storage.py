import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrate.data import remote_store, storage
from orchestrate.data.retry import ForbiddenObjectError, MissingObjectError, Patience, ReadCounts
from orchestrate.errors import DataError, StorageError
from tests.data.fault_proxy import FaultProxy, Kind, add_fault, proxy_process, seen
from tests.data.object_store import ObjectStore, object_store

__all__ = ["object_store"]  # a fixture

# Stalls are cut after half a second, so that tests of them are short. A machine that is too busy to answer within that
# repeats a request, so counts are compared with each other and bounded below.
# The time for a whole request is long: what cuts a stall is that nothing comes.
QUICK = Patience(
    first_pause_seconds=0.01, longest_pause_seconds=0.05, connect_seconds=999.0, stall_seconds=0.5, budget_seconds=30.0
)
DATA = bytes(range(256)) * 40


@pytest.fixture
def proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A faulty way to the object store; s3:// URLs go through it."""
    with FaultProxy(object_store.endpoint) as proxy:
        object_store.use(monkeypatch, endpoint=proxy.url)
        yield proxy


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder in each kind of store."""
    if request.param == "local":
        return str(tmp_path / "data")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    store = request.getfixturevalue("object_store")
    store.use(monkeypatch)
    return f"s3://datasets/{uuid.uuid4().hex}"


@pytest.fixture(params=["s3", "http"])
def faulty_url(request: pytest.FixtureRequest, object_store: ObjectStore, proxy: FaultProxy) -> str:
    """DATA behind the proxy, by s3:// and by http://."""
    name = f"{uuid.uuid4().hex}.tar"
    url = object_store.put(name, DATA)
    return url if request.param == "s3" else object_store.http_url(name, proxy.url)


def test_ranges_are_the_same_in_every_store(folder: str) -> None:
    url = storage.join(folder, "a.tar")
    storage.write(url, DATA)
    inside = [(0, None), (7, None), (0, 5), (9000, 1000), (3, 0)]
    across_the_end = [(10_000, 1000), (len(DATA), 5), (len(DATA), None), (99_999, 5), (99_999, None)]
    for offset, length in inside + across_the_end:
        expected = DATA[offset:] if length is None else DATA[offset : offset + length]
        assert storage.read(url, offset, length) == expected, (offset, length)


def test_empty_files_can_be_read(folder: str) -> None:
    url = storage.join(folder, "a.tar")
    storage.write(url, b"")
    assert (storage.read(url), storage.read(url, 0, 10), storage.size(url), list(storage.stream(url))) == (
        b"",
        b"",
        0,
        [],
    )


def test_a_stream_is_the_file_from_any_offset(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "STREAM_PIECE_BYTES", 1000)
    url = storage.join(folder, "a.tar")
    storage.write(url, DATA)
    pieces = list(storage.stream(url, 123))
    assert b"".join(pieces) == DATA[123:]
    assert max(map(len, pieces)) == 1000


def test_a_rewritten_file_has_another_version(folder: str) -> None:
    url = storage.join(folder, "a.tar")
    storage.write(url, DATA)
    first = storage.info(url)
    storage.list_tars(folder)  # listings must not be remembered
    storage.write(url, DATA[:-1] + b"!")
    second = storage.info(url)
    assert first.size == second.size == len(DATA)
    assert first.version and second.version and first.version != second.version
    assert storage.info(url) == second


def test_what_somebody_else_changes_is_seen(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.use(monkeypatch)
    name = uuid.uuid4().hex
    url = object_store.put(f"{name}/a.tar", b"1")
    folder = url.rpartition("/")[0]
    assert (storage.list_tars(folder), storage.info(url).size) == (["a.tar"], 1)
    object_store.put(f"{name}/a.tar", b"22")
    object_store.put(f"{name}/b.tar", b"1")
    assert storage.info(url).size == 2
    assert storage.list_tars(folder) == ["a.tar", "b.tar"]


def test_missing_files_and_folders_are_named(folder: str) -> None:
    url = storage.join(folder, "nothing.tar")
    for ask in (storage.read, storage.info, storage.size, lambda url: list(storage.stream(url))):
        with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
            ask(url)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        storage.list_tars(storage.join(folder, "elsewhere"))


def test_tars_are_listed_by_folder_pattern_and_name(folder: str) -> None:
    for name in ("b.tar", "a.tar", "c.tgz", "note.txt", "a.tar.idx", "deep/d.tar"):
        storage.write(storage.join(folder, name), b"1")
    assert storage.list_tars(folder) == ["a.tar", "b.tar", "c.tgz"]
    assert storage.list_tars(f"{folder}/*.tar") == ["a.tar", "b.tar"]
    assert storage.list_tars(f"{folder}/[ab].*") == ["a.tar", "b.tar"]
    assert storage.list_tars(f"{folder}/*/d.tar") == ["deep/d.tar"]
    assert storage.list_tars(f"{folder}/b.tar") == ["b.tar"]
    assert storage.list_tars(f"{folder}/{{a,c}}.*") == ["a.tar", "c.tgz"]
    for url in (folder, f"{folder}/*.tar", f"{folder}/[ab].*", f"{folder}/*/d.tar", f"{folder}/b.tar"):
        assert storage.base_folder(url) == folder


def test_numbered_patterns_are_written_out_without_listing() -> None:
    names = storage.list_tars("s3://no-such-bucket/x/{008..011}-{a,b}.tar")
    assert names == [f"{number:03d}-{letter}.tar" for number in range(8, 12) for letter in "ab"]
    assert storage.base_folder("s3://no-such-bucket/x/{008..011}.tar") == "s3://no-such-bucket/x"


def test_folders_with_pattern_letters_in_their_names_are_folders(tmp_path: Path) -> None:
    folder = tmp_path / "run [1] {a,b}"
    storage.write(str(folder / "a.tar"), b"1")
    assert storage.list_tars(str(folder)) == ["a.tar"]


def test_an_interrupted_local_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    storage.write(str(path), b"old")
    with pytest.raises(TypeError):
        storage.write(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["429", "500", "503", "half", "short", "stall", "silent"])
def test_a_fault_that_passes_is_retried_and_each_retry_counted(faulty_url: str, proxy: FaultProxy, kind: Kind) -> None:
    counts = ReadCounts()
    proxy.add(kind, times=2)
    assert storage.read(faulty_url, 1000, 5000, counts=counts, patience=QUICK) == DATA[1000:6000]
    # Exactly as many requests as we count: libraries below retry nothing by themselves.
    seen = counts.snapshot()
    assert proxy.counts["GET"] == seen["requests"] == seen["retries"] + 1 >= 3
    assert seen["wrong_length"] == (2 if kind == "short" else 0)


def test_a_reset_is_retried_at_most_twice_as_often_as_counted(faulty_url: str, proxy: FaultProxy) -> None:
    counts = ReadCounts()
    proxy.add("reset", times=4)
    assert storage.read(faulty_url, 1000, 5000, counts=counts, patience=QUICK) == DATA[1000:6000]
    # aiohttp takes a new connection by itself, once, where one breaks before the answer begins.
    assert proxy.counts["GET"] == 5
    assert 3 <= counts.snapshot()["requests"] <= 5


def test_a_stalled_whole_read_and_info_are_cut_too(faulty_url: str, proxy: FaultProxy) -> None:
    proxy.add("stall", times=1)
    proxy.add("silent", times=1, method="HEAD")
    assert storage.read(faulty_url, patience=QUICK) == DATA
    assert storage.info(faulty_url, patience=QUICK).size == len(DATA)
    assert proxy.counts["fault stall"] == proxy.counts["fault silent"] == 1


def test_a_trickle_is_cut_by_the_least_rate(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends a byte now and then never is silent for long enough."""
    patience = Patience(connect_seconds=0.0, stall_seconds=0.3, least_bytes_per_second=1e9, attempts=1)
    with FaultProxy(object_store.endpoint) as proxy:
        url = object_store.http_url("trickle", proxy.url)
        object_store.put("trickle", DATA)
        proxy.add("trickle")
        with pytest.raises(StorageError, match="trickle"):
            storage.read(url, 0, 5000, patience=patience)
        assert proxy.counts["fault trickle"] == 1


@pytest.mark.parametrize("kind", ["403", "404"])
def test_refused_and_missing_objects_fail_at_once(faulty_url: str, proxy: FaultProxy, kind: Kind) -> None:
    proxy.add(kind, times=-1)
    proxy.add(kind, times=-1, method="HEAD")
    error = ForbiddenObjectError if kind == "403" else MissingObjectError
    with pytest.raises(error, match=faulty_url):
        storage.read(faulty_url, 0, 10, patience=QUICK)
    assert proxy.counts["GET"] == 1


def test_a_store_that_never_answers_ends_in_a_resumable_error(faulty_url: str, proxy: FaultProxy) -> None:
    proxy.add("503", times=-1)
    few = Patience(attempts=4, first_pause_seconds=0.01)
    with pytest.raises(StorageError, match=f"{faulty_url}.*asked 4 times"):
        storage.read(faulty_url, 0, 10, patience=few)
    assert proxy.counts["GET"] == 4


def test_a_closed_port_is_retried_and_then_named(monkeypatch: pytest.MonkeyPatch, object_store: ObjectStore) -> None:
    with FaultProxy(object_store.endpoint) as closed:
        pass
    object_store.use(monkeypatch, endpoint=closed.url)
    counts = ReadCounts()
    few = Patience(attempts=3, first_pause_seconds=0.01)
    for url in ("s3://datasets/x", f"{closed.url}/x"):
        with pytest.raises(StorageError, match=f"{url}.*asked 3 times"):
            storage.read(url, 0, 10, counts=counts, patience=few)
    assert counts.snapshot()["retries"] == 4


def test_faults_of_info_listing_and_write_are_retried(proxy: FaultProxy) -> None:
    for method in ("HEAD", "GET", "PUT"):
        proxy.add("503", method=method, times=2)
    name = uuid.uuid4().hex
    storage.write(f"s3://datasets/{name}/a.tar", DATA, patience=QUICK)
    assert storage.list_tars(f"s3://datasets/{name}", patience=QUICK) == ["a.tar"]
    assert storage.info(f"s3://datasets/{name}/a.tar", patience=QUICK).size == len(DATA)
    assert min(proxy.counts[method] for method in ("PUT", "GET", "HEAD")) >= 3


def test_a_changed_entity_tag_is_visible(faulty_url: str, proxy: FaultProxy) -> None:
    before = storage.info(faulty_url)
    proxy.add("etag", method="HEAD")
    assert storage.info(faulty_url).version == "etag:changed" != before.version
    assert storage.info(faulty_url) == before


def test_versions_of_other_kinds_are_not_compared(tmp_path: Path, faulty_url: str) -> None:
    storage.write(str(tmp_path / "a.tar"), DATA)
    local, remote = storage.info(str(tmp_path / "a.tar")).version, storage.info(faulty_url).version
    assert (local.partition(":")[0], remote.partition(":")[0]) == ("mtime", "etag")
    for one, other, differ in [
        (local, remote, False), (local, "mtime:1", True), (remote, "etag:1", True), (remote, remote, False),
        ("time:Mon", "time:Tue", True), ("time:Mon", local, False),
        ("", remote, False), ("1700000000000000000", "1700000000000000001", False), ("abc", remote, False),
    ]:  # fmt: skip
        assert storage.versions_differ(one, other) is storage.versions_differ(other, one) is differ


def test_a_broken_stream_goes_on_where_it_broke(
    faulty_url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STREAM_PIECE_BYTES", 2048)
    proxy.add("half", skip=1)
    proxy.add("503", skip=2)
    assert b"".join(storage.stream(faulty_url, patience=QUICK)) == DATA
    asked = [int(found.split("=")[1].split("-")[0]) for _, _, found in proxy.requests if found]
    assert asked == sorted(asked)  # nothing before the break is read again


def test_a_server_that_once_answers_with_the_whole_file_gives_the_range(faulty_url: str, proxy: FaultProxy) -> None:
    """A small file is cut to the range; s3fs hides the status, so there the length tells, and it is an error."""
    proxy.add("whole")
    if faulty_url.startswith("s3"):
        with pytest.raises(DataError, match="ignores byte ranges"):
            storage.read(faulty_url, 1000, 50, patience=QUICK)
    else:
        assert storage.read(faulty_url, 1000, 50, patience=QUICK) == DATA[1000:1050]


@pytest.fixture
def rangeless_server(tmp_path: Path) -> Iterator[str]:
    """Python's own server, which knows no ranges."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield "http://{}:{}".format(*server.server_address)
    server.shutdown()
    server.server_close()


def test_a_server_without_ranges_is_refused_before_it_sends_a_large_file(rangeless_server: str, tmp_path: Path) -> None:
    url = f"{rangeless_server}/large.tar"
    with (tmp_path / "large.tar").open("wb") as file:
        file.truncate(1 << 40)  # no disk and no time would do if the body were read
    with pytest.raises(DataError, match=f"{url}: the server ignores byte ranges .*nginx"):
        storage.read(url, 1000, 50)
    with pytest.raises(DataError, match="ignores byte ranges"):
        storage.read(url, 0, 50)


def test_small_files_of_a_server_without_ranges_are_read(rangeless_server: str, tmp_path: Path) -> None:
    (tmp_path / "small.tar").write_bytes(DATA)
    url = f"{rangeless_server}/small.tar"
    assert storage.read(url) == DATA
    assert storage.read(url, 300, 20) == DATA[300:320]
    assert storage.read(url, 10_000, 5000) == DATA[10_000:]
    assert storage.info(url).size == len(DATA)
    assert storage.info(url).version


def test_an_index_page_of_a_web_server_lists_tars(rangeless_server: str, tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "a.tar.idx"):
        (tmp_path / name).write_bytes(b"1")
    assert storage.list_tars(rangeless_server) == ["a.tar", "b.tar"]


def test_http_is_read_only() -> None:
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/x: cannot be written.*choose a folder or a bucket"):
        storage.write("http://127.0.0.1:9/x", b"1")


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(DataError, match="nothing://x: cannot open this kind of URL"):
        storage.read("nothing://x")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ENDPOINT_URL"])
def test_a_new_process_finds_the_endpoint_in_its_environment(object_store: ObjectStore, variable: str) -> None:
    url = object_store.put("environment.tar", DATA)
    environment = object_store.environment()
    environment[variable] = environment.pop("AWS_ENDPOINT_URL")
    code = f"from orchestrate.data import storage; print(len(storage.read({url!r})))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(DATA))


def test_a_worker_process_survives_the_faults_of_a_store_elsewhere(object_store: ObjectStore) -> None:
    url = object_store.put("elsewhere.tar", DATA)
    code = f"from orchestrate.data import storage; print(storage.read({url!r}, 100, 50).hex())"
    with proxy_process(object_store.endpoint) as proxy:
        add_fault(proxy, "503", times=2)
        add_fault(proxy, "half", times=1)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=object_store.environment(proxy),
            capture_output=True,
            text=True,
            check=True,
        )
        assert seen(proxy)["counts"] == {"GET": 4, "fault 503": 2, "fault half": 1}
    assert bytes.fromhex(done.stdout) == DATA[100:150]


def test_local_reads_import_no_client(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    code = f"""
import sys
from orchestrate.data import storage
url = {str(tmp_path / "a.tar")!r}
storage.read(url, 3, 4), storage.info(url), storage.list_tars({str(tmp_path)!r}), list(storage.stream(url))
storage.write(url, b"1")
print([name for name in ("fsspec", "aiohttp", "asyncio", "botocore") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_users_of_s3fs_elsewhere_keep_their_retries(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    object_store.use(monkeypatch)
    storage.read(object_store.put("x.tar", DATA))
    assert s3fs.S3FileSystem().retries == s3fs.S3FileSystem.retries == 5


def test_what_the_user_configured_for_s3_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 99, "retries": {"total_max_attempts": 7}}})
    options = remote_store._options("s3", QUICK)["config_kwargs"]
    assert options["read_timeout"] == 99
    assert options["retries"] == {"total_max_attempts": 1}
