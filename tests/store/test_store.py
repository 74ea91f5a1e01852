import sqlite3
import threading
from pathlib import Path

import pytest

from orchestrate.errors import StoreError
from orchestrate.store import SCHEMA_VERSION, AttemptRow, Event, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store.sqlite")


def test_intent_is_stored_before_the_job_exists(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.sqlite") as store:
        store.intend("a", 1, sweep="s", now=1.0, reason="never started")
    with open_store(tmp_path / "store.sqlite") as again:  # as after a crash
        assert again.open_attempts() == {"a": 1}
        assert [(e.what, e.reason) for e in again.events("a")] == [("SUBMITTING", "never started")]


def test_attempt_is_open_until_it_ended_or_was_refused(store: Store) -> None:
    store.intend("a", 1, sweep="s", now=1.0, reason="")
    store.submitted("a", 1, "oc-a.1", sweep="s", now=2.0)
    store.intend("b", 1, sweep="s", now=1.0, reason="")
    store.refused("b", 1, sweep="s", now=2.0, reason="running already")
    assert store.open_attempts() == {"a": 1}
    store.ended("a", 1, ended=3.0, exit_code=0)
    assert store.open_attempts() == {}


def test_refusal_of_one_sweep_does_not_hide_the_job_of_another(store: Store) -> None:
    for sweep in ("first", "second"):
        store.intend("a", 1, sweep=sweep, now=1.0, reason="")
    store.submitted("a", 1, "oc-a.1", sweep="first", now=2.0)
    store.refused("a", 1, sweep="second", now=2.0, reason="running already")
    assert store.open_attempts() == {"a": 1}


def test_end_of_an_attempt_closes_intents_that_came_to_nothing(store: Store) -> None:
    store.intend("a", 1, sweep="s", now=1.0, reason="")
    store.intend("a", 2, sweep="s", now=2.0, reason="")
    store.ended("a", 2, ended=3.0, exit_code=75)
    assert store.open_attempts() == {}


def test_only_news_become_events(store: Store) -> None:
    event = Event(1.0, "a", None, "RUNNING", None, "attempt 1")
    assert store.record_states([event]) == [event]
    assert store.record_states([Event(2.0, "a", None, "RUNNING", None, "attempt 1")]) == []
    assert len(store.record_states([Event(3.0, "a", None, "COMPLETED", None, "done")])) == 1
    assert [event.time for event in store.events("a")] == [1.0, 3.0]


def test_events_are_never_changed(store: Store, tmp_path: Path) -> None:
    store.record_states([Event(1.0, "a", None, "RUNNING", None, "")])
    other = sqlite3.connect(tmp_path / "store.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute("UPDATE events SET reason = 'another'")


def test_edited_sweep_has_the_new_trials_only(store: Store) -> None:
    store.record_sweep("s", ["a", "b"], now=1.0)
    store.record_sweep("s", ["c", "b"], now=2.0)
    store.record_sweep("other", [], now=3.0)
    assert store.sweeps() == {"other": (), "s": ("c", "b")}


def test_rebuild_replaces_everything(store: Store) -> None:
    store.intend("old", 1, sweep="s", now=1.0, reason="")
    store.rebuild(
        [("s", 1.0, ["a"])],
        [AttemptRow("a", 1, "s", "ENDED", 1.0, 2.0, 0)],
        [Event(1.0, "a", 1, "SUBMITTED", None, "found"), Event(2.0, "a", None, "COMPLETED", None, "done")],
    )
    assert store.sweeps() == {"s": ("a",)}
    assert store.open_attempts() == {}
    assert store.events("old") == ()
    assert store.record_states([Event(9.0, "a", None, "COMPLETED", None, "done")]) == []


def test_two_controllers_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"

    def write(trial: str) -> None:
        with open_store(path) as store:
            for attempt in range(50):
                store.intend(trial, attempt, sweep="s", now=0.0, reason="")

    threads = [threading.Thread(target=write, args=(trial,)) for trial in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open_store(path) as store:
        assert [len(store.events(trial)) for trial in "abc"] == [50, 50, 50]


def test_store_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    open_store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match="orchestrate adopt"):
        open_store(path)


def test_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_text("not a database, but long enough to be taken for one: " + "x" * 4096)
    with pytest.raises(StoreError, match="move it away"):
        open_store(path)
