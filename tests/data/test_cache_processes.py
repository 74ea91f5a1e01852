"""The disk cache among several processes, and when they are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import IO

from orchestrate.data.cache import DiskCache
from tests.data.test_cache import A, B, contents, fill, on_disk

_WORKER = """
import random, sys
from pathlib import Path
from orchestrate.data.cache import DiskCache
from tests.data.test_cache import A, B, contents
folder, max_bytes, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
cache = DiskCache(folder, max_bytes=max_bytes)
print("ready", flush=True)
for turn in range(10**9):
    shard, start = draw.choice([A, B]), draw.randrange(0, 400_000, 1000)
    stop = start + draw.randrange(1000, 20_000)
    data = cache.read(shard, start, stop)
    if data is None:
        admitted = cache.admit(shard, start, contents(shard, start, stop), hold="w")
        if admitted and draw.random() < 0.5:
            data = cache.read(shard, start, stop)
            # another writer may be at one of its parts, or may have died there
            if data is None and not cache.missing(shard, start, stop):
                print("LOST", flush=True)
    if data is not None and data != contents(shard, start, stop):
        print("WRONG", start, stop, flush=True)
    if draw.random() < 0.9:
        cache.release(shard, start, stop, "w")
    if turn % 20 == 0:
        print("turn", turn, flush=True)
"""
_BOUND = 200_000


def frozen_sum(workers: "list[subprocess.Popen[str]]", folder: Path) -> int:
    """Sum the files while nobody moves: otherwise files that come and go meanwhile are counted together."""
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    for worker in workers:
        os.waitpid(worker.pid, os.WUNTRACED)
    total = on_disk(folder)
    for worker in workers:
        worker.send_signal(signal.SIGCONT)
    return total


def start_worker(folder: Path, seed: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(folder), str(_BOUND), str(seed)], stdout=subprocess.PIPE, text=True
    )


def wait_for(stream: IO[str] | None, word: str) -> None:
    assert stream is not None
    for line in stream:
        assert "WRONG" not in line and "LOST" not in line, line
        if word in line:
            return
    raise AssertionError(f"the worker ended before {word!r}")


def test_killed_writers_leave_no_wrong_byte_and_no_byte_too_many(tmp_path: Path) -> None:
    """Three processes write, read and evict; one after the other is killed at any point, and the disk is summed."""
    draw, sums, seeds = random.Random(0), list[int](), iter(range(10**6))
    workers = [start_worker(tmp_path, next(seeds)) for _ in range(3)]
    for worker in workers:
        wait_for(worker.stdout, "ready")
    try:
        for kill in range(12):
            end = time.monotonic() + draw.uniform(0.05, 0.4)
            while time.monotonic() < end:
                sums.append(frozen_sum(workers, tmp_path))
            victim = workers[kill % 3]
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            assert not {"WRONG", "LOST"} & set(str(victim.stdout and victim.stdout.read()).split())
            workers[kill % 3] = start_worker(tmp_path, next(seeds))
            wait_for(workers[kill % 3].stdout, "turn")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert len(sums) > 20
    assert _BOUND // 2 < max(sums) <= _BOUND
    with closing(DiskCache(tmp_path, max_bytes=_BOUND)) as cache:
        assert cache.used_bytes() == on_disk(tmp_path)  # nothing of the dead is left over
        assert fill(cache, "c" * 64, 0, _BOUND)  # nor held


_KILLED_AT_EACH_LINE = """
import os, signal, sqlite3, sys
from contextlib import closing
from pathlib import Path
from orchestrate.data import cache as module
from orchestrate.data.cache import DiskCache
from tests.data.test_cache import A, B, contents, fill, on_disk

def kill_at(line):
    lines = iter(range(1, 10**9))
    def trace(frame, event, argument):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

def work(folder, line):
    cache = DiskCache(folder, max_bytes=1000)
    fill(cache, A, 0, 500, hold="")
    fill(cache, A, 500, 1000, hold="me")
    kill_at(line)
    cache.release(A, 500, 1000, "me")
    fill(cache, B, 0, 600)
    cache.read(B, 0, 600)
    cache.forget(B, 0, 10)

line = 0
while True:
    line += 1
    folder = Path(sys.argv[1]) / str(line)
    child = os.fork()
    if not child:
        work(folder, line)
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        counted = index.execute("SELECT bytes FROM state").fetchone()[0]
    assert on_disk(folder) <= counted <= 1000, (line, on_disk(folder), counted)
    with closing(DiskCache(folder, max_bytes=1000)) as cache:
        assert cache.used_bytes() == on_disk(folder), line
        for shard, start, stop in ((A, 0, 500), (A, 500, 1000), (B, 0, 600)):
            assert cache.read(shard, start, stop) in (None, contents(shard, start, stop)), line
        assert fill(cache, "c" * 64, 0, 1000), line
    if not killed:
        break
print(line)
"""


def test_a_kill_at_any_line_keeps_the_bound_and_every_promise(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_EACH_LINE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_holds_and_reservations_of_a_killed_process_end_while_others_live_on(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from orchestrate.data.cache import DiskCache
cache = DiskCache(Path({str(tmp_path)!r}), max_bytes=1000)
assert cache.admit({A!r}, 0, bytes(600), hold="me")
with cache._change() as db:
    db.execute("INSERT INTO files (shard, start, stop, writer) VALUES (?, 0, 300, ?)", ({B!r}, cache._living.name))
print("ready", flush=True)
input()
"""
    with closing(DiskCache(tmp_path, max_bytes=1000)) as cache:
        victim = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        wait_for(victim.stdout, "ready")
        assert not fill(cache, B, 300, 800)  # 600 are held, 300 are about to come
        victim.kill()
        victim.wait()
        assert fill(cache, B, 0, 1000)
        assert cache.read(B, 0, 1000) == contents(B, 0, 1000)
