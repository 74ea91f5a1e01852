"""Index over the RunDirs of one folder, in SQLite; only controllers write it, and it can be rebuilt from the RunDirs.

What it adds to the files: the intent to submit, stored before a submission, and the log of what was decided and why.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from orchestrate.errors import StoreError

SCHEMA_VERSION = 1
# Another sweep's controller may be writing; its transactions are a few rows long.
_BUSY_SECONDS = 30.0

_SCHEMA = """
CREATE TABLE sweeps (name TEXT PRIMARY KEY, created REAL NOT NULL);
CREATE TABLE trials (id TEXT PRIMARY KEY, state TEXT NOT NULL, cause TEXT, reason TEXT NOT NULL, time REAL NOT NULL);
CREATE TABLE members (
    sweep TEXT NOT NULL REFERENCES sweeps(name) ON DELETE CASCADE, position INTEGER NOT NULL, trial TEXT NOT NULL,
    PRIMARY KEY (sweep, trial));
CREATE TABLE attempts (
    trial TEXT NOT NULL, number INTEGER NOT NULL, sweep TEXT NOT NULL, state TEXT NOT NULL, job TEXT,
    started REAL NOT NULL, ended REAL, exit_code INTEGER, PRIMARY KEY (trial, number, sweep));
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, trial TEXT NOT NULL, attempt INTEGER, what TEXT NOT NULL,
    cause TEXT, reason TEXT NOT NULL);
CREATE INDEX events_of_trial ON events (trial, id);
CREATE TRIGGER events_never_change BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
"""

SUBMITTING, SUBMITTED, REFUSED, ENDED = "SUBMITTING", "SUBMITTED", "REFUSED", "ENDED"


@dataclass(frozen=True)
class Event:
    """Something that happened to a trial.

    Attributes:
        time: unix time.
        trial, attempt: what it happened to; no attempt for the trial as a whole.
        what: a state, or a step of a submission.
        cause, reason: why, in a word and in a sentence.
    """

    time: float
    trial: str
    attempt: int | None
    what: str
    cause: str | None
    reason: str


@dataclass(frozen=True)
class AttemptRow:
    """One attempt as a rebuilt store holds it."""

    trial: str
    number: int
    sweep: str
    state: str
    started: float
    ended: float | None
    exit_code: int | None


class Store:
    """An open store; close it, or use it in a `with`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write some rows, all or none.

        Raises:
            StoreError: the file cannot be written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:
                yield self._connection
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"store: cannot be written: {error}; is the disk full, or another writer stuck?"
            ) from error

    def record_sweep(self, name: str, trials: Sequence[str], *, now: float) -> None:
        """Say which trials a sweep has now; those it had before are no longer its members."""
        with self._transaction() as rows:
            _insert_sweep(rows, name, trials, now)

    def intend(self, trial: str, attempt: int, *, sweep: str, now: float, reason: str) -> None:
        """Say that an attempt is about to be submitted; comes before the submission, so that a crash leaves a trace."""
        with self._transaction() as rows:
            values = (trial, attempt, sweep, SUBMITTING, now)
            rows.execute(
                "INSERT OR REPLACE INTO attempts (trial, number, sweep, state, started) VALUES (?, ?, ?, ?, ?)", values
            )
            _append(rows, Event(now, trial, attempt, SUBMITTING, None, reason))

    def submitted(self, trial: str, attempt: int, job: str, *, sweep: str, now: float) -> None:
        """Say that the launcher took the attempt."""
        with self._transaction() as rows:
            values = (SUBMITTED, job, trial, attempt, sweep)
            rows.execute("UPDATE attempts SET state=?, job=? WHERE trial=? AND number=? AND sweep=?", values)
            _append(rows, Event(now, trial, attempt, SUBMITTED, None, job))

    def refused(self, trial: str, attempt: int, *, sweep: str, now: float, reason: str) -> None:
        """Say that the launcher did not take the attempt."""
        with self._transaction() as rows:
            values = (REFUSED, now, trial, attempt, sweep)
            rows.execute("UPDATE attempts SET state=?, ended=? WHERE trial=? AND number=? AND sweep=?", values)
            _append(rows, Event(now, trial, attempt, REFUSED, None, reason))

    def ended(self, trial: str, attempt: int, *, ended: float, exit_code: int | None) -> None:
        """Say that an attempt, and every intent before it, is over."""
        with self._transaction() as rows:
            values = (ENDED, ended, exit_code, trial, attempt)
            rows.execute("UPDATE attempts SET state=?, ended=?, exit_code=? WHERE trial=? AND number=?", values)
            rows.execute(
                "UPDATE attempts SET state=?, ended=? WHERE trial=? AND number<? AND ended IS NULL",
                (ENDED, ended, trial, attempt),
            )

    def record_states(self, events: Iterable[Event]) -> list[Event]:
        """Note the states of trials (`event.what`); append and return the events that tell something new."""
        with self._transaction() as rows:
            query = "SELECT state, reason FROM trials WHERE id = ?"
            news = [e for e in events if rows.execute(query, (e.trial,)).fetchone() != (e.what, e.reason)]
            values = [(e.trial, e.what, e.cause, e.reason, e.time) for e in news]
            rows.executemany("REPLACE INTO trials (id, state, cause, reason, time) VALUES (?, ?, ?, ?, ?)", values)
            for event in news:
                _append(rows, event)
            return news

    def open_attempts(self) -> dict[str, int]:
        """Return the trials with an attempt that is not known to have ended, with its number."""
        query = "SELECT trial, MAX(number) FROM attempts WHERE ended IS NULL GROUP BY trial"
        return dict(self._connection.execute(query).fetchall())

    def sweeps(self) -> dict[str, tuple[str, ...]]:
        """Return the trials of each sweep, in order."""
        found: dict[str, tuple[str, ...]] = {
            name: () for (name,) in self._connection.execute("SELECT name FROM sweeps")
        }
        for sweep, trial in self._connection.execute("SELECT sweep, trial FROM members ORDER BY sweep, position"):
            found[sweep] = (*found[sweep], trial)
        return found

    def events(self, trial: str) -> tuple[Event, ...]:
        """Return what happened to a trial, oldest first."""
        query = "SELECT time, trial, attempt, what, cause, reason FROM events WHERE trial = ? ORDER BY id"
        return tuple(Event(*row) for row in self._connection.execute(query, (trial,)))

    def rebuild(
        self,
        sweeps: Iterable[tuple[str, float, Sequence[str]]],
        attempts: Iterable[AttemptRow],
        events: Iterable[Event],
    ) -> None:
        """Replace everything in one transaction.

        Args:
            sweeps: name, time of creation and trials of each.
            attempts: every attempt of every trial.
            events: oldest first; the last one of a trial without an attempt is its state.
        """
        with self._transaction() as rows:
            for table in ("members", "sweeps", "trials", "attempts", "events"):
                rows.execute(f"DELETE FROM {table}")
            for name, created, trials in sweeps:
                _insert_sweep(rows, name, trials, created)
            rows.executemany(
                "INSERT INTO attempts (trial, number, sweep, state, started, ended, exit_code) VALUES (?,?,?,?,?,?,?)",
                [(a.trial, a.number, a.sweep, a.state, a.started, a.ended, a.exit_code) for a in attempts],
            )
            for event in events:
                _append(rows, event)
            rows.execute(
                "INSERT OR REPLACE INTO trials (id, state, cause, reason, time) "
                "SELECT trial, what, cause, reason, time FROM events WHERE attempt IS NULL ORDER BY id"
            )


def _insert_sweep(rows: sqlite3.Connection, name: str, trials: Sequence[str], created: float) -> None:
    rows.execute("INSERT OR IGNORE INTO sweeps (name, created) VALUES (?, ?)", (name, created))
    rows.execute("DELETE FROM members WHERE sweep = ?", (name,))
    members = [(name, position, trial) for position, trial in enumerate(trials)]
    rows.executemany("INSERT INTO members (sweep, position, trial) VALUES (?, ?, ?)", members)


def _append(rows: sqlite3.Connection, event: Event) -> None:
    values = (event.time, event.trial, event.attempt, event.what, event.cause, event.reason)
    rows.execute("INSERT INTO events (time, trial, attempt, what, cause, reason) VALUES (?, ?, ?, ?, ?, ?)", values)


def store_path(runs: Path) -> Path:
    """Return where the store of a runs folder lies."""
    return runs / "store.sqlite"


def open_store(path: Path) -> Store:
    """Open a store, making an empty one if there is none.

    Raises:
        StoreError: the file is no store, is of another schema version, or cannot be opened.
    """
    connection = _connect(path)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        connection.close()
        raise StoreError(
            f"{path}: schema version {version}, this orchestrate writes {SCHEMA_VERSION}; "
            "move the file away and run `orchestrate adopt`, which loses nothing"
        )
    return Store(connection)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be opened: {error}; choose another folder with --runs") from error
    try:
        _make_schema(connection)
        _use_write_ahead_log(connection)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreError(f"{path}: cannot be used: {error}; move it away and run `orchestrate adopt`") from error
    return connection


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Change the journal, for which SQLite does not wait when another command opens the file at the same time."""
    for _ in range(100):
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        time.sleep(0.05)
    connection.execute("PRAGMA journal_mode = WAL").fetchone()


def _make_schema(connection: sqlite3.Connection) -> None:
    """Create the tables in a new file; two commands that open it at once make them once."""
    connection.execute("PRAGMA foreign_keys = ON")
    # A power cut may lose the last rows, never the file; jobs are found again by name without them.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("BEGIN IMMEDIATE")
    tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    if not tables:
        # Not executescript, which would commit before it begins.
        for statement in _statements(_SCHEMA):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
