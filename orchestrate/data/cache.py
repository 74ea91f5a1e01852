"""Byte ranges of shards on a disk of this node, shared by all its processes.

Contents are named by the SHA-256 of the shard and the byte range, never by a file name, so datasets cannot mix. An
index in SQLite says which files exist; it is written before a file appears and after it is gone, so the files never
exceed the bound, whichever process dies when:

    admit   row "being written" -> file aside -> rename -> row "complete"
    evict   file removed -> row removed

What a process reserved and held is void once it is gone (`orchestrate.data.liveness`), however it ended.

Nothing is synced: after a power cut a file may hold anything. The reader's checksums find that, and `forget` heals it.
Files that no row knows, left by a power cut or a lost index, are removed by the next first process.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.data.liveness import LivingProcess, forget_name, is_alive, known_names, one_at_a_time
from orchestrate.errors import DataError

_SCHEMA_VERSION = 1
_ADVICE = "remove it, or choose another folder on a disk of this machine"
_BUSY_SECONDS = 60.0
_SCHEMA = (
    # writer: the process that is writing the file, NULL when it is complete. released: when the last hold ended, on
    # the clock of `state`; NULL while held. Ids are never used again, so a file has one writer in all its life.
    """CREATE TABLE files (id INTEGER PRIMARY KEY AUTOINCREMENT, shard TEXT NOT NULL, start INTEGER NOT NULL,
       stop INTEGER NOT NULL, writer TEXT, released INTEGER)""",
    "CREATE UNIQUE INDEX files_place ON files (shard, start)",
    "CREATE INDEX files_writer ON files (writer) WHERE writer IS NOT NULL",
    "CREATE INDEX files_released ON files (released) WHERE released IS NOT NULL AND writer IS NULL",
    """CREATE TABLE holds (shard TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, owner TEXT NOT NULL,
       process TEXT NOT NULL)""",
    "CREATE INDEX holds_place ON holds (shard, start)",
    "CREATE TABLE state (bytes INTEGER NOT NULL, clock INTEGER NOT NULL)",
    "INSERT INTO state VALUES (0, 0)",
    "CREATE TRIGGER added AFTER INSERT ON files BEGIN UPDATE state SET bytes = bytes + NEW.stop - NEW.start; END",
    "CREATE TRIGGER removed AFTER DELETE ON files BEGIN UPDATE state SET bytes = bytes - OLD.stop + OLD.start; END",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
# Files of a shard that meet [:start, :stop). They do not overlap, so the first is the last that begins at or before.
_MEETING = """shard = :shard AND start < :stop AND stop > :start AND start >= coalesce(
    (SELECT max(start) FROM files WHERE shard = :shard AND start <= :start), :start)"""
_HELD = "EXISTS (SELECT 1 FROM holds WHERE shard = files.shard AND start < files.stop AND stop > files.start)"


@dataclass(frozen=True, slots=True)
class Gap:
    """A byte range of a shard that the cache lacks and has made room for."""

    number: int
    shard_sha256: str
    start: int
    stop: int


class DiskCache:
    """Keep byte ranges of shards in a folder, for any number of threads and processes of this node.

    A range that somebody holds is never evicted; of the others, those released first go first. `max_bytes` bounds the
    files of all processes together at any time, files being written included, the index (some hundred bytes a range)
    not. The folder must lie on a disk of this node: locks do not work over most network file systems.

    Not to be used across a fork: make it in the process that uses it.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Open the folder, make it if needed, and clear what dead processes left.

        Raises:
            DataError: it cannot be used, or the disk has no room for `max_bytes`.
        """
        self.folder, self._max_bytes = folder, max_bytes
        self._processes = folder / "processes"
        self._mutex = threading.Lock()
        try:
            for path in (folder / "files", self._processes):
                path.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder / "open.lock"):  # the first one makes the index
                self._db = _open_index(folder / "index.sqlite")
                self._living = LivingProcess(self._processes)
                self._sweep()
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{folder}: cannot be used as a cache: {error}; {_ADVICE}") from error
        self._check_disk()

    def read(self, shard_sha256: str, start: int, stop: int) -> bytes | None:
        """Read a byte range, put together from several files where it must be; None unless all of it is there."""
        pieces: list[bytes] = []
        at = start
        for number, first, last in self._complete_files(shard_sha256, start, stop):
            if first > at:
                return None
            piece = self._read_piece(self._path(shard_sha256, first, last, number), at - first, min(stop, last) - at)
            if piece is None:
                # No complete file lacks bytes, unless it was evicted just now, or lost with the machine's power.
                self._forget_lost(number)
                return None
            pieces.append(piece)
            at = min(stop, last)
        if at < stop:
            return None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def missing(self, shard_sha256: str, start: int, stop: int) -> list[tuple[int, int]]:
        """List the parts of a byte range that are to be fetched; empty if all of it is there."""
        files = self._complete_files(shard_sha256, start, stop)
        return _gaps([(first, last) for _, first, last in files], start, stop)

    def admit(self, shard_sha256: str, start: int, data: bytes, *, hold: str) -> bool:
        """Keep the bytes of a shard from `start` on; False, and no hold, if there is no room.

        Args:
            hold: who holds them, see `hold`; "" for nobody, then they count as released now.

        Parts that are there already, or that another process is writing just now, are not written again.
        """
        room = self.reserve(shard_sha256, start, start + len(data), hold=hold)
        if room is None:
            return False
        whole = memoryview(data)
        filled = [self.fill(gap, whole[gap.start - start : gap.stop - start]) for gap in room]
        if all(filled):
            return True
        self.release(shard_sha256, start, start + len(data), hold)
        return False

    def reserve(self, shard_sha256: str, start: int, stop: int, *, hold: str) -> list[Gap] | None:
        """Make room for what is missing of a byte range, before it is fetched; None, and no hold, if there is none.

        Args:
            hold: who holds the range from now on, see `hold`; "" for nobody.

        Each gap is to be given to `fill` or `give_up`. Parts that another process is writing are not among them.
        """
        place = _place(shard_sha256, start, stop, process=self._living.name)
        with self._change() as db:
            if db.execute(f"SELECT 1 FROM files WHERE writer IS NOT NULL AND {_MEETING}", place).fetchone():
                self._clear_dead(db)  # nobody may wait for the bytes of a dead writer
            taken = db.execute(f"SELECT start, stop FROM files WHERE {_MEETING} ORDER BY start", place).fetchall()
            gaps = _gaps(taken, start, stop)
            if gaps and not self._make_room(db, sum(last - first for first, last in gaps), place):
                return None
            if hold:
                self._add_hold(db, shard_sha256, start, stop, hold)
            reserved = []
            for first, last in gaps:
                row = db.execute(
                    "INSERT INTO files (shard, start, stop, writer) VALUES (?, ?, ?, ?)",
                    (shard_sha256, first, last, self._living.name),
                )
                reserved.append(Gap(int(row.lastrowid or 0), shard_sha256, first, last))
            return reserved

    def fill(self, gap: Gap, data: bytes | memoryview) -> bool:
        """Keep the bytes of a reserved gap; False, and the gap is given up, if the disk is full."""
        path = self._path(gap.shard_sha256, gap.start, gap.stop, gap.number)
        try:
            path.parent.mkdir(exist_ok=True)
            aside = _aside(path)
            aside.write_bytes(data)
            aside.replace(path)
        except OSError:  # the disk is full in spite of our bound: others write there too
            self.give_up(gap)
            return False
        self._complete(gap)
        return True

    def give_up(self, gap: Gap) -> None:
        """Return the room of a reserved gap."""
        with self._change() as db:
            self._remove(db, [(gap.number, gap.shard_sha256, gap.start, gap.stop)])

    def hold(self, shard_sha256: str, start: int, stop: int, owner: str) -> None:
        """Keep a byte range from eviction, be it there or yet to come, until released or until this process ends."""
        with self._change() as db:
            self._add_hold(db, shard_sha256, start, stop, owner)

    def release(self, shard_sha256: str, start: int, stop: int, owner: str) -> None:
        """End the owner's holds that lie within a byte range; files that nobody else holds may then be evicted."""
        place = _place(shard_sha256, start, stop, owner=owner, process=self._living.name)
        with self._change() as db:
            db.execute(
                "DELETE FROM holds WHERE shard = :shard AND start >= :start AND stop <= :stop AND owner = :owner "
                "AND process = :process",
                place,
            )
            now = _tick(db)
            db.execute(
                f"UPDATE files SET released = {now} WHERE released IS NULL AND {_MEETING} AND NOT {_HELD}", place
            )

    def forget(self, shard_sha256: str, start: int, stop: int) -> None:
        """Remove all that meets a byte range, held or not: its bytes are not what they should be."""
        with self._change() as db:
            place = _place(shard_sha256, start, stop)
            rows = db.execute(f"SELECT id, shard, start, stop FROM files WHERE writer IS NULL AND {_MEETING}", place)
            self._remove(db, rows.fetchall())

    def used_bytes(self) -> int:
        """Sum the files of all processes, those that are being written included."""
        return int(self._select("SELECT bytes FROM state", {})[0][0])

    def close(self) -> None:
        """End all holds of this process."""
        with self._change() as db:
            self._clear_process(db, self._living.name)
        with self._mutex:
            self._db.close()
        self._living.close()

    def _complete_files(self, shard: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        query = f"SELECT id, start, stop FROM files WHERE writer IS NULL AND {_MEETING} ORDER BY start"
        return self._select(query, _place(shard, start, stop))

    def _read_piece(self, path: Path, offset: int, length: int) -> bytes | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            piece = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        return piece if len(piece) == length else None

    def _make_room(self, db: sqlite3.Connection, num_bytes: int, spared: dict[str, object]) -> bool:
        """Evict until so many bytes fit, sparing the range that is asked for; evicts nothing if that is not enough."""
        for swept in (False, True):
            if swept:
                self._clear_dead(db)
            excess = db.execute("SELECT bytes FROM state").fetchone()[0] + num_bytes - self._max_bytes
            rows = []
            # Closed before the rows go: a cursor must not walk an index that changes under it.
            with closing(
                db.execute(
                    "SELECT id, shard, start, stop FROM files WHERE released IS NOT NULL AND writer IS NULL "
                    "AND NOT (shard = :shard AND start < :stop AND stop > :start) ORDER BY released",
                    spared,
                )
            ) as oldest:
                while excess > 0 and (row := oldest.fetchone()):
                    rows.append(row)
                    excess -= row[3] - row[2]
            if excess <= 0:
                self._remove(db, rows)
                return True
        return False

    def _add_hold(self, db: sqlite3.Connection, shard: str, start: int, stop: int, owner: str) -> None:
        place = _place(shard, start, stop, owner=owner, process=self._living.name)
        db.execute("INSERT INTO holds VALUES (:shard, :start, :stop, :owner, :process)", place)
        db.execute(f"UPDATE files SET released = NULL WHERE {_MEETING}", place)

    def _complete(self, gap: Gap) -> None:
        with self._change() as db:
            # Released meanwhile, though still being written: then it may go at once.
            done = db.execute(
                f"UPDATE files SET writer = NULL, released = CASE WHEN {_HELD} THEN NULL ELSE {_tick(db)} END "
                "WHERE id = ? AND writer = ?",
                (gap.number, self._living.name),
            )
            if not done.rowcount:  # taken for dead by another process: the file is not counted any more
                self._path(gap.shard_sha256, gap.start, gap.stop, gap.number).unlink(missing_ok=True)

    def _forget_lost(self, number: int) -> None:
        with self._change() as db:
            rows = db.execute("SELECT id, shard, start, stop FROM files WHERE id = ? AND writer IS NULL", (number,))
            self._remove(db, rows.fetchall())

    def _remove(self, db: sqlite3.Connection, rows: list[tuple[int, str, int, int]]) -> None:
        """Remove files, then their rows: what is on the disk is never more than what is counted."""
        for number, shard, start, stop in rows:
            path = self._path(shard, start, stop, number)
            path.unlink(missing_ok=True)
            _aside(path).unlink(missing_ok=True)
            db.execute("DELETE FROM files WHERE id = ?", (number,))

    def _clear_dead(self, db: sqlite3.Connection) -> bool:
        """Void what processes reserved and held that are gone; say whether another one is alive."""
        others = known_names(self._processes) - {self._living.name}
        alive = {name for name in others if is_alive(self._processes, name)}
        named = db.execute("SELECT process FROM holds UNION SELECT writer FROM files WHERE writer IS NOT NULL")
        for name in others.union(*named.fetchall()) - alive - {self._living.name}:
            self._clear_process(db, name)
            forget_name(self._processes, name)
        return bool(alive)

    def _clear_process(self, db: sqlite3.Connection, process: str) -> None:
        rows = db.execute("SELECT id, shard, start, stop FROM files WHERE writer = ?", (process,)).fetchall()
        self._remove(db, rows)
        if db.execute("DELETE FROM holds WHERE process = ?", (process,)).rowcount:
            db.execute(f"UPDATE files SET released = {_tick(db)} WHERE released IS NULL AND NOT {_HELD}")

    def _sweep(self) -> None:
        """Clear what the dead left; the first process of all also removes files that no row knows."""
        with self._change() as db:
            if not self._clear_dead(db):
                rows = db.execute("SELECT id, shard, start, stop FROM files")
                known = {number: self._path(shard, start, stop, number) for number, shard, start, stop in rows}
                found = set((self.folder / "files").glob("*/*"))
                for path in found - set(known.values()):
                    path.unlink()
                db.executemany("DELETE FROM files WHERE id = ?", [(n,) for n in known if known[n] not in found])
            self._make_room(db, 0, _place("", 0, 0))  # the bound may be lower than last time

    def _check_disk(self) -> None:
        free, used = shutil.disk_usage(self.folder).free, self.used_bytes()
        if free + used < self._max_bytes:
            raise DataError(
                f"{self.folder}: a cache of {self._max_bytes:,} bytes asked for, its disk has room for "
                f"{free + used:,}; lower the bound or choose a larger disk"
            )

    def _path(self, shard: str, start: int, stop: int, number: int) -> Path:
        return self.folder / "files" / shard[:2] / f"{shard}-{start}-{stop}.{number}"

    def _select(self, query: str, place: dict[str, object]) -> list[Any]:
        with self._mutex, self._explained():
            return self._db.execute(query, place).fetchall()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Change the index in one transaction, one at a time over all processes."""
        with self._mutex, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DataError(f"{self.folder}: the index of the cache failed: {error}; {_ADVICE}") from error


def _open_index(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _SCHEMA_VERSION):
        connection.close()
        raise DataError(f"{path.parent}: a cache of format {version}, this version has {_SCHEMA_VERSION}; remove it")
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = NORMAL")
    if not version:
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("COMMIT")
    return connection


def _tick(db: sqlite3.Connection) -> int:
    """Move the clock of releases on: a count, for the time of day may jump."""
    return int(db.execute("UPDATE state SET clock = clock + 1 RETURNING clock").fetchone()[0])


def _place(shard: str, start: int, stop: int, **more: object) -> dict[str, object]:
    return {"shard": shard, "start": start, "stop": stop, **more}


def _gaps(taken: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """List what sorted ranges without overlap leave free of [start, stop)."""
    gaps = []
    for first, last in [*taken, (stop, stop)]:
        if start < first:
            gaps.append((start, min(first, stop)))
        start = max(start, last)
    return gaps


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
